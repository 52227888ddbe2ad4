"""Tiny models on disk, each written once per test session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.tiny import tiny_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a function from the name of a variant to its folder; nobody may change what is in it."""
    folders: dict[str, Path] = {}

    def make(variant: str) -> Path:
        if variant not in folders:
            folders[variant] = tiny_model(variant, tmp_path_factory.mktemp(variant))
        return folders[variant]

    return make
