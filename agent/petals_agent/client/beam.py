"""Beam search over next-token scores, deciding as transformers does: same candidates, same stop, same winner."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch


@dataclass
class _Row:
    """One prompt of the batch: its open beams, best first, and the finished ones."""

    beams: list[list[int]]
    scores: torch.Tensor  # [beams]
    finished: list[tuple[float, list[int]]] = field(default_factory=list)  # best first
    improvable: bool = True


class BeamSearch:
    """Keeps `beams` continuations of each of `batch` prompts.

    Give `advance` the scores of the next token for all batch × beams sequences, then feed its tokens to the model after
    reordering its cache by its hypo_ids, until `done`. All beams of a prompt start equal.
    """

    def __init__(
        self, batch: int, beams: int, eos: Collection[int], max_new_tokens: int, length_penalty: float = 1.0
    ) -> None:
        start = torch.full((beams,), -1e9)
        start[0] = 0.0  # equal beams: only the first may open candidates
        self._rows = [_Row([[] for _ in range(beams)], start.clone()) for _ in range(batch)]
        self._beams = beams
        self._eos = set(eos)
        self._candidates = max(2, 1 + len(self._eos)) * beams
        self._max_new_tokens = max_new_tokens
        self._length_penalty = length_penalty
        self._length = 0

    @property
    def done(self) -> bool:
        """Whether no further step can change the result."""
        return self._length == self._max_new_tokens or not any(row.improvable for row in self._rows)

    def advance(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [batch × beams, vocabulary] → tokens [batch × beams] and hypo_ids int64 [batch × beams]."""
        self._length += 1
        log_probs = logits.float().log_softmax(-1).unflatten(0, (-1, self._beams))
        tokens: list[int] = []
        sources: list[int] = []
        for index, row in enumerate(self._rows):
            row_tokens, row_sources = self._advance_row(row, log_probs[index])
            tokens += row_tokens
            sources += [index * self._beams + source for source in row_sources]
        return torch.tensor(tokens), torch.tensor(sources)

    def _advance_row(self, row: _Row, log_probs: torch.Tensor) -> tuple[list[int], list[int]]:
        vocabulary = log_probs.shape[-1]
        scores, flat = (log_probs + row.scores[:, None]).flatten().topk(self._candidates)
        last = self._length == self._max_new_tokens
        open_: list[tuple[float, list[int], int]] = []
        for rank, (score, candidate) in enumerate(zip(scores.tolist(), flat.tolist(), strict=True)):
            source, token = divmod(candidate, vocabulary)
            sequence = [*row.beams[source], token]
            if not last and token not in self._eos:
                open_.append((score, sequence, source))
            elif rank < self._beams and row.improvable:
                row.finished.append((score / self._length**self._length_penalty, sequence))
        row.finished = sorted(row.finished, key=lambda item: -item[0])[: self._beams]
        if last:
            return [0] * self._beams, list(range(self._beams))
        open_ = open_[: self._beams]
        row.beams = [sequence for _, sequence, _ in open_]
        row.scores = torch.tensor([score for score, _, _ in open_])
        best_possible = open_[0][0] / self._length**self._length_penalty
        if len(row.finished) == self._beams and best_possible <= row.finished[-1][0]:
            row.improvable = False
        return [sequence[-1] for _, sequence, _ in open_], [source for _, _, source in open_]

    def best(self) -> list[list[int]]:
        """The new tokens of each prompt's best finished sequence, with its end token if it has one."""
        return [row.finished[0][1] for row in self._rows]
