"""From scores to the next token: greedy, or drawn with a temperature from the most probable part."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from petals_agent.errors import ClientError


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens; without `do_sample` always the most probable. The same `seed` gives the same draws."""

    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ClientError(
                f"temperature must be above 0, not {self.temperature}; for greedy choice do not sample"
            )
        if not 0 < self.top_p <= 1:
            raise ClientError(f"top_p must be in 0 … 1, not {self.top_p}; 1 keeps every token")


class Sampler:
    """Draws the tokens of one generation."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """Tokens [batch] from scores [batch, vocabulary]."""
        if not self._sampling.do_sample:
            return logits.argmax(-1)
        scores = logits.float() / self._sampling.temperature
        if self._sampling.top_p < 1:
            scores = keep_nucleus(scores, self._sampling.top_p)
        return torch.multinomial(scores.softmax(-1), 1, generator=self._generator).squeeze(-1)


def keep_nucleus(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Scores [batch, vocabulary] with -inf outside the fewest tokens whose probabilities reach `top_p`."""
    ordered, indices = scores.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    outside = before >= top_p
    outside[..., 0] = False  # the most probable one always stays
    return scores.masked_fill(outside.scatter(-1, indices, outside), float("-inf"))
