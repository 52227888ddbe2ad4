"""The servers that the tests here share; a route names them in order: "stock 0:4 + ours 4:8"."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.live import all_gone, ask
from harness.processes import Process, Processes, wait_until
from harness.swarm import (
    PREFIX,
    AgentServer,
    StockServer,
    start_agent,
    start_bootstrap,
    start_stock_client,
    start_stock_server,
    stock_result,
)
from petals_agent.client.generate import Client
from petals_agent.client.network import ClientOptions

OURS = ("ours 0:8", "ours 0:4 + ours 4:8", "stock 0:4 + ours 4:8", "ours 0:4 + stock 4:8")
ROUTES = (*OURS, "stock 0:4 + stock 4:8")
IDS = [5, 17, 99, 314, 271, 828, 182, 845]  # a prompt; what generate.py uses too
ONE_HANDLER = ("--handlers", "1")  # with several, one may not know yet of another's session that is pushed to


@dataclass(frozen=True)
class Member:
    """A server: `name` is its maker and its blocks, e.g. "ours 0:4"."""

    name: str
    server: AgentServer | StockServer

    @property
    def process(self) -> Process:
        return self.server.process

    @cached_property
    def peer_id(self) -> str:
        """Known once it is online."""
        server = self.server
        return server.peer_id if isinstance(server, StockServer) else str(self.status()["peer_id"])

    @property
    def blocks(self) -> tuple[int, int]:
        """The span [start, end) that it serves."""
        start, end = self.name.split()[1].split(":")
        return int(start), int(end)

    def status(self) -> Mapping[str, Any]:
        """What one of ours says about itself; empty while it does not answer."""
        assert isinstance(self.server, AgentServer)
        answer = ask(self.server.config.parent / "run" / "control.sock", b'{"do": "status"}')
        return dict(answer.get("result", {}))

    def until(self, condition: Callable[[Mapping[str, Any]], Any], what: str, timeout: float = 15) -> None:
        """Wait until the status of one of ours fulfils `condition`."""

        def fulfilled() -> bool:
            status = self.status()
            return bool(status) and bool(condition(status))

        wait_until(fulfilled, timeout, f"{self.name}: {what}")

    def kill(self) -> None:
        """SIGKILL, for one of ours to the agent alone, whose children must follow it by themselves."""
        family = self.process.tree()
        if isinstance(self.server, StockServer):
            os.killpg(self.process.pid, signal.SIGKILL)
        else:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        wait_until(lambda: all_gone(family), 10, f"the end of all processes of {self.name}")


class Swarm:
    """One bootstrap node, one server of each name in ROUTES, and those that a test adds to lose them."""

    def __init__(self, folder: Path, model: Path, python: Path) -> None:
        self.processes = Processes(folder / "logs")
        self.model = model
        self._folder = folder
        self._python = python
        self._started: list[Member] = []
        self.maddr = start_bootstrap(self.processes)
        names = sorted({name for route in ROUTES for name in route.split(" + ")})
        self._members = {name: self.launch(name) for name in names}
        for member in self._members.values():
            member.server.wait_online(180)

    def launch(self, name: str) -> Member:
        """Start one more server; several can start at once."""
        maker, blocks = name.split()
        server: AgentServer | StockServer
        if maker == "ours":
            folder = self._folder / f"agent{len(self._started)}"
            server = start_agent(self.processes, folder, self.model, blocks, [self.maddr])
        else:
            server = start_stock_server(
                self.processes, self._python, self.model, blocks, [self.maddr], options=ONE_HANDLER
            )
        self._started.append(Member(name, server))
        return self._started[-1]

    def close(self) -> None:
        """End all processes."""
        self.processes.close()

    def __getitem__(self, name: str) -> Member:
        return self._members[name]

    def route(self, route: str) -> list[Member]:
        """The servers of "A + B"; none for an empty text."""
        return [self[name] for name in route.split(" + ") if name]

    @property
    def agents(self) -> list[Member]:
        """Ours, but for those that a test has added."""
        return [member for member in self._members.values() if member.name.startswith("ours")]

    def check_calm(self) -> None:
        """No session is left at our servers, their caches are empty, and nothing went wrong in them."""
        for agent in self.agents:
            agent.until(
                lambda status: (status["sessions"], status["in_flight"], status["cache_used"]) == (0, 0, 0),
                "no sessions and an empty cache",
            )
            log = agent.process.err.read_text(errors="replace")
            assert "Traceback" not in log and " ERROR " not in log, f"{agent.name}\n{log[-5000:]}"

    # --- clients

    def client(self) -> Client:
        """A client of ours."""
        client = Client(str(self.model), [self.maddr], PREFIX, options=ClientOptions(request_timeout=60))
        client.end_tokens = set()  # random weights may emit one at any time
        return client

    def steer(self, client: Client, members: Iterable[Member]) -> None:
        """Make a client of ours use these servers and no others, as if the others had just failed."""
        wanted = {member.peer_id for member in members}
        for peer_id in {member.peer_id for member in self._started}:
            client.network.bans.succeeded(peer_id)
            if peer_id not in wanted:
                for _ in range(5):  # each doubles the time: four minutes
                    client.network.bans.failed(peer_id)

    def published_client(self, members: Iterable[Member], *options: str) -> Process:
        """Start the published client, which will use no other servers than these."""
        via = ["--via", *(member.peer_id for member in members)]
        return start_stock_client(self.processes, self._python, self.model, [self.maddr], *via, *options)

    def published_result(self, members: Iterable[Member], *options: str) -> dict[str, Any]:
        """Run the published client to its end; its JSON."""
        return stock_result(self.published_client(members, *options))
