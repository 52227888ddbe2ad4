"""Every check, in the order in which they are told where order matters."""

from __future__ import annotations

from petals_agent.doctor.check import Check
from petals_agent.doctor.clock import check_clock
from petals_agent.doctor.configuration import check_config, check_modes
from petals_agent.doctor.gpu import check_gpu
from petals_agent.doctor.identity import check_identity
from petals_agent.doctor.model import check_model, check_weights
from petals_agent.doctor.network import (
    check_addresses,
    check_bootstrap,
    check_listen_ports,
    check_reachability,
)
from petals_agent.doctor.resources import check_disk, check_memory, check_memory_limit, check_open_files
from petals_agent.doctor.systemd import check_unit

_DIALLING_S = 30.0
_TORCH_S = 75.0  # a cold disk
_HUB_S = 60.0
_BOTH_S = _TORCH_S + _HUB_S

CHECKS = (
    Check("config", check_config),
    Check("file modes", check_modes),
    Check("identity", check_identity),
    Check("unit", check_unit),
    Check("clock", check_clock, _DIALLING_S),
    Check("listen ports", check_listen_ports),
    Check("bootstrap peers", check_bootstrap, _DIALLING_S),
    Check("reachability", check_reachability),
    Check("addresses", check_addresses),
    Check("gpu", check_gpu, _TORCH_S),
    Check("model", check_model, _HUB_S),
    Check("weights", check_weights, _HUB_S),
    Check("memory", check_memory, _BOTH_S),
    Check("memory limit", check_memory_limit, _BOTH_S),
    Check("disk", check_disk, _BOTH_S),
    Check("open files", check_open_files),
)
