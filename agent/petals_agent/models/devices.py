"""The devices of this host that blocks can be served on, without torch in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from petals_agent.processes import child_environment, die_with_parent

TORCH_TIMEOUT_S = 60.0  # torch from a slow, cold disk, and the driver's first start

_DRIVER = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")
_NVIDIA, _DISPLAY_CLASS = "0x10de", "0x03"

_ASK = """
import json, torch
cuda = torch.cuda
gpus = []
problem = None
try:
    for i in range(cuda.device_count()):
        free, total = cuda.mem_get_info(i)
        gpus.append({"device": f"cuda:{i}", "name": cuda.get_device_name(i), "free": free, "total": total})
except Exception as error:
    problem = str(error).splitlines()[0] if str(error) else repr(error)
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus, "problem": problem}))
"""


@dataclass(frozen=True)
class Gpu:
    """A CUDA device, numbered as torch numbers them; bytes."""

    device: str  # "cuda:0"
    name: str
    free: int
    total: int


@dataclass(frozen=True)
class TorchView:
    """What the installed torch is and sees; `problem` when it could not be asked, or a device gave an error."""

    version: str | None
    cuda: str | None  # the CUDA version that it was built for; None in a CPU build
    gpus: tuple[Gpu, ...]
    problem: str | None


def has_nvidia_driver() -> bool:
    """Whether the kernel has NVIDIA's driver loaded."""
    return any(Path(path).exists() for path in _DRIVER)


def nvidia_cards(pci: Path = Path("/sys/bus/pci/devices")) -> int:
    """NVIDIA display and compute cards on the bus, with a driver or without."""

    def is_card(device: Path) -> bool:
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            return False
        return vendor == _NVIDIA and kind.startswith(_DISPLAY_CLASS)

    try:
        return sum(map(is_card, pci.iterdir()))
    except OSError:  # no PCI bus
        return 0


def ask_torch(timeout: float = TORCH_TIMEOUT_S) -> TorchView:
    """Import torch in another process and let it look; blocks for at most `timeout` seconds and never raises."""
    command: Sequence[str] = (sys.executable, "-P", "-c", _ASK)
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            env=child_environment(),
            preexec_fn=die_with_parent(),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        why = (
            f"it did not answer within {timeout:g} s"
            if isinstance(error, subprocess.TimeoutExpired)
            else str(error)
        )
        return TorchView(None, None, (), why)
    try:
        seen = json.loads(done.stdout.splitlines()[-1])
        gpus = tuple(Gpu(**gpu) for gpu in seen["gpus"])
        return TorchView(seen["version"], seen["cuda"], gpus, seen["problem"])
    except (ValueError, IndexError, KeyError, TypeError):
        words = done.stderr.strip().splitlines()
        return TorchView(None, None, (), words[-1] if words else f"exit status {done.returncode}")
