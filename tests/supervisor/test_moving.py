"""A span moves while it is served: no answer is lost or wrong, and no record promises what is not there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from harness.live import LiveAgent, ask, start_live
from harness.peer import Peer
from harness.processes import Processes, wait_until
from harness.swarm import start_bootstrap
from petals_agent.client.generate import Client

BLOCKS = 8
MOVES = ["2:6", "4:8", "1:5", "0:4"]
pytestmark = pytest.mark.timeout(300)


@dataclass
class Reader:
    """Reads the records of one peer again and again, and asks it about each block that it says to be ONLINE."""

    peer: Peer
    peer_id: str
    looks: int = 0
    broken: list[str] = field(default_factory=list)

    def __enter__(self) -> Reader:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(30)

    def _run(self) -> None:
        while not self._over.wait(0.2):
            for block in range(BLOCKS):
                value = self.peer.read(f"tiny.{block}").get(self.peer_id)
                if value is None or value[0][0] != 2:
                    continue
                fields = value[0][2]
                for promised in {block, *range(fields["start_block"], fields["end_block"])}:
                    try:
                        self.peer.info(self.peer_id, f"tiny.{promised}")
                    except Exception as error:
                        self.broken.append(f"{promised} under {block}: {error!r}")
            self.looks += 1


@pytest.fixture
def swarm(processes: Processes, tmp_path: Path, tiny_llama: Path) -> Iterator[tuple[str, LiveAgent]]:
    """An entry node, an agent with all blocks, and one that is to move."""
    maddr = start_bootstrap(processes)
    stays = start_live(processes, tmp_path / "stays", tiny_llama, "0:8", [maddr])
    moves = start_live(
        processes, tmp_path / "moves", tiny_llama, "0:4", [maddr], '[balance]\ndrain_timeout = "20s"'
    )
    stays.online()
    moves.online()
    yield maddr, moves


def test_nobody_notices_a_move(swarm: tuple[str, LiveAgent], tiny_llama: Path) -> None:
    maddr, agent = swarm
    torch.set_num_threads(1)
    local = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    out = local.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = out[:, 3:].tolist()
    peer_id = agent.online()["peer_id"]
    texts: list[list[list[int]]] = []
    over = threading.Event()

    def generate() -> None:
        with Client(str(tiny_llama), [maddr], "tiny") as client:
            client.end_tokens = set()
            while not over.is_set():
                texts.append(client.generate([5, 6, 7], 40).ids)

    clients = [threading.Thread(target=generate) for _ in range(2)]
    with Peer([maddr]) as peer, Reader(peer, peer_id) as reader:
        for client in clients:
            client.start()
        try:
            for blocks in MOVES:
                before = len(texts)
                wait_until(lambda before=before: len(texts) > before + 2, 60, "texts go on")  # type: ignore[misc]
                answer = ask(agent.socket, b'{"do": "rebalance", "blocks": "%s"}' % blocks.encode(), 90)
                assert answer["ok"], answer
                status = agent.online()
                assert status["blocks"] == blocks and status["restarts"]["container"] == 0
                start, end = map(int, blocks.split(":"))
                for block in range(BLOCKS):
                    announced = peer.state(peer_id, f"tiny.{block}")
                    assert (announced == 2) == (start <= block < end), (block, announced)
        finally:
            over.set()
            for client in clients:
                client.join(60)
    assert not reader.broken and reader.looks > 5, reader.broken[:5]
    assert texts and all(text == expected for text in texts)
    print(f"{len(texts)} texts, {reader.looks} looks")


def test_what_cannot_be_moved_to(swarm: tuple[str, LiveAgent]) -> None:
    _, agent = swarm
    for blocks, why in (("0:4", "served already"), ("5:9", "only 8 blocks"), ("x", "not START:END")):
        answer = ask(agent.socket, b'{"do": "rebalance", "blocks": "%s"}' % blocks.encode(), 30)
        assert not answer["ok"] and why in str(answer["error"]), answer
    assert agent.online()["blocks"] == "0:4"
