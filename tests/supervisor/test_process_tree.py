"""What an agent costs its host, and what its children may do."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import psutil

from harness.live import LiveAgent, write_config
from harness.processes import Processes, pss_mb, python_count
from harness.swarm import ONE_THREAD, PETALS_AGENT

from .conftest import Swarm


def test_two_interpreters_and_one_torch(swarm: Swarm) -> None:
    status = swarm.first.online()
    tree = swarm.first.family()
    assert python_count(tree) == 2
    others = {process.name() for process in tree if process.pid not in status["pids"].values()}
    assert others <= {"p2pd"}  # the one that looks whether a peer can be dialled, for some seconds
    agent = psutil.Process(status["pids"]["agent"])
    assert pss_mb([agent]) < 150
    assert "torch" not in Path(f"/proc/{agent.pid}/maps").read_text()
    assert "torch" in Path(f"/proc/{status['pids']['container']}/maps").read_text()  # so it would be seen


def test_children_may_open_many_files(swarm: Swarm) -> None:
    pids = swarm.first.online()["pids"]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for name in ("container", "p2pd"):
        limits = Path(f"/proc/{pids[name]}/limits").read_text().splitlines()
        soft = next(line.split()[3] for line in limits if line.startswith("Max open files"))
        assert soft == str(hard) or soft == "unlimited"


def test_sockets_lie_beside_the_control_socket(swarm: Swarm) -> None:
    swarm.first.online()
    names = {path.name.split("-")[0] for path in swarm.first.socket.parent.iterdir()}
    assert names == {"c.sock", "p2pclient", "p2pd"}


def test_importing_the_agent_loads_no_torch() -> None:
    program = (
        "import sys, petals_agent.supervisor.agent\n"
        "torch = sys.modules.get('torch')\n"
        "print(torch is None or torch.__version__ == '0', 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_code_in_the_current_folder_is_not_run(
    processes: Processes, bootstrap: str, tmp_path: Path, tiny_llama: Path
) -> None:
    for name in ("torch", "numpy", "hivemind", "uvloop"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of a stranger')")
    config = write_config(tmp_path / "a", tiny_llama, "0:1", [bootstrap])
    command = [*PETALS_AGENT, "run", "--config", config]
    process = processes.start("agent", command, cwd=tmp_path, env=ONE_THREAD, grace=20)
    LiveAgent(process, config).online()
