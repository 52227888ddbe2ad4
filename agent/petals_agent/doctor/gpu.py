"""GPU, driver and torch: whether they fit together and to what the configuration asks for."""

from __future__ import annotations

from pathlib import Path

from petals_agent.doctor.check import Result, ok, problem, warning
from petals_agent.doctor.host import Host
from petals_agent.models.devices import TorchView, has_nvidia_driver, nvidia_cards

_DRIVER_VERSION = Path("/proc/driver/nvidia/version")
_NVIDIA_SMI = "See what the driver says, and reboot after its upgrade: nvidia-smi"


async def check_gpu(host: Host) -> Result:
    """The device to serve on is there, and torch can use it."""
    device = host.loaded.config.serve.device if host.loaded is not None else "auto"
    return judge_gpu(device, nvidia_cards(), has_nvidia_driver(), driver_version(), await host.torch())


def driver_version(path: Path = _DRIVER_VERSION) -> str | None:
    """Such as "535.129.03"; None without the driver."""
    try:
        words = path.read_text().split("\n")[0].split()
    except OSError:
        return None
    return next((word for word in words if word[:1].isdigit() and "." in word), None)


def judge_gpu(device: str, cards: int, driver: bool, version: str | None, torch: TorchView) -> Result:
    """From what the bus, the kernel and torch say; a pure function.

    What makes serve.device impossible is a problem, a GPU that "auto" would leave idle a warning.
    """
    if torch.version is None:
        return problem(
            f"torch cannot be imported: {torch.problem}", "Install it again: make setup, or the package"
        )
    if device == "cpu":
        return ok(f'serve.device is "cpu"; torch {torch.version}')
    complain = warning if device == "auto" else problem
    if not cards and not driver and not torch.gpus:
        if device == "auto":
            return ok(f"no NVIDIA card: blocks are served on the CPU; torch {torch.version}")
        return problem(
            f'serve.device is "{device}" and there is no NVIDIA card',
            'Set it to "cpu": petals-agent config show --origins',
        )
    if not driver and not torch.gpus:
        return complain(
            f"{cards} NVIDIA cards and no driver", "Install it and reboot: sudo apt install nvidia-driver"
        )
    if torch.cuda is None:
        return complain(
            f"there is an NVIDIA GPU, and torch {torch.version} is the build for CPUs",
            "Install the build for GPUs: TORCH=cuda make setup (a package: make deb TORCH=cuda)",
        )
    if not torch.gpus or torch.problem:
        return complain(
            f"torch {torch.version} for CUDA {torch.cuda} and driver {version or 'of unknown version'} see "
            f"{len(torch.gpus)} devices{f': {torch.problem}' if torch.problem else ''}",
            _NVIDIA_SMI,
        )
    if device not in ("auto", "cuda", *(gpu.device for gpu in torch.gpus)):
        return problem(f'serve.device is "{device}" and torch sees {len(torch.gpus)} devices', _NVIDIA_SMI)
    names = ", ".join(f"{gpu.device} {gpu.name} ({gpu.total / 2**30:.0f} GiB)" for gpu in torch.gpus)
    return ok(f"{names}; driver {version or 'of unknown version'}, torch {torch.version}")
