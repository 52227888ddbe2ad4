"""Big things that are made once: wheels, the package, file trees. Safe with several runs at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

LOCK_S = 900.0  # somebody else may be making the same thing
_in_use: list[IO[str]] = []  # locks that this process keeps to its end


def root() -> Path:
    """The suite's folder in the user's cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "petals-agent-ci"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cached(kind: str, key: str, make: Callable[[Path], None]) -> Path:
    """The folder `kind`-`key`, filled by `make(folder)` if it is not there; others of its kind that nobody uses are removed."""
    folder = root() / f"{kind}-{key}"
    lock = open(root() / f"{kind}-{key}.lock", "w")  # kept open
    _acquire(lock, folder)
    if not folder.exists():
        fresh = Path(tempfile.mkdtemp(prefix=f".new-{kind}-", dir=root()))
        try:
            make(fresh)
            fresh.chmod(0o755)
            fresh.rename(folder)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
    fcntl.flock(lock, fcntl.LOCK_SH)
    _in_use.append(lock)
    _prune(kind, keep=folder)
    return folder


def _acquire(lock: IO[str], folder: Path) -> None:
    """For itself if it has to be made, together with others if it is there."""
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if folder.exists() else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{folder} was locked for {LOCK_S:.0f} s") from None
            time.sleep(0.2)


def _prune(kind: str, keep: Path) -> None:
    for path in root().glob(f"{kind}-*.lock"):
        folder = path.with_suffix("")
        if folder == keep:
            continue
        with open(path) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(folder, ignore_errors=True)
            path.unlink(missing_ok=True)


def scratch() -> Path:
    """A folder on the cache's disk for what ends with this process; those of processes that are gone are removed."""
    folder = root() / "machines"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        if not Path(f"/proc/{old.name.split('-')[0]}").exists():
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=folder))
