"""The installer takes a CPU build of torch where one can be had at once, and never waits for an index that is silent."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script as a module, with a pip that is configured to find nothing."""
    spec = importlib.util.spec_from_file_location("setup_venv", ROOT / "packaging" / "setup_venv.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "nothing").mkdir()
    for name, value in {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": (tmp_path / "nothing").as_uri(),
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "has_gpu", lambda: False)
    return module


def write_wheel(folder: Path, version: str) -> str:
    """A torch that holds nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"torch-{version}-py3-none-any.whl"
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(folder / name, "w") as wheel:
        wheel.writestr("torch.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return name


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with pip in it and nothing else."""
    folder = tmp_path_factory.mktemp("venv") / "venv"
    subprocess.run(
        [sys.executable, "-m", "venv", str(folder)], check=True, timeout=100, stdin=subprocess.DEVNULL
    )
    return folder


@pytest.fixture
def venv(setup: ModuleType, interpreter: Path) -> Iterator[object]:
    """That environment, without torch after the test."""
    venv = setup.Venv(interpreter)
    yield venv
    subprocess.run([str(venv.python), "-m", "pip", "uninstall", "-qq", "-y", "torch"], check=True, timeout=60)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[str]:
    """A package index on loopback that has torch 9.9.9+cpu."""
    wheel = write_wheel(tmp_path / "cpu" / "torch", "9.9.9+cpu")
    page = tmp_path / "cpu" / "torch" / "index.html"
    page.write_text(f'<!DOCTYPE html><a href="{wheel.replace("+", "%2B")}">{wheel}</a>')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/cpu"
        server.shutdown()


def test_wheel_folder_of_pip_comes_first(
    setup: Any, venv: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wheel(tmp_path / "wheels", "9.9.9+cpu")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setattr(setup, "PYTORCH_CPU_INDEX", "http://127.0.0.1:9/never-asked")
    setup.install_torch(venv, "9.9.9", "auto")
    assert venv.installed_torch() == "9.9.9+cpu"
    assert "the CPU build that pip's configuration offers" in capsys.readouterr().out


def test_pytorchs_index_comes_second(
    setup: Any, venv: Any, index: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "PYTORCH_CPU_INDEX", index)
    setup.install_torch(venv, "9.9.9", "auto")
    assert venv.installed_torch() == "9.9.9+cpu"
    assert "from PyTorch's own index" in capsys.readouterr().out


def test_silent_index_costs_seconds(
    setup: Any, venv: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It accepts the connection and says nothing: the default build is announced, and TORCH=cpu is an error."""
    monkeypatch.setattr(setup, "CONNECT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(setup, "PYTORCH_CPU_INDEX", f"http://127.0.0.1:{silent.getsockname()[1]}/cpu")
        start = time.monotonic()
        assert not setup.pytorch_index_answers()
        assert time.monotonic() - start < 5  # a bound, not a speed
        setup.install_torch(venv, "9.9.9", "auto")
        assert "PIP_FIND_LINKS=FOLDER" in capsys.readouterr().out
        assert venv.installed_torch() == ""  # pip takes it from the default index with the rest
        with pytest.raises(setup.SetupError, match="no CPU build of torch 9\\.9\\.9"):
            setup.install_torch(venv, "9.9.9", "cpu")


def test_gpu_or_wish_takes_the_default_index(
    setup: Any, venv: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wheel(tmp_path / "wheels", "9.9.9+cpu")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    setup.install_torch(venv, "9.9.9", "cuda")
    monkeypatch.setattr(setup, "has_gpu", lambda: True)
    setup.install_torch(venv, "9.9.9", "auto")
    assert venv.installed_torch() == ""
    assert "NVIDIA" in capsys.readouterr().out


def test_finished_environment_is_left_alone_until_its_sources_change(
    setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled = []
    monkeypatch.setattr(setup, "fill_agent", lambda venv, mode: filled.append(mode))
    monkeypatch.setattr(setup.Venv, "installed_torch", lambda self: "")
    folder = tmp_path / "venv"
    setup.ensure("agent", folder, "auto")
    setup.ensure("agent", folder, "auto")
    assert filled == ["auto"]
    pins = tmp_path / "constraints.txt"
    pins.write_text(setup.CONSTRAINTS.read_text() + "another==1\n")
    monkeypatch.setattr(setup, "CONSTRAINTS", pins)
    setup.ensure("agent", folder, "auto")
    setup.ensure("agent", folder, "cpu")
    assert filled == ["auto", "auto", "cpu"]


def test_pip_failure_is_told_in_its_words(setup: Any, venv: Any) -> None:
    with pytest.raises(setup.SetupError, match="No matching distribution found for no-such-thing"):
        venv.pip_install("no-such-thing", what="installing no-such-thing")
