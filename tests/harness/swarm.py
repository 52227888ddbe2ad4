"""Start the members of a test swarm: a bootstrap node, our servers, published Petals servers and client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.processes import Process, Processes, wait_until

TESTS = Path(__file__).resolve().parent.parent
PEER_SCRIPTS = TESTS / "interop" / "peer"
PREFIX = "tiny"  # the DHT prefix of the test model
PETALS_AGENT = [str(Path(sys.executable).with_name("petals-agent"))]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def peer_python() -> Path | None:
    """The Python that has the published Petals: PETALS_PEER_PYTHON, or .venv-petals in the checkout."""
    given = os.environ.get("PETALS_PEER_PYTHON")
    python = Path(given) if given else TESTS.parent / ".venv-petals" / "bin" / "python"
    return python if python.exists() else None


def start_bootstrap(processes: Processes) -> str:
    """A DHT node on loopback; returns its multiaddress."""
    node = processes.start("bootstrap", [sys.executable, TESTS / "harness" / "dht_node.py"])
    return str(node.wait_event("listening", 60)["maddrs"][0])


def start_entry(processes: Processes, folder: Path) -> str:
    """An entry node of ours with its files in `folder`; returns its multiaddress."""
    command = [*PETALS_AGENT, "bootstrap", "--listen", "/ip4/127.0.0.1/tcp/0", "--json"]
    folders = {"STATE_DIRECTORY": str(folder), "RUNTIME_DIRECTORY": str(folder / "run")}
    entry = processes.start("entry", command, env=folders)
    wait_until(entry.events, 60, "the entry node's address")
    return str(entry.events()[0]["maddrs"][0])


@dataclass
class StockServer:
    """A published Petals server, possibly still starting."""

    process: Process
    blocks: str

    def wait_online(self, timeout: float = 120) -> StockServer:
        """Wait until its blocks are announced as ONLINE."""
        self.process.wait_event("online", timeout)
        return self

    @property
    def maddr(self) -> str:
        """Where it can be joined; it needs no bootstrap node of its own."""
        return str(self.process.wait_event("listening", 120)["maddrs"][0])

    @property
    def peer_id(self) -> str:
        return self.maddr.rsplit("/", 1)[1]


def start_stock_server(
    processes: Processes,
    python: Path,
    model: Path,
    blocks: str,
    peers: Sequence[str] = (),
    *,
    prefix: str = PREFIX,
    options: Sequence[str] = (),
) -> StockServer:
    """Start serving `blocks` ("0:4") with the published server; several can start at once.

    At the end it is killed: its orderly stop takes longer than 10 s.
    """
    command = [python, PEER_SCRIPTS / "serve.py", model, "--prefix", prefix, "--blocks", blocks, *options]
    if peers:
        command += ["--peers", *peers]
    process = processes.start(f"stock-{blocks.replace(':', '-')}", command, env=ONE_THREAD, grace=0)
    return StockServer(process, blocks)


AGENT_CONFIG = """
[model]
path = "{model}"
dht_prefix = "{prefix}"
dtype = "float32"
[swarm]
initial_peers = {peers}
listen = ["/ip4/127.0.0.1/tcp/0"]
identity = "state/id.key"
update_period = 30
[serve]
blocks = "{blocks}"
device = "cpu"
throughput = 1.0
[balance]
enabled = false
[control]
socket = "run/control.sock"
"""


@dataclass
class AgentServer:
    """A `petals-agent run`, possibly still starting."""

    process: Process
    config: Path

    def status(self) -> dict[str, Any]:
        """What `petals-agent status --json` says; empty while it does not answer."""
        command = [*PETALS_AGENT, "status", "--json", "--config", str(self.config)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
        return dict(json.loads(done.stdout)) if done.returncode == 0 else {}

    def wait_online(self, timeout: float = 60) -> AgentServer:
        """Wait until it says that it is online; fails with its output if it ends or takes longer."""

        def online() -> bool:
            code = self.process.returncode
            assert code is None, f"{self.process.name} ended with {code}\n{self.process.output()}"
            return self.status().get("state") == "online"

        try:
            wait_until(online, timeout, f"{self.process.name} to be online")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.process.output()}") from None
        return self


def start_agent(
    processes: Processes,
    folder: Path,
    model: Path,
    blocks: str,
    peers: Sequence[str] = (),
    *,
    prefix: str = PREFIX,
) -> AgentServer:
    """Write the configuration of a private swarm's server into `folder` and start serving `blocks`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "petals-agent.toml"
    config.write_text(
        AGENT_CONFIG.format(model=model, prefix=prefix, peers=json.dumps(list(peers)), blocks=blocks)
    )
    process = processes.start(f"agent-{blocks.replace(':', '-')}", [*PETALS_AGENT, "run", "--config", config])
    return AgentServer(process, config)


def start_stock_client(
    processes: Processes, python: Path, model: Path, peers: Sequence[str], *options: str, prefix: str = PREFIX
) -> Process:
    """Start the published client (generate.py)."""
    command = [python, PEER_SCRIPTS / "generate.py", model, "--prefix", prefix, "--peers", *peers, *options]
    return processes.start("stock-client", command, env=ONE_THREAD)


def start_steady_stock(
    processes: Processes, python: Path, model: Path, peers: Sequence[str], until: Path, *options: str
) -> Process:
    """Start the published client that generates text after text until a file appears (steady.py); its last event is "end"."""
    command = [python, PEER_SCRIPTS / "steady.py", model, "--prefix", PREFIX, "--peers", *peers]
    command += ["--until", until, *options]
    # killed at the end: hivemind's threads may keep the interpreter from ending
    return processes.start("steady-stock", command, env=ONE_THREAD, grace=0)


def stock_result(client: Process, timeout: float = 110) -> dict[str, Any]:
    """Wait for the published client's end and return its JSON; a difference under --check fails."""
    client.wait(timeout)
    results = client.events()
    assert client.returncode == 0 and results, f"the published client failed\n{client.output()}"
    return results[-1]


def stock_generate(
    processes: Processes, python: Path, model: Path, peers: Sequence[str], *options: str, prefix: str = PREFIX
) -> dict[str, Any]:
    """Run the published client to its end and return its JSON; a difference under --check fails."""
    return stock_result(start_stock_client(processes, python, model, peers, *options, prefix=prefix))
