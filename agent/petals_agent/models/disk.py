"""The disk budget of a model cache: which weights to drop, oldest use first, before new ones are downloaded.

Only a cache folder with a budget is ever cleaned; without one, nothing is deleted. The layout is that of huggingface_hub
(models--owner--name/blobs, with snapshots/<commit>/<file> linking into it).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from petals_agent.errors import CheckpointError

PARTIAL = ".part"  # suffix of an interrupted download, which the next one continues
_HEADROOM = 64 << 20  # bytes that a download leaves free on the disk


@dataclass(frozen=True)
class _Weights:
    """One blob of weights and the snapshot links to it."""

    blob: Path
    links: tuple[Path, ...]
    bytes: int
    used: float  # time of the last use


def mark_used(blob: Path) -> None:
    """Note a use now, for the order of eviction."""
    try:
        os.utime(blob)
    except OSError:  # a read-only cache is never cleaned either
        pass


def make_room(cache: Path, needed: int, total: int, keep: Collection[Path], max_disk: int | None) -> None:
    """Ensure that `needed` more bytes may be written to `cache`, evicting old weights if there is a budget.

    `keep` are the blobs that the model itself uses; `total` is its size with them. Raises CheckpointError if it cannot fit.
    """
    if max_disk is not None:
        if total > max_disk:
            raise CheckpointError(
                f"the span's weights take {_size(total)} but model.max_disk allows {_size(max_disk)}; "
                "serve fewer blocks or raise model.max_disk"
            )
        _evict(cache, needed, keep, max_disk)
    free = _free(cache)
    if needed and needed + _HEADROOM > free:
        raise CheckpointError(
            f"{_size(needed)} are to be downloaded but the disk of {cache} has {_size(free)} free; "
            "free some space, or set model.cache_dir to a larger disk"
        )


def disk_full(path: Path) -> CheckpointError:
    """The error for a write to `path` that found no space; what was written is kept and continued later."""
    return CheckpointError(
        f"the disk is full: writing {path.name} to {path.parent} failed; what was downloaded is kept. "
        "Free some space, or set model.cache_dir to a larger disk"
    )


def _evict(cache: Path, needed: int, keep: Collection[Path], max_disk: int) -> None:
    present = sorted(_weights(cache), key=lambda weights: weights.used)
    used = sum(weights.bytes for weights in present)
    short = max(used + needed - max_disk, needed + _HEADROOM - _free(cache) if needed else 0)
    for weights in present:
        if short <= 0:
            return
        if weights.blob in keep:
            continue
        for path in (*weights.links, weights.blob):
            path.unlink(missing_ok=True)
        short -= weights.bytes


def _weights(cache: Path) -> Iterator[_Weights]:
    links: dict[Path, list[Path]] = {}
    for link in cache.glob("models--*/snapshots/*/*.safetensors"):
        links.setdefault(link.resolve(), []).append(link)
    for partial in cache.glob(f"models--*/blobs/*{PARTIAL}"):
        links.setdefault(partial, [])
    for blob, names in links.items():
        try:
            status = blob.stat()
        except OSError:  # a link to a blob that is gone
            continue
        yield _Weights(blob, tuple(names), status.st_size, status.st_mtime)


def _free(cache: Path) -> int:
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    return shutil.disk_usage(existing).free


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
