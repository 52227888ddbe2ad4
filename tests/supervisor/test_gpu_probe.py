"""What is said of a GPU follows from NVML's figures; without a GPU the probe has nothing to say."""

from __future__ import annotations

import dataclasses

import pytest

from petals_agent.health.findings import Probe, Status
from petals_agent.supervisor.gpu_probes import GpuFacts, GpuProbes, gpu_reading

FINE = GpuFacts(memory_share=0.7, celsius=60, clock_reasons=0x4, broken=0)  # 0x4: at its power limit


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({}, Status.OK, ""),
        ({"broken": 2}, Status.FAILED, "2 memory errors"),
        ({"clock_reasons": 0x44, "celsius": 91}, Status.DEGRADED, "91 °C"),
        ({"memory_share": 0.999}, Status.DEGRADED, "100%"),
    ],
)
def test_readings(change: dict[str, float], status: Status, words: str) -> None:
    reading = gpu_reading(dataclasses.replace(FINE, **change))
    assert reading.status is status and words in reading.reason


@pytest.mark.parametrize("device", [None, "cpu"])
async def test_no_gpu_serves(device: str | None) -> None:
    def same(probe: Probe) -> Probe:
        return probe

    (probe,) = GpuProbes(lambda: device, same).all
    assert (await probe.check()).status is Status.NOT_APPLICABLE
