"""The key that is the agent's peer id: there, private, its own, and used by nobody else."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from petals_agent.doctor.account import Account, owner_name
from petals_agent.doctor.check import Result, Skip, ok, problem
from petals_agent.doctor.host import Host
from petals_agent.doctor.threads import in_thread
from petals_agent.errors import SwarmError
from petals_agent.swarm.identity import ensure_identity


async def check_identity(host: Host) -> Result:
    """A missing key is no problem: it is made at the first start."""
    path, account = host.config.swarm.identity, host.account
    found = await in_thread(lambda: _look(path, account))
    if isinstance(found, Result):
        return found
    if not is_locked(path.with_name(f"{path.name}.lock"), Path("/proc/locks").read_text()):
        return ok(f"{path}, peer id {found or 'not readable by us'}")
    running = await host.running()
    if running.forbidden:
        unknown = "whether it is the one of this configuration is not known"
        raise Skip(f"an agent uses {path}; {unknown}", host.as_root)
    if running.status is None:
        return problem(
            f"an agent that does not answer here uses {path}",
            f"Find it, end it or give each its own swarm.identity: sudo fuser -v {path}.lock",
        )
    return ok(f"{path}, peer id {running.status['peer_id']}, in use by the running agent")


def _look(path: Path, account: Account) -> Result | str | None:
    """A result that ends the check, or the peer id if we may read the key."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return _missing(path, account)
    wrong = key_file_mode(path, status, account)
    if wrong is not None:
        return wrong
    if not os.access(path, os.R_OK):
        return None
    try:
        return ensure_identity(path)
    except SwarmError as error:
        return problem(
            str(error), f"Move it away, and a new one is made at the next start: mv {path} {path}.old"
        )


def _missing(path: Path, account: Account) -> Result:
    folder = next(parent for parent in path.parents if parent.exists())
    if account.may_write(folder.stat()):
        return ok(f"{path} will be made at the first start")
    return problem(
        f"{path} is not there and {account.name} cannot write to {folder}",
        f"Make the folder: sudo install -d -o {account.name} -m 0750 {path.parent}",
    )


def key_file_mode(path: Path, status: os.stat_result, account: Account) -> Result | None:
    """None when it is private and the agent's own; mode 0400 or 0600."""
    mode = stat.S_IMODE(status.st_mode)
    if not account.may_read(status) or status.st_uid not in (account.uid, 0):
        return problem(
            f"{path} belongs to {owner_name(status.st_uid)} with mode {mode:04o}, and the agent runs as {account.name}",
            f"Give it away: sudo chown {account.name} {path} && sudo chmod 0600 {path}",
        )
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        return problem(
            f"{path} is a private key and open to others (mode {mode:04o})", f"Close it: chmod 0600 {path}"
        )
    return None


def is_locked(lock: Path, locks: str) -> bool:
    """Whether somebody holds a lock on the file, by the text of /proc/locks: trying would be in a starting agent's way."""
    try:
        status = lock.stat()
    except OSError:
        return False
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    return any(place in line.split() and "FLOCK" in line for line in locks.splitlines())
