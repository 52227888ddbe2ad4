"""What systemd knows of our unit."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from petals_agent.doctor.check import Result, Skip, ok, problem, warning, worst

if TYPE_CHECKING:
    from petals_agent.doctor.host import Host

_SHOWN = (
    "LoadState",
    "UnitFileState",
    "ActiveState",
    "SubState",
    "NRestarts",
    "Result",
    "NeedDaemonReload",
    "MainPID",
    "MemoryMax",
    "LimitNOFILE",
    "StatusText",
)
_MANY_RESTARTS = 3
_TIMEOUT_S = 8.0


def is_running() -> bool:
    """Whether this host was booted with systemd and its command is there."""
    return Path("/run/systemd/system").is_dir() and shutil.which("systemctl") is not None


def show(unit: str) -> Mapping[str, str]:
    """`systemctl show`; empty without systemd. Blocks for at most 8 s; raises Skip when it does not answer."""
    if not is_running():
        return {}
    command = ["systemctl", "show", unit, f"--property={','.join(_SHOWN)}"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Skip(f"systemctl does not answer: {error}") from None
    if done.returncode:
        raise Skip(f"systemctl show {unit}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return properties(done.stdout)


def properties(text: str) -> dict[str, str]:
    """The lines KEY=VALUE of `systemctl show`."""
    pairs = (line.partition("=") for line in text.splitlines())
    return {key: value for key, equals, value in pairs if equals}


async def check_unit(host: Host) -> Result:
    """Installed, enabled, running, and not restarted all the time."""
    unit = host.unit
    if not is_running():
        raise Skip("this host does not run systemd")
    if unit is None:
        where = host.file or "no configuration file"
        raise Skip(f"units run what is in /etc/petals-agent, and this is {where}")
    return judge(unit, await host.unit_properties())


def judge(unit: str, seen: Mapping[str, str]) -> Result:
    """From `systemctl show`; a pure function."""
    load, enabled, active = (seen.get(name, "") for name in ("LoadState", "UnitFileState", "ActiveState"))
    if load == "not-found":
        return problem(
            f"{unit} is not installed", "Install the package: sudo apt install ./petals-agent_*.deb"
        )
    if load == "masked":
        return problem(f"{unit} is masked, so it cannot start", f"Allow it: sudo systemctl unmask {unit}")
    if load != "loaded":
        return problem(
            f"{unit} cannot be loaded ({load or 'no answer'})", f"See why: systemd-analyze verify {unit}"
        )
    results = [ok(f"{unit} is {active} ({seen.get('SubState', '')}), {enabled or 'not enabled'}")]
    restarts = int(seen["NRestarts"]) if seen.get("NRestarts", "").isdecimal() else 0
    last = f"See why: journalctl -u {unit} -n 50"
    if active == "failed":
        why = seen.get("Result", "unknown")
        results.append(problem(f"{unit} has failed ({why}) and is not restarted any more", last))
    elif seen.get("SubState") == "auto-restart":
        results.append(
            problem(f"{unit} ended ({seen.get('Result', 'unknown')}) and waits for its restart", last)
        )
    elif active == "inactive":
        results.append(warning(f"{unit} does not run", f"Start it: sudo systemctl start {unit}"))
    if restarts >= _MANY_RESTARTS:
        results.append(warning(f"{unit} was restarted {restarts} times", last))
    if enabled == "disabled":
        results.append(
            warning(f"{unit} does not start at boot", f"Let it: sudo systemctl enable --now {unit}")
        )
    if seen.get("NeedDaemonReload") == "yes":
        results.append(
            warning(
                f"{unit} was changed on disk and systemd has not read it",
                "Let it: sudo systemctl daemon-reload",
            )
        )
    return worst(results)
