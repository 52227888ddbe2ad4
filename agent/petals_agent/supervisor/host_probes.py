"""Probes that look at the host: disk, memory, and the GPU where there is one."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from petals_agent.health.findings import OK, Probe, Reading, not_applicable
from petals_agent.health.findings import degraded as worse

_DISK_BYTES = 100 * 2**20
_MEMORY_SHARE = 0.95


class HostProbes:
    """`all` of them. None has a cure: an operator must act, and we go on as long as we can."""

    NAMES = ("host.disk", "host.memory")

    def __init__(self, folders: Sequence[Path], adjusted: Callable[[Probe], Probe]) -> None:
        """`folders` that are written to; `adjusted` gives a probe with what the configuration says of it."""
        self._folders = folders
        probes = (
            Probe("host.disk", self._disk, 60.0, 20.0, 1),
            Probe("host.memory", self._memory, 15.0, 5.0, 2),
        )
        self.all = tuple(map(adjusted, probes))

    async def _disk(self) -> Reading:
        for folder in self._folders:
            place = next((part for part in (folder, *folder.parents) if part.exists()), Path("/"))
            free = (await asyncio.to_thread(shutil.disk_usage, place)).free
            if free < _DISK_BYTES:
                return worse(f"{free // 2**20} MiB are free in {place}; make room")
        return OK

    async def _memory(self) -> Reading:
        share = cgroup_memory_share()
        if share is None:
            return not_applicable("no memory limit is set for us")
        return worse(f"{share:.0%} of our memory limit is used") if share > _MEMORY_SHARE else OK


def cgroup_memory_share(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> float | None:
    """How much of its memory limit our cgroup (version 2) uses, file cache that can be dropped not counted."""
    try:
        group = next(line[3:] for line in membership.read_text().splitlines() if line.startswith("0::"))
        folder = root / group.lstrip("/")
        limit = (folder / "memory.max").read_text().strip()
        if limit == "max":
            return None
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used = int((folder / "memory.current").read_text()) - int(fields.get("inactive_file", 0))
        return used / int(limit)
    except (OSError, StopIteration, ValueError, ZeroDivisionError):
        return None
