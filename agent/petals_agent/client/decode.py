"""The decoding loops: token by token, and by beam search."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from petals_agent.client.beam import BeamSearch
from petals_agent.client.sampling import Sampler
from petals_agent.client.sync import SyncSession
from petals_agent.models.client_parts import ClientParts
from petals_agent.swarm.view import Span


@dataclass
class Generation:
    """What came out: for each row of the batch its new token ids and their text, and how it went."""

    ids: list[list[int]]
    texts: list[str | None] = field(default_factory=list)
    steps: int = 0
    first_s: float = 0.0  # until the first token: connecting, routing, prompt
    decode_s: float = 0.0  # for the other tokens
    route: list[Span] = field(default_factory=list)

    @property
    def text(self) -> str | None:
        """Text of the first row, None if the model has no tokenizer."""
        return self.texts[0] if self.texts else None

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed of the whole batch without the first step; 0 if there was only one."""
        return len(self.ids) * (self.steps - 1) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(frozen=True)
class Decoder:
    """Feeds tokens of a batch through embeddings, a session and the head; notes times and route in `result`."""

    parts: ClientParts
    session: SyncSession
    result: Generation

    def logits(self, ids: torch.Tensor, sources: torch.Tensor | None = None) -> torch.Tensor:
        """Scores of the next token [batch, vocabulary] after ids [batch, n]; `sources` reorders the past first."""
        started = time.perf_counter()
        with torch.inference_mode():
            hidden = self.session.step(self.parts.embed(ids), hypo_ids=sources)
            logits = self.parts.logits(hidden[:, -1:])[:, -1]
        elapsed = time.perf_counter() - started
        if self.result.steps:
            self.result.decode_s += elapsed
        else:
            self.result.first_s = elapsed
        self.result.steps += 1
        self.result.route = self.session.route
        return logits


def decode(
    decoder: Decoder, ids: torch.Tensor, count: int, sampler: Sampler, ends: set[int]
) -> Iterator[list[int | None]]:
    """Each step's token for each row of ids [batch, n], None for rows that have ended; at most `count` steps."""
    ended = [False] * len(ids)
    for _ in range(count):
        chosen = sampler.choose(decoder.logits(ids))
        tokens = [None if over else int(token) for token, over in zip(chosen, ended, strict=True)]
        for row, token in zip(decoder.result.ids, tokens, strict=True):
            if token is not None:
                row.append(token)
        yield tokens
        ended = [token is None or token in ends for token in tokens]
        if all(ended):
            return
        ids = chosen[:, None]


def beam_search(
    decoder: Decoder, ids: torch.Tensor, count: int, beams: int, ends: set[int]
) -> list[list[int]]:
    """The best continuation of each row of ids [batch, n], at most `count` tokens; the session has batch × beams rows."""
    search = BeamSearch(len(ids), beams, ends, count)
    rows, sources = ids.repeat_interleave(beams, 0), None
    while True:
        tokens, sources = search.advance(decoder.logits(rows, sources))
        if search.done:
            return search.best()
        rows = tokens[:, None]
