"""What keeps an agent from starting is said in one line, with an exit status that systemd understands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.live import start_live, write_config
from harness.processes import Processes
from harness.swarm import PETALS_AGENT, start_bootstrap

from .conftest import Swarm


def run(config: Path) -> subprocess.CompletedProcess[str]:
    command = [*PETALS_AGENT, "run", "--config", str(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, stdin=subprocess.DEVNULL)


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr and "petals-agent: " in done.stderr


def test_identity_of_another_local_agent(swarm: Swarm, tmp_path: Path, tiny_llama: Path) -> None:
    swarm.first.until(lambda status: True, 30, "an answer")
    more = f'[swarm]\nidentity = "{swarm.first.identity}"'
    refused(
        run(write_config(tmp_path / "a", tiny_llama, "0:8", [], more)),
        78,
        "another agent on this host runs with the identity",
        str(swarm.first.identity),
    )


def test_control_socket_of_another_agent(swarm: Swarm, tmp_path: Path, tiny_llama: Path) -> None:
    swarm.first.until(lambda status: True, 30, "an answer")
    more = f'[control]\nsocket = "{swarm.first.socket}"'
    refused(run(write_config(tmp_path / "a", tiny_llama, "0:8", [], more)), 69, "another agent answers on")
    assert swarm.first.status()


def test_identity_that_is_live_on_another_host(
    processes: Processes, tmp_path: Path, tiny_llama: Path
) -> None:
    """The other host is a folder with a copy of the key, so that no lock tells."""
    maddr = start_bootstrap(processes)
    other = start_live(processes, tmp_path / "b", tiny_llama, "0:4", [maddr])
    other.until(lambda status: status["network"] == "connected", 60, "connected")
    config = write_config(tmp_path / "a", tiny_llama, "0:8", [maddr])
    copy = tmp_path / "a" / "state" / "id.key"
    copy.parent.mkdir()
    copy.write_bytes(other.identity.read_bytes())
    refused(run(config), 78, "another live peer of this swarm uses the identity", other.status()["peer_id"])
    assert not list((tmp_path / "a" / "run").iterdir())


@pytest.mark.parametrize("content", [b"", b"garbage", os.urandom(1200)], ids=["empty", "text", "bytes"])
def test_identity_that_is_no_key(tmp_path: Path, tiny_llama: Path, content: bytes) -> None:
    config = write_config(tmp_path / "a", tiny_llama, "0:8", [])
    key = tmp_path / "a" / "state" / "id.key"
    key.parent.mkdir()
    key.write_bytes(content)
    refused(run(config), 69, f"{key} holds no libp2p key", "move it away")
    assert key.read_bytes() == content


@pytest.mark.parametrize(
    ("table", "words"), [("[swarm]\nidentity", "the identity"), ("[control]\nsocket", "the control socket")]
)
def test_folder_that_cannot_be(tmp_path: Path, tiny_llama: Path, table: str, words: str) -> None:
    (tmp_path / "file").write_text("in the way")
    more = f'{table} = "{tmp_path}/file/x"'
    refused(run(write_config(tmp_path / "a", tiny_llama, "0:8", [], more)), 69, words, str(tmp_path / "file"))


def test_full_disk(tmp_path: Path) -> None:
    """Stood for by a limit of 0 bytes a file."""
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from petals_agent.swarm.identity import ensure_identity\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "try: ensure_identity(Path(sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    key = tmp_path / "state" / "id.key"
    command = [sys.executable, "-c", program, str(key)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(f"SwarmError the identity {key} cannot be used"), done.stderr
    assert not list(key.parent.iterdir())


def test_socket_folder_with_a_long_name(tmp_path: Path, tiny_llama: Path) -> None:
    more = f'[control]\nsocket = "/tmp/{"x" * 90}/c.sock"'
    config = write_config(tmp_path / "a", tiny_llama, "0:8", [], more)
    refused(run(config), 78, "control.socket", "too long", str(config))


def test_model_of_which_no_block_fits(bootstrap: str, tmp_path: Path, tiny_llama: Path) -> None:
    more = '[serve]\nnum_blocks = "auto"\ncache_tokens = 2147483647'
    done = run(write_config(tmp_path / "a", tiny_llama, "auto", [bootstrap], more))
    refused(done, 65, "one block with 2147483647 tokens of cache needs", "GB are free", "serve.cache_tokens")
