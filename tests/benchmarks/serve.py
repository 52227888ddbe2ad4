"""Ours, the published Petals and in-process transformers side by side, in one run on one machine.

    serve.py [--json] [--quick] [--servers ours,stock] [--rounds 3]

Both servers hold all blocks of the tiny model in one swarm and are driven by the same client (load.py) in turns, A B
A B; a ratio is the median of the turns' ratios, so that what else the machine does hits both. One wrong answer voids
the figure, and the exit status is 1. `--json` prints one object on standard output; progress goes to standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from load import Load, Void, Work, cpu_seconds
from report import summary, table

from harness import swarm
from harness.processes import Process, Processes, pss_mb, python_count

HERE = Path(__file__).resolve().parent
BLOCKS = "0:8"
START_TIMEOUT_S = 120.0
IDLE_S = 3.0
SHORT = 4  # few sessions are over soon: this many sessions' worth of turns in a round
CALLS = 5  # forward and backward calls to each server in a round


@dataclass
class Contender:
    """One server under test, and what was measured of it."""

    name: str
    kind: str  # "ours" or "stock"
    prefix: str = ""  # in the DHT; new for each start, so that no record of an earlier one is mistaken for it
    process: Process | None = None
    peer: Any = None
    starts: list[float] = field(default_factory=list)
    sessions: dict[str, list[dict[str, Any] | None]] = field(default_factory=dict)  # by number; None: void
    training: dict[str, list[float | None]] = field(default_factory=dict)  # "forward", "backward": tokens/s
    footprint: dict[str, float] = field(default_factory=dict)

    def launch(self, processes: Processes, folder: Path, model: Path, maddr: str) -> Process:
        """Start it as a member of the swarm at `maddr`."""
        if self.kind == "ours":
            return swarm.start_agent(
                processes, folder / self.prefix, model, BLOCKS, [maddr], prefix=self.prefix
            ).process
        python = swarm.peer_python()
        if python is None:
            raise SystemExit(
                "the published Petals is not installed: run `make peer-venv` (or set PETALS_PEER_PYTHON)"
            )
        return swarm.start_stock_server(processes, python, model, BLOCKS, [maddr], prefix=self.prefix).process

    def tree(self) -> list[psutil.Process]:
        """All its live processes."""
        return self.process.tree() if self.process else []

    def pids(self) -> dict[str, list[int]]:
        """Its process ids, p2pd apart."""
        found: dict[str, list[int]] = {"server": [], "server p2pd": []}
        for process in self.tree():
            found["server p2pd" if process.name().startswith("p2pd") else "server"].append(process.pid)
        return found


def contenders(kinds: str) -> list[Contender]:
    """Parse "ours,stock"; a kind that is named twice gets numbered names."""
    found: list[Contender] = []
    for kind in kinds.split(","):
        if kind not in ("ours", "stock"):
            raise SystemExit(f"--servers {kinds}: {kind!r} is neither ours nor stock")
        before = sum(one.kind == kind for one in found)
        found.append(Contender(f"{kind}{before + 1}" if before else kind, kind))
    return found


def say(text: str) -> None:
    """Progress, kept apart from the result."""
    print(text, file=sys.stderr, flush=True)


def run_local(model: Path, *options: str | Path) -> str:
    """Run local.py to its end; returns its standard output."""
    env = {**os.environ, **swarm.ONE_THREAD, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, HERE / "local.py", model, *options]
    done = subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        raise SystemExit(f"local.py failed:\n{done.stderr}")
    return done.stdout


class Bench:
    """One benchmark run: starts, rounds, footprints."""

    def __init__(self, args: argparse.Namespace, processes: Processes, folder: Path) -> None:
        self.args, self.processes, self.folder = args, processes, folder
        self.model = folder / "model"
        self.servers = contenders(args.servers)
        self.in_process: list[dict[str, float]] = []
        self.void: list[str] = []

    async def run(self) -> dict[str, Any]:
        """Measure everything; the result is ready for `table` and JSON."""
        writer = self.processes.run(
            "model", [sys.executable, swarm.PEER_SCRIPTS / "model.py", self.model], timeout=120
        )
        assert writer.returncode == 0, writer.output()
        say("computing the right answers")
        most = max(map(int, self.args.sessions.split(",")))
        shape = ["--sessions", str(most), "--steps", str(self.args.steps), "--batch", self.args.batch]
        run_local(self.model, "--answers", self.folder / "answers.npz", *shape)
        self.maddr = swarm.start_bootstrap(self.processes)
        blocks = int(BLOCKS.partition(":")[2])
        self.load = await Load.connect([self.maddr], Work.read(self.folder / "answers.npz"), blocks)
        try:
            await self._starts()
            for server in self.servers:  # the first calls are slower
                await self._inference(server, 1)
                await self._training(server, "forward")
                server.sessions.clear()
                server.training.clear()
            for number in range(self.args.rounds):
                await self._round(number)
            await self._footprints()
        finally:
            await self.load.close()
        settings = {name: getattr(self.args, name) for name in ("rounds", "starts", "steps", "batch")}
        return summary(self.servers, self.in_process, self.void, settings)

    async def _starts(self) -> None:
        for number in range(self.args.starts):
            for server in self.servers:
                server.prefix = f"{server.name}-{number}"
                server.process = server.launch(self.processes, self.folder, self.model, self.maddr)
                try:
                    server.peer = await self.load.online(server.prefix, START_TIMEOUT_S)
                except TimeoutError as error:
                    raise SystemExit(f"{error}\n{server.process.output()}") from None
                server.starts.append(time.monotonic() - server.process.started)
                say(f"{server.name}: ONLINE {server.starts[-1]:.1f} s after its start")
                if number + 1 < self.args.starts:
                    await asyncio.to_thread(server.process.terminate)

    async def _round(self, number: int) -> None:
        for count in map(int, self.args.sessions.split(",")):
            for _ in range(max(1, SHORT // count)):
                for server in self.servers:
                    await self._inference(server, count)
        for kind in ("forward", "backward"):
            for _ in range(CALLS):
                for server in self.servers:
                    await self._training(server, kind)
        rates = ["--rates", self.args.sessions, "--steps", str(self.args.steps)]
        self.in_process.append(json.loads(run_local(self.model, *rates))["rates"])
        for server in self.servers:
            last = {
                count: turns[-1] and round(turns[-1]["steps_s"]) for count, turns in server.sessions.items()
            }
            say(f"round {number + 1}: {server.name} steps/s by sessions {last}")

    async def _inference(self, server: Contender, count: int) -> None:
        turns = server.sessions.setdefault(str(count), [])
        try:
            turns.append(await self.load.inference(server.peer, server.prefix, count, server.pids()))
        except Void as error:
            turns.append(None)
            self._voided(f"{server.name}, {count} sessions: {error}")

    async def _training(self, server: Contender, kind: str) -> None:
        rates = server.training.setdefault(kind, [])
        try:
            rates.append(await self.load.training(server.peer, server.prefix, kind))
        except Void as error:
            rates.append(None)
            self._voided(f"{server.name}: {error}")

    def _voided(self, why: str) -> None:
        say(f"VOID: {why}")
        self.void.append(why)

    async def _footprints(self) -> None:
        before = {
            server.name: cpu_seconds([process.pid for process in server.tree()]) for server in self.servers
        }
        await asyncio.sleep(IDLE_S)
        for server in self.servers:
            tree = server.tree()
            spent = cpu_seconds([process.pid for process in tree]) - before[server.name]
            server.footprint = {
                "python_processes": python_count(tree),
                "pss_mb": round(pss_mb(tree), 1),
                "idle_cpu_percent": round(100 * spent / IDLE_S, 1),
            }


def parse() -> argparse.Namespace:
    """Command line; --quick changes the defaults of what takes time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on standard output instead of the table"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one short round: shows that it works, not how fast"
    )
    parser.add_argument("--servers", default="ours,stock", help="the first is the one whose ratio is given")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--starts", type=int, default=2, help="timed starts of each server")
    parser.add_argument("--sessions", default="1,4,16,64", help="numbers of sessions at once")
    parser.add_argument("--steps", type=int, default=60, help="timed steps of each session")
    parser.add_argument("--batch", default="4x256", help="sequences × tokens of forward and backward")
    if "--quick" in sys.argv:
        parser.set_defaults(rounds=1, starts=1, steps=10)
    return parser.parse_args()


def main() -> int:
    """Command line; returns the exit status."""
    args = parse()
    with tempfile.TemporaryDirectory(prefix="petals-agent-bench-") as name:
        processes = Processes(Path(name) / "logs")
        try:
            result = uvloop.run(Bench(args, processes, Path(name)).run())
        finally:
            processes.close()
    print(json.dumps(result) if args.json else table(result))
    return int(bool(result["void"]))


if __name__ == "__main__":
    sys.exit(main())
