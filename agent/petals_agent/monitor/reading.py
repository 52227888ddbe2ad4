"""Reads a whole swarm from the DHT: the registry, and every block of the models that are worth it, within limits.

Who writes to the registry is unknown, so it may name thousands of models of thousands of blocks, and drop any. Configured
ones come first, then those that had most servers that answered when last seen, also if the registry has lost them; of the
others as many as fit, at random, so that each gets its turn.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from petals_agent.errors import SwarmError
from petals_agent.monitor.report import MAX_MODELS, Reading
from petals_agent.monitor.state import Model, SwarmState
from petals_agent.swarm.records import ModelRecord, ServerState
from petals_agent.swarm.view import SwarmView, read_models, read_view

MAX_BLOCKS = 1024  # of one model
MAX_KEYS = 8192  # blocks of all models
REGISTRY_S = 10.0
BLOCKS_S = 20.0  # for all models together
_AT_ONCE = 4  # models
_FIRST_GUESS = 128  # blocks of a model that is not in the registry
_MARGIN = 32  # empty blocks, behind which nobody looks further


@dataclass(frozen=True)
class SwarmReading:
    """What was found; `problem` says in words what is missing, if anything is."""

    models: tuple[Reading, ...]
    problem: str

    @property
    def peers(self) -> set[str]:
        """Everyone who announces blocks."""
        return {record.peer_id for model in self.models for record in model.view.records}

    @property
    def claiming(self) -> set[str]:
        """Those that say they are online."""
        records = (record for model in self.models for record in model.view.records)
        return {record.peer_id for record in records if record.info.state is ServerState.ONLINE}


async def read_swarm(
    node: Any, prefixes: Sequence[str] = (), previous: SwarmState | None = None
) -> SwarmReading:
    """Read the registry's models and those of `prefixes` through a hivemind `DHTNode`, in at most 30 s.

    `previous` tells how long models were and which had servers; without an answer of the registry its models are read.
    """
    problems = []
    try:
        registry = _served(previous) | await read_models(node, REGISTRY_S)
    except SwarmError:
        problems.append("the DHT did not answer for the registry of models")
        registry = _remembered(previous)
    sane = {prefix: record for prefix, record in registry.items() if record.num_blocks <= MAX_BLOCKS}
    wanted = choose(sane, prefixes, previous)
    left = sum(prefix not in wanted for prefix in registry)
    if left:
        problems.append(
            f"{left} of the registry's {len(registry)} models were not read, too many or too long"
        )
    models = await _read_all(node, wanted, _remembered(previous))
    if late := sum(bool(model.view.unread) for model in models):
        problems.append(f"the DHT did not answer for some blocks of {late} models")
    return SwarmReading(tuple(models), "; ".join(problems))


def choose(
    registry: Mapping[str, ModelRecord], prefixes: Sequence[str], previous: SwarmState | None
) -> dict[str, ModelRecord | None]:
    """What to read, by prefix; None: its length must be found out."""
    models = previous.models if previous else ()
    # strangers announce what they like, but cannot make it answer
    worth = {model.dht_prefix: (_count(model, "online"), len(model.servers)) for model in models}
    others = [prefix for prefix in registry if prefix not in prefixes]
    random.shuffle(others)
    others.sort(key=lambda prefix: worth.get(prefix, (0, 0)), reverse=True)
    chosen = {prefix: registry.get(prefix) for prefix in prefixes[:MAX_MODELS]}
    keys = sum(record.num_blocks for record in chosen.values() if record is not None)
    for prefix in others:
        if len(chosen) < MAX_MODELS and keys + registry[prefix].num_blocks <= MAX_KEYS:
            chosen[prefix] = registry[prefix]
            keys += registry[prefix].num_blocks
    return chosen


def _count(model: Model, state: str) -> int:
    return sum(server.state == state for server in model.servers)


def _served(previous: SwarmState | None) -> dict[str, ModelRecord]:
    """Models with servers that were still there."""
    models = previous.models if previous else ()
    there = {model.dht_prefix for model in models if _count(model, "offline") < len(model.servers)}
    return {prefix: record for prefix, record in _remembered(previous).items() if prefix in there}


def _remembered(previous: SwarmState | None) -> dict[str, ModelRecord]:
    models = previous.models if previous else ()
    return {
        model.dht_prefix: ModelRecord(model.num_blocks, model.repository)
        for model in models
        if model.num_blocks
    }


async def _read_all(
    node: Any, wanted: Mapping[str, ModelRecord | None], known: Mapping[str, ModelRecord]
) -> list[Reading]:
    """Models in the order wanted; what is late is there too, with all its blocks unread."""
    deadline = asyncio.get_running_loop().time() + BLOCKS_S
    turn = asyncio.Semaphore(_AT_ONCE)

    async def read(prefix: str, record: ModelRecord | None) -> Reading:
        async with turn:
            left = max(deadline - asyncio.get_running_loop().time(), 0.01)
            if record is not None:
                return Reading(await read_view(node, prefix, record.num_blocks, left), record.repository)
            seen = known.get(prefix)
            view = await _read_growing(node, prefix, seen.num_blocks if seen else 0, left)
            return Reading(view, seen.repository if seen else None)

    return await asyncio.gather(*(read(prefix, record) for prefix, record in wanted.items()))


async def _read_growing(node: Any, prefix: str, known: int, timeout: float) -> SwarmView:
    """A model whose length nobody tells: it has the blocks that servers hold or claim, and not fewer than `known` before."""
    deadline = asyncio.get_running_loop().time() + timeout
    reach = min(known + _MARGIN, MAX_BLOCKS) if known else _FIRST_GUESS
    while True:
        left = max(deadline - asyncio.get_running_loop().time(), 0.01)
        view = await read_view(node, prefix, reach, left)
        ends = [record.range[1] if record.range else record.block + 1 for record in view.records]
        length = max([known, *(end for end in ends if end <= MAX_BLOCKS)])
        if length + _MARGIN <= reach or reach == MAX_BLOCKS:
            unread = tuple(block for block in view.unread if block < length)
            return replace(view, num_blocks=length, unread=unread)
        reach = min(max(2 * reach, length + _MARGIN), MAX_BLOCKS)
