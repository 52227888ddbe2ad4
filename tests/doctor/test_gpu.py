"""GPU, driver and torch as this host has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from doctor.conftest import Look
from petals_agent.doctor.check import Outcome
from petals_agent.doctor.gpu import driver_version
from petals_agent.models.devices import ask_torch, has_nvidia_driver, nvidia_cards


def test_torch_is_asked_in_another_process() -> None:
    seen = ask_torch()
    assert (seen.version, seen.cuda, seen.problem) == (torch.__version__, torch.version.cuda, None)
    assert len(seen.gpus) == torch.cuda.device_count()


def test_torch_that_takes_too_long() -> None:
    seen = ask_torch(timeout=0.01)
    assert seen.version is None and seen.problem == "it did not answer within 0.01 s"


def test_torch_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    seen = ask_torch()
    assert seen.version is None and seen.problem == "ImportError: libcudart.so.12: cannot open"


def test_torch_that_cannot_be_imported_is_a_problem(
    look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('gone')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = look("gpu")
    assert result.outcome is Outcome.PROBLEM and "gone" in result.found


def test_a_host_without_a_gpu(look: Look) -> None:
    if nvidia_cards() or has_nvidia_driver() or torch.cuda.is_available():
        pytest.skip("this host has one")
    assert driver_version() is None
    assert look("gpu").outcome is Outcome.OK
    assert look("gpu", '[serve]\ndevice = "auto"').outcome is Outcome.OK
    result = look("gpu", '[serve]\ndevice = "cuda:0"')
    assert result.outcome is Outcome.PROBLEM and "no NVIDIA card" in result.found


@pytest.mark.gpu
def test_a_host_with_a_gpu(look: Look) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    result = look("gpu", '[serve]\ndevice = "cuda:0"')
    assert result.outcome is Outcome.OK and torch.cuda.get_device_name(0) in result.found
    assert look("gpu", '[serve]\ndevice = "cuda:99"').outcome is Outcome.PROBLEM
    assert look("memory", '[serve]\ndevice = "cuda:0"').outcome is Outcome.OK
