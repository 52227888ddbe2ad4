"""Ports that are taken for real, peers that answer and peers that do not, addresses of every kind."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doctor.conftest import Look
from harness.processes import Processes
from harness.swarm import start_bootstrap
from petals_agent.config.public_swarm import PUBLIC_INITIAL_PEERS
from petals_agent.doctor.check import Outcome, Skip
from petals_agent.doctor.host import Running
from petals_agent.doctor.network import (
    endpoint,
    holder_of,
    interface_addresses,
    is_ours,
    is_public,
    judge_addresses,
    judge_reachability,
    port_result,
)

PEER = "QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY"
FORBIDDEN = Running(None, "no permission", forbidden=True)


def test_a_random_port(look: Look) -> None:
    assert "random port" in look("listen ports").found


def test_a_port_that_somebody_took(look: Look) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        more = f'[swarm]\nlisten = ["/ip4/127.0.0.1/tcp/{port}"]'
        result = look("listen ports", more)
        assert (
            result.outcome is Outcome.PROBLEM
            and result.remedy == f"See who has it: sudo ss -ltnp 'sport = :{port}'"
        )
        assert f"(process {os.getpid()})" in result.found and holder_of(port) == os.getpid()
        maddr = f"/ip4/127.0.0.1/tcp/{port}"
        assert port_result(maddr, port, FORBIDDEN, 0, "sudo").outcome is Outcome.SKIPPED
    result = look("listen ports", more)
    assert result.outcome is Outcome.OK and f"port {port} is free" in result.found


def test_the_port_for_metrics(look: Look) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert look("listen ports", f'[metrics]\nlisten = "127.0.0.1:{port}"').outcome is Outcome.PROBLEM
    assert look("listen ports", f'[metrics]\nlisten = "localhost:{port}"').outcome is Outcome.OK


def test_a_port_that_only_root_may_have() -> None:
    result = port_result("/ip4/127.0.0.1/tcp/81", 81, Running(None), 1000, "sudo")
    assert result.outcome is Outcome.PROBLEM and "root alone" in result.found


def test_whose_port_it_is() -> None:
    status = {"maddrs": [f"/ip4/10.0.0.1/tcp/31330/p2p/{PEER}"], "pids": {"agent": 5, "p2pd": None}}
    assert is_ours(31330, None, status) and is_ours(9100, 5, status)
    assert not is_ours(9100, None, status) and not is_ours(9100, 6, status) and not is_ours(31330, 5, None)


def test_bootstrap_peers(look: Look, processes: Processes, free_port: Callable[[], int]) -> None:
    """One answers, one is gone, and both."""
    live, gone = start_bootstrap(processes), f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{PEER}"
    assert look("bootstrap peers").outcome is Outcome.OK, "there is none"
    result = look("bootstrap peers", peers=(live,))
    assert result.outcome is Outcome.OK and result.found == "1 of 1 answer"
    result = look("bootstrap peers", peers=(live, gone))
    assert (
        result.outcome is Outcome.WARNING and "1 of 2 do not answer" in result.found and gone in result.found
    )
    result = look("bootstrap peers", peers=(gone,))
    assert result.outcome is Outcome.PROBLEM and result.remedy.endswith(
        f"nc -vz 127.0.0.1 {gone.split('/')[4]}"
    )


def test_another_peer_at_that_address(look: Look, processes: Processes) -> None:
    """Somebody listens there, and is not who was named."""
    live = start_bootstrap(processes)
    result = look("bootstrap peers", peers=(live.rsplit("/", 1)[0] + f"/{PEER}",))
    assert result.outcome is Outcome.PROBLEM


def test_reachability_without_an_agent(look: Look) -> None:
    result = look("reachability")
    assert result.outcome is Outcome.SKIPPED and "no agent runs" in result.found
    assert look("reachability", '[swarm]\nreachability = "off"').outcome is Outcome.SKIPPED


def test_what_peers_said() -> None:
    assert judge_reachability(False, True).outcome is Outcome.OK
    assert judge_reachability(True, True).outcome is Outcome.WARNING
    assert judge_reachability(True, False).outcome is Outcome.PROBLEM
    with pytest.raises(Skip):
        judge_reachability(None, True)


@given(st.ip_addresses())
def test_public_addresses(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    maddr = f"/ip{address.version}/{address}/tcp/31330"
    assert is_public(maddr) == address.is_global
    assert not is_public(f"{maddr}/p2p/{PEER}/p2p-circuit")
    fits = judge_addresses([maddr], "this host has", public_swarm=True)
    assert fits.outcome is (Outcome.OK if address.is_global else Outcome.WARNING)
    assert judge_addresses([maddr], "this host has", public_swarm=False).outcome is Outcome.OK


def test_names() -> None:
    assert is_public("/dns/bootstrap1.petals.dev/tcp/31337") and not is_public("/dns4/lab.local/tcp/1")
    assert not is_public("/dns/localhost/tcp/1") and not is_public("/unix/run/x.sock")
    assert any(map(is_public, PUBLIC_INITIAL_PEERS))
    assert endpoint(f"/dns/bootstrap1.petals.dev/tcp/31337/p2p/{PEER}") == ("bootstrap1.petals.dev", "31337")


def test_addresses_of_this_host(look: Look) -> None:
    assert "/ip4/127.0.0.1" in interface_addresses()
    assert look("addresses").outcome is Outcome.OK, "a private swarm"
    result = look(
        "addresses", '[swarm]\nannounce = ["/ip4/192.168.1.5/tcp/31330"]', peers=PUBLIC_INITIAL_PEERS
    )
    assert result.outcome is Outcome.WARNING and "swarm.announce only private" in result.found
