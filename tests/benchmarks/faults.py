"""What each fault costs: noticed after, announced meanwhile, outage of a new session. One after the other, on the tiny model.

    faults.py [--json] [--only WORDS] [--watchdog 30] [--no-stock]

A probe opens a new session each 0.3 s and compares its answer with the right one. The published Petals server, where it
is installed, runs under a restart loop and gets those faults that it has parts for; it is watched for --patience seconds.
The exit status is 1 when a fault was not survived.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "interop" / "peer"))

from harness.hurt import FAULTS, HIDDEN, QUICK, Outcome, measure, online, start_victim
from harness.live import write_config
from harness.peer import Peer, chain
from harness.processes import Process, Processes, wait_until
from harness.swarm import PREFIX, StockServer, peer_python, start_bootstrap, start_stock_server
from harness.unit import Unit, hurt_agent
from harness.watch import STATES, Watch

AGENT = {"agent killed": signal.SIGKILL, "agent stopped": signal.SIGSTOP}
STOCK = {
    "p2pd killed": ("p2pd", signal.SIGKILL),
    "p2pd stopped": ("p2pd", signal.SIGSTOP),
    "main killed": ("main", signal.SIGKILL),
    "main stopped": ("main", signal.SIGSTOP),
}
RESTART_S = 1.0
ONLINE = 2
IDENTITY = "stock.key"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Bench:
    """Each fault gets a server of its own."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        from model import write_model  # imports torch and transformers

        self.args, self.folder = args, folder
        self.model = Path(write_model(folder / "tiny"))
        self.count = 0

    def run(self) -> dict[str, Any]:
        """Everything that was asked for."""
        result: dict[str, Any] = {"ours": [], "stock": [], "failed": []}
        for name, one in (*self._ours(), *self._stock()):
            if self.args.only and self.args.only not in name:
                continue
            self.count += 1
            processes = Processes(self.folder / f"logs{self.count}")
            try:
                maddr = start_bootstrap(processes)
                with Peer([maddr]) as peer:
                    outcome = one(processes, self.folder / f"a{self.count}", maddr, peer)
                say(f"{name}: {outcome.text}")
                kind = "stock" if name.startswith("stock") else "ours"
                figures = asdict(outcome)
                figures["outage"] = outcome.outage if outcome.outage != float("inf") else None  # for good
                result[kind].append(figures)
            except AssertionError as error:
                say(f"{name}: FAILED: {str(error)[:2000]}")
                result["failed"].append(name)
            finally:
                processes.close()
        return result

    def _ours(self) -> Iterator[tuple[str, Callable[..., Outcome]]]:
        for fault in FAULTS:

            def one(
                processes: Processes, folder: Path, maddr: str, peer: Peer, fault: Any = fault
            ) -> Outcome:
                return measure(online(start_victim(processes, folder, self.model, maddr, peer)), fault)

            yield f"ours, {fault.name}", one
        for name, number in AGENT.items():

            def other(
                processes: Processes,
                folder: Path,
                maddr: str,
                peer: Peer,
                name: str = name,
                number: int = number,
            ) -> Outcome:
                config = write_config(folder, self.model, "0:8", [maddr], QUICK)
                with Unit(processes, config, self.args.watchdog) as service:
                    try:
                        return hurt_agent(service, peer, name, number)
                    finally:
                        service.restart = False

            yield f"ours, {name}", other

    def _stock(self) -> Iterator[tuple[str, Callable[..., Outcome]]]:
        python = None if self.args.no_stock else peer_python()
        if python is None:
            say("published Petals: left out")
            return
        for name, (part, number) in STOCK.items():

            def one(
                processes: Processes,
                folder: Path,
                maddr: str,
                peer: Peer,
                name: str = name,
                part: str = part,
                number: int = number,
                python: Path = python,
            ) -> Outcome:
                folder.mkdir()
                options = ("--identity", str(folder / IDENTITY), "--update-period", "2")

                def start() -> StockServer:
                    return start_stock_server(processes, python, self.model, "0:8", [maddr], options=options)

                return self._hurt_stock(start, peer, name, part, number)

            yield f"stock, {name}", one

    def _hurt_stock(
        self, start: Callable[[], StockServer], peer: Peer, name: str, part: str, number: int
    ) -> Outcome:
        server = start().wait_online()
        peer_id = server.peer_id
        wait_until(lambda: peer.state(peer_id, f"{PREFIX}.0") == ONLINE, 60, "the record of the stock server")
        right = peer.step(peer_id, chain(0, 8), HIDDEN)
        with Watch(peer, peer_id, HIDDEN, right) as seen:
            seen.until(lambda: seen.calm_since(0), 60, "calm")
            began = time.time()
            os.kill(_part(server.process, part), number)
            noticed: float | None = None
            while time.time() - began < self.args.patience:
                if server.process.returncode is not None and noticed is None:
                    noticed = time.time() - began
                    server.process.kill()  # what is left of the group, as systemd would
                    time.sleep(RESTART_S)
                    server = start()
                if seen.calm_since(began + 5.0):
                    break
                time.sleep(0.05)
            vain, sessions = seen.vain(began)
            return Outcome(
                fault=name,
                noticed=noticed,
                withdrawn=seen.not_online_after(began),
                outage=seen.outage(began),
                vain=vain,
                sessions=sessions,
                wrong=sum(attempt.wrong for attempt in seen.attempts),
                announced=f"{seen.story(began)} (at the end {STATES[seen.state]})",
                steps=[],
                lost="sessions",
            )


def _part(process: Process, part: str) -> int:
    if part == "main":
        return process.pid
    daemons = [child for child in psutil.Process(process.pid).children(True) if child.name() == "p2pd"]
    return next(
        daemon.pid for daemon in daemons if IDENTITY in " ".join(daemon.cmdline())
    )  # there are others


def table(result: dict[str, Any]) -> str:
    """For the README."""
    lines = [
        "| fault | noticed in, s | announced meanwhile | outage of a new session, s | lost |",
        "|---|---|---|---|---|",
    ]
    for kind in ("ours", "stock"):
        for one in result[kind]:
            name = one["fault"] if kind == "ours" else f"published Petals: {one['fault']}"
            noticed = "never" if one["noticed"] is None else f"{one['noticed']:.1f}"
            outage = f"{one['outage']:.1f}" if one["outage"] is not None else "for good"
            lines.append(f"| {name} | {noticed} | {one['announced']} | {outage} | {one['lost']} |")
    return "\n".join([*lines, *(f"FAILED: {name}" for name in result["failed"])])


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, no table")
    parser.add_argument("--only", default="", help="only faults whose name contains this, e.g. 'stock'")
    parser.add_argument("--watchdog", type=float, default=30.0, help="WatchdogSec of the agent's unit")
    parser.add_argument("--patience", type=float, default=40.0, help="seconds for which Petals is watched")
    parser.add_argument("--no-stock", action="store_true", help="leave the published Petals out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="petals-agent-bench-") as name:
        result = Bench(args, Path(name)).run()
    print(json.dumps(result) if args.json else table(result))
    return int(bool(result["failed"]))


if __name__ == "__main__":
    sys.exit(main())
