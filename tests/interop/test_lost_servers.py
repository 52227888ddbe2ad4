"""Our client keeps its session when a server of it is killed: another one, ours or published, takes over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaForCausalLM

from petals_agent.client.decode import Decoder, Generation, beam_search
from petals_agent.client.generate import Client
from petals_agent.swarm.view import Span

from .members import IDS, Member, Swarm
from .reference import generated

pytestmark = pytest.mark.usefixtures("calm")

BATCH = [IDS, IDS[::-1]]


@dataclass(frozen=True)
class Loss:
    """A chain of servers whose last one is to be killed, and the one that must take over."""

    kept: list[Member]
    victim: Member
    heir: Member

    def check_before(self, route: list[Span]) -> None:
        assert [hop.peer_id for hop in route] == [member.peer_id for member in [*self.kept, self.victim]]

    def check_after(self, route: list[Span]) -> None:
        assert [hop.peer_id for hop in route] == [member.peer_id for member in [*self.kept, self.heir]]


@contextmanager
def losing(
    shared: Swarm, before: str, victim: str, heir: str
) -> Iterator[tuple[Client, Loss, Callable[[], None]]]:
    """A client that uses the servers `before` and a new `victim`, and what kills the victim."""
    lost = shared.launch(victim)
    lost.server.wait_online(120)
    loss = Loss(shared.route(before), lost, shared[heir])
    with shared.client() as client:
        shared.steer(client, [*loss.kept, lost])

        def kill() -> None:
            shared.steer(client, [*loss.kept, lost, loss.heir])
            lost.kill()

        yield client, loss, kill


@pytest.mark.parametrize(
    ("before", "victim", "heir"),
    [
        ("", "ours 0:8", "ours 0:8"),
        ("stock 0:4", "stock 4:8", "stock 4:8"),
        ("ours 0:4", "stock 4:8", "ours 4:8"),
    ],
)
def test_a_text_goes_on(shared: Swarm, local: LlamaForCausalLM, before: str, victim: str, heir: str) -> None:
    with losing(shared, before, victim, heir) as (client, loss, kill):
        tokens = client.tokens(BATCH, 24)
        for _ in range(8):
            next(tokens)
        loss.check_before(tokens.result.route)
        kill()
        next(tokens)
        if heir.startswith("ours"):
            loss.heir.until(lambda status: status["sessions"] == 1, "the session that it took over")
        for _ in tokens:
            pass
        loss.check_after(tokens.result.route)
        assert tokens.result.ids == generated(local, BATCH, 24)
        assert client.generate(IDS, 4).ids == generated(local, [IDS], 4)


def test_a_beam_search_with_pushes_goes_on(shared: Swarm, local: LlamaForCausalLM) -> None:
    """What is replayed to the other server must have been reordered as its cache was."""
    beams, count = 3, 16

    class Killing(Decoder):
        def logits(self, ids: torch.Tensor, sources: torch.Tensor | None = None) -> torch.Tensor:
            if self.result.steps == 8:
                loss.check_before(self.result.route)
                kill()
            return super().logits(ids, sources)

    with losing(shared, "ours 0:4", "ours 4:8", "stock 4:8") as (client, loss, kill):
        with client.session(len(IDS) + count, len(BATCH) * beams, push=True) as session:
            decoder = Killing(client.parts, session, Generation([]))
            found = beam_search(decoder, torch.tensor(BATCH), count, beams, set())
        loss.check_after(decoder.result.route)
    assert found == generated(local, BATCH, count, num_beams=beams)
