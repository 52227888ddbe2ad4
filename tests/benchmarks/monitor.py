"""What a refresh of the monitor costs in CPU time: decoding what the DHT's nodes answer, the views, the report, its JSON.

    monitor.py [--json] [--quick]

Needs no network: answers are made up, five nodes hold each key (hivemind's number of replicas), and they are merged by
hivemind's own search. What p2pd's socket and protobuf cost is not counted. "Page data" is from views to JSON. Servers
hold 10 to 40 of 80 blocks and name ten pings. The best of several runs is told.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from monitor.swarms import peer
from petals_agent.monitor.decoding import RecordReader
from petals_agent.monitor.report import Reading, report
from petals_agent.monitor.service import seek_cycles_rarely
from petals_agent.swarm.records import ServerInfo, ServerState
from petals_agent.swarm.view import SwarmView

from hivemind.dht.node import _SearchState  # isort: skip
from hivemind.dht.routing import DHTID  # isort: skip
from hivemind.dht.storage import DictionaryDHTValue  # isort: skip
from hivemind.utils.serializer import MSGPackSerializer  # isort: skip
from hivemind.utils.timed_storage import ValueWithExpiration  # isort: skip

MODELS = 10
BLOCKS = 80
REPLICAS = 5
SIZES = {"1000 servers of 10 models": 100, "1000 servers of each of 10 models": 1000}  # per model
RUNS = 3


def answers(prefix: str, servers: int, now: float) -> dict[str, bytes]:
    """What a node of the DHT sends for each key of a model."""
    rng = random.Random(prefix)
    peers = [peer(seed) for seed in range(servers)]
    keys: dict[str, DictionaryDHTValue] = {}
    for one in peers:
        length = rng.randint(10, 40)
        start = rng.randint(0, BLOCKS - length)
        info = ServerInfo(
            ServerState.ONLINE if rng.random() < 0.9 else ServerState.JOINING,
            rng.uniform(1, 1000),
            start,
            start + length,
            public_name=f"host of {one[-5:]}",
            version="2.3.0.dev2",
            network_rps=100.0,
            forward_rps=200.0,
            inference_rps=30.0,
            torch_dtype="bfloat16",
            quant_type="nf4",
            using_relay=False,
            cache_tokens_left=100_000,
            next_pings={other: rng.random() for other in rng.sample(peers, 10)},
        )
        raw = MSGPackSerializer.dumps(info.to_value())
        for block in range(start, start + length):
            keys.setdefault(f"{prefix}.{block}", DictionaryDHTValue()).store(one, raw, now + 200)
    return {key: MSGPackSerializer.dumps(value) for key, value in keys.items()}


def received(raw: Mapping[str, bytes]) -> dict[str, list[bytes]]:
    """What all replicas answer: the same, but not the same objects."""
    return {key: [bytes(bytearray(answer)) for _ in range(REPLICAS)] for key, answer in raw.items()}


def read(answers: Mapping[str, list[bytes]], reader: RecordReader, now: float) -> dict[str, Any]:
    """As DHTNode.get_many does with the answers of all replicas."""
    found = {}
    for key, copies in answers.items():
        search = _SearchState(DHTID.generate(key), math.inf, serializer=reader)  # type: ignore[arg-type]
        for answer in copies:
            stored: Any = reader.loads(answer)
            search.add_candidate(ValueWithExpiration(stored, now + 200), None)
        search.finish_search()
        found[key] = search.future.result()
    return found


async def measured(per_model: int) -> dict[str, float]:
    """CPU seconds of each step, and what was in it."""
    now = time.time()
    swarm = {f"model-{number}": answers(f"model-{number}", per_model, now) for number in range(MODELS)}
    took: dict[str, float] = {
        "megabytes": sum(len(raw) for one in swarm.values() for raw in one.values()) / 1e6
    }

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        began = time.process_time()
        yield
        took[name] = min(time.process_time() - began, took.get(name, math.inf))

    for _ in range(RUNS if per_model < 1000 else 1):
        reader = RecordReader()
        found: dict[str, dict[str, Any]] = {}
        spent = 0.0
        for prefix, raw in swarm.items():
            copies = received(raw)
            began = time.process_time()
            found[prefix] = read(copies, reader, now)
            spent += time.process_time() - began
        took["decode_s"] = min(spent, took.get("decode_s", math.inf))
        with timed("views_s"):
            views = [SwarmView.from_dht(prefix, BLOCKS, one, now) for prefix, one in found.items()]
        with timed("report_s"):
            state = report([Reading(view) for view in views], taken_at=now, duration_s=1.0, period_s=30.0)
        with timed("json_s"):
            state.model_dump_json()
        took["records"] = sum(len(view.records) for view in views)
        took["servers"] = sum(len(model.servers) for model in state.models)
        del found, views, state
        gc.collect()
    took["page_data_s"] = took["views_s"] + took["report_s"] + took["json_s"]
    took["refresh_s"] = took["decode_s"] + took["page_data_s"]
    return {name: round(value, 3) for name, value in took.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--quick", action="store_true", help="the first size only")
    options = parser.parse_args()
    seek_cycles_rarely()  # as the service does
    sizes = dict(list(SIZES.items())[:1]) if options.quick else SIZES
    results = {name: asyncio.run(measured(per_model)) for name, per_model in sizes.items()}
    if options.json:
        print(json.dumps(results))
        return
    for name, figures in results.items():
        print(f"{name}:")
        for figure, value in figures.items():
            print(f"  {figure:12} {value:g}")


if __name__ == "__main__":
    main()
