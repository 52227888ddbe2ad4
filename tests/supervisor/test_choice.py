"""Where the agent goes when it may choose, what it says it can do, and how a host that nobody can dial joins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.live import start_live
from harness.peer import Peer
from harness.processes import Processes
from harness.swarm import start_entry

ONLINE = 2
OTHERS = {
    "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N": (0, 5),
    "QmaRG2JQarffEh4fn9Mywmcx7Vd1qRaioJvEriXpTmgd25": (3, 6),
}
CHOOSING = """
[swarm]
announce = ["/ip4/127.0.0.1/tcp/{port}"]
[serve]
num_blocks = 3
throughput = "auto"
[balance]
mean_block_selection_delay = 0.1
"""


@pytest.mark.timeout(180)
def test_weakest_blocks_by_measured_throughput_through_relays(
    processes: Processes, tmp_path: Path, tiny_llama: Path, free_port: Callable[[], int]
) -> None:
    maddr = start_entry(processes, tmp_path / "entry")
    with Peer([maddr]) as peer:
        for other, (start, end) in OTHERS.items():
            for block in range(start, end):
                record = (ONLINE, 100.0, {"start_block": start, "end_block": end})
                peer.store(f"tiny.{block}", other, record, 120.0)
        more = CHOOSING.format(port=free_port())
        agent = start_live(processes, tmp_path / "a", tiny_llama, "auto", [maddr], more)
        status = agent.online()
        peer_id = status["peer_id"]
        assert status["blocks"] == "5:8"  # 6 and 7 have nobody
        assert status["relayed"] is True

        def record() -> tuple[int, float, dict[str, Any]]:
            return peer.read("tiny.5")[peer_id][0]  # type: ignore[no-any-return]

        state, throughput, fields = record()
        rates = fields["network_rps"], fields["forward_rps"], fields["inference_rps"]
        assert state == ONLINE and fields["using_relay"] is True
        assert all(type(rate) is float and rate > 0 for rate in rates)
        assert throughput == pytest.approx(min(rates[1] / 2, rates[0] * 0.2))

        # the next container takes the rates from the cache
        kept = json.loads((tmp_path / "a" / "state" / "throughput.json").read_text())
        assert len(kept) == 1
        agent.kill_child("container")
        agent.until(lambda status: status["restarts"]["container"] == 1, 30, "the container's death is seen")
        agent.online()
        assert json.loads((tmp_path / "a" / "state" / "throughput.json").read_text()) == kept
        assert record()[1] == throughput
