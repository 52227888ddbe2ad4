"""A probe that looks at the GPU that serves, through NVML where it is there: memory, temperature, errors of its memory."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from petals_agent.health.findings import OK, Probe, Reading, failed, not_applicable
from petals_agent.health.findings import degraded as worse
from petals_agent.health.steps import Step

_MEMORY_SHARE = 0.99
# reasons for a lower clock (nvml.h, nvmlClocksEventReasons): software and hardware thermal slowdown
_THERMAL = 0x20 | 0x40


@dataclass(frozen=True)
class GpuFacts:
    """What NVML says of one GPU; `broken` counts memory errors that could not be corrected since the driver was loaded."""

    memory_share: float
    celsius: int
    clock_reasons: int
    broken: int


class GpuProbes:
    """`all` of them; not applicable without a GPU or without NVML (package nvidia-ml-py)."""

    def __init__(self, device: Callable[[], str | None], adjusted: Callable[[Probe], Probe]) -> None:
        """`device` is what the container serves on ("cpu", "cuda:0"), None while that is not known."""
        self._device = device
        self._nvml: Any = None
        with contextlib.suppress(ImportError):
            self._nvml = importlib.import_module("pynvml")
        self.all = (adjusted(Probe("gpu", self._gpu, 15.0, 10.0, 2, Step.RESTART_CONTAINER)),)

    async def _gpu(self) -> Reading:
        device = self._device()
        if device is None or not device.startswith("cuda"):
            return not_applicable("no GPU serves")
        if self._nvml is None:
            return not_applicable("the package nvidia-ml-py is not installed")
        index = int(device.partition(":")[2] or 0)
        return gpu_reading(await asyncio.to_thread(self._read, index))

    def _read(self, index: int) -> GpuFacts:
        nvml = self._nvml
        nvml.nvmlInit()
        try:
            gpu = nvml.nvmlDeviceGetHandleByIndex(index)
            memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
            broken = 0
            with contextlib.suppress(nvml.NVMLError):  # cards without ECC
                kind, since = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
                broken = int(nvml.nvmlDeviceGetTotalEccErrors(gpu, kind, since))
            return GpuFacts(
                memory.used / memory.total,
                int(nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)),
                int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)),
                broken,
            )
        finally:
            nvml.nvmlShutdown()


def gpu_reading(facts: GpuFacts) -> Reading:
    """Errors that could not be corrected are a failure: what was computed since may be wrong."""
    if facts.broken:
        return failed(
            f"{facts.broken} memory errors that could not be corrected (ECC); see nvidia-smi -q -d ECC"
        )
    if facts.clock_reasons & _THERMAL:
        return worse(f"slowed down by heat at {facts.celsius} °C; look at fans and dust")
    if facts.memory_share > _MEMORY_SHARE:
        return worse(f"{facts.memory_share:.0%} of the GPU's memory is used")
    return OK
