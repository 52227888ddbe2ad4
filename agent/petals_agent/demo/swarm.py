"""A private swarm on this host: an entry node and two agents, each with half of the model, as processes of their own."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from petals_agent.errors import AgentError, SwarmError
from petals_agent.processes import child_environment, die_with_parent
from petals_agent.supervisor.control import ask

MODEL = Path(__file__).parent / "model"
PREFIX = "petals-agent-demo"
HALVES = ("0:4", "4:8")
_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 10.0

_CONFIG = """\
[model]
path = "{model}"
dht_prefix = "{prefix}"
dtype = "float32"
[swarm]
initial_peers = {peers}
listen = ["/ip4/127.0.0.1/tcp/0"]
identity = "{name}/id.key"
update_period = 30
reachability = "off"
[serve]
blocks = "{blocks}"
device = "cpu"
[balance]
enabled = false
[control]
socket = "{name}/control.sock"
[log]
level = "info"
"""


class DemoSwarm:
    """A context manager: the swarm is online inside, and gone after. `maddrs` is where it can be joined."""

    def __init__(self, say: Callable[[str], None], meanwhile: Callable[[], None]) -> None:
        """`say` is told of each member; `meanwhile` runs in a thread while the members load."""
        self._say = say
        self._meanwhile = meanwhile
        self._folder = tempfile.TemporaryDirectory(prefix="petals-agent-demo-")
        self._processes: list[subprocess.Popen[bytes]] = []
        self.maddrs: list[str] = []

    @property
    def folder(self) -> Path:
        return Path(self._folder.name)

    def config_of(self, agent: int) -> Path:
        return self.folder / f"agent{agent}.toml"

    def __enter__(self) -> DemoSwarm:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _start(self) -> None:
        started = time.monotonic()
        listen = "--listen=/ip4/127.0.0.1/tcp/0"
        entry = self._run("entry", "bootstrap", "--json", listen, f"--identity={self.folder / 'entry.key'}")
        assert entry.stdout is not None
        line = entry.stdout.readline()
        if not line:
            raise SwarmError(f"the entry node did not start: {self._last_words('entry')}")
        self.maddrs = json.loads(line)["maddrs"]
        self._say(f"entry node at {self.maddrs[0]}")
        for number, blocks in enumerate(HALVES):
            name = f"agent{number}"
            (self.folder / name).mkdir()
            text = _CONFIG.format(
                model=MODEL, prefix=PREFIX, peers=json.dumps(self.maddrs), name=name, blocks=blocks
            )
            self.config_of(number).write_text(text)
            self._run(name, "run", f"--config={self.config_of(number)}")
        work = threading.Thread(target=self._meanwhile, name="meanwhile")
        work.start()  # not before the last fork
        for number, blocks in enumerate(HALVES):
            self._wait_online(number, started)
            self._say(f"agent {number + 1} serves blocks {blocks} after {time.monotonic() - started:.1f} s")
        work.join()

    def _run(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        log = open(self.folder / f"{name}.log", "wb")
        process = subprocess.Popen(
            [sys.executable, "-m", "petals_agent.cli.main", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if name == "entry" else log,
            stderr=log,
            env=child_environment({"TOKENIZERS_PARALLELISM": "false"}),
            preexec_fn=die_with_parent(),
            process_group=0,  # our Ctrl-C is not theirs: we end them in order
        )
        log.close()
        self._processes.append(process)
        return process

    def _wait_online(self, number: int, started: float) -> None:
        socket = self.folder / f"agent{number}" / "control.sock"
        while time.monotonic() - started < _START_TIMEOUT_S:
            for process in self._processes:
                if process.poll() is not None:
                    raise SwarmError(f"a process of the demo ended: {self._last_words(f'agent{number}')}")
            try:
                status: dict[str, Any] = asyncio.run(ask(socket, {"do": "status"}))
            except AgentError:
                status = {}
            if status.get("state") == "online":
                return
            time.sleep(0.05)
        raise SwarmError(
            f"agent {number + 1} was not online after {_START_TIMEOUT_S:g} s: {self._last_words(f'agent{number}')}"
        )

    def _last_words(self, name: str) -> str:
        lines = (self.folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def _stop(self) -> None:
        for process in reversed(self._processes):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._folder.cleanup()
