"""The heartbeat's rule as pure values: times, tokens, and what a sequence of rounds amounts to."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

MAX_MEMBERS = 100
MAX_FAILURES = 3  # in a row
TOKENS = 65535  # a token is 0 … 65534
_MIN_WITNESSES = 3  # so that one slow link, one way or both, is bypassed
_HOLD_S = 15.0  # no answer is kept back longer, for the sake of relays and routers on the way


@dataclass(frozen=True)
class Timing:
    """All in seconds; `of(period)` is the rule, other values are for tests."""

    period: float  # from the end of a round to the start of the next
    timeout: float  # of a round
    hold: float  # until a question is answered with what is known by then
    visit: float = (
        _HOLD_S  # the same at the start: long beside the way to and fro, for all must be there at one moment
    )
    settle: float = 30.0  # without a newcomer, before a group of unknown size begins
    patience: float = 5.0  # for a question that can be answered at once, and between tries

    @classmethod
    def of(cls, period: float) -> Timing:
        timeout = max(period - 10.0, 2.0)
        return cls(period, timeout, min(timeout / 3, _HOLD_S))  # so there is time to ask twice more

    @property
    def bound(self) -> float:
        """Within this every member knows that one is dead, if the period is at least 3 s."""
        return MAX_FAILURES * (self.period + self.timeout) + self.period


def now() -> float:
    """Seconds on the event loop's clock, which no wall clock moves."""
    return asyncio.get_running_loop().time()


def draw_token() -> int:
    """What member 0 gives to all."""
    return secrets.randbelow(TOKENS)


def draw_life() -> bytes:
    """A name for this start of this member, which tells it from each start before."""
    return secrets.token_bytes(8)


@dataclass(frozen=True)
class Standing:
    """Where a member stands: the round in progress or next, failures in a row, and why it is over, if it is.

    Once fatal it stays as it is.
    """

    round: int = 0
    failures: int = 0
    fatal: str | None = None

    def succeeded(self) -> Standing:
        """The round had the right token from every member."""
        return self if self.fatal is not None else Standing(self.round + 1)

    def failed(self, why: str, rounds: int = 1) -> Standing:
        """So many rounds ended without: the one in progress, and those that others had without us meanwhile."""
        if self.fatal is not None or rounds <= 0:
            return self
        failures = self.failures + rounds
        fatal = f"{failures} rounds in a row failed: {why}" if failures >= MAX_FAILURES else None
        return Standing(self.round + rounds, failures, fatal)

    def wrong(self, why: str) -> Standing:
        """A member has another token, or was started again: nothing that happens later makes that good."""
        return self if self.fatal is not None else replace(self, fatal=why)


@dataclass(frozen=True)
class Fleet:
    """The members by peer id, in order: the first is member 0, and all know who is which."""

    members: tuple[str, ...]
    numbers: dict[str, int] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", tuple(sorted(set(self.members))))
        object.__setattr__(self, "numbers", {peer: number for number, peer in enumerate(self.members)})

    @property
    def everyone(self) -> int:
        """The set of all members: bit i is member i."""
        return (1 << len(self.members)) - 1

    @property
    def witnesses(self) -> tuple[str, ...]:
        """Those whom all members tell of themselves in each round: about log2 of their number."""
        count = math.ceil(math.log2(max(len(self.members), 2)))
        return self.members[: max(count, _MIN_WITNESSES)]

    def bit(self, peer_id: str) -> int:
        """The set of this member alone. Raises KeyError for anybody else."""
        return 1 << self.numbers[peer_id]

    def without(self, known: int) -> Sequence[str]:
        """The members that are not in the set `known`."""
        return list(self._in(self.everyone & ~known))

    def _in(self, chosen: int) -> Iterator[str]:
        return (peer for number, peer in enumerate(self.members) if chosen >> number & 1)


@dataclass
class Ledger:
    """Who has taken part in which round: a set for the present round and the next, and how the last one ended."""

    fleet: Fleet
    round: int = 0
    _sets: dict[int, int] = field(default_factory=dict)

    def add(self, number: int, known: int) -> bool:
        """Take in that these members take part in round `number`; True if that makes it complete.

        What is late, or too early to be true, counts for nothing.
        """
        if not self.round <= number <= self.round + 1:
            return False
        before = self._sets.get(number, 0)
        self._sets[number] = before | known & self.fleet.everyone
        return before != self.fleet.everyone and self.complete(number)

    def known(self, number: int) -> int:
        """The members of round `number` as far as known."""
        return self._sets.get(number, 0)

    def complete(self, number: int) -> bool:
        return self._sets.get(number, 0) == self.fleet.everyone

    def go_to(self, number: int) -> None:
        """Round `number` is the present one. Of the one before it is kept only that it was complete."""
        complete = self.complete(number - 1)
        self.round = number
        self._sets = {at: known for at, known in self._sets.items() if at in (number, number + 1)}
        if complete:
            self._sets[number - 1] = self.fleet.everyone


def shown(peers: Sequence[str], most: int = 3) -> str:
    """Peer ids by their last characters, as people tell them apart."""
    names = ", ".join(f"…{peer[-6:]}" for peer in peers[:most])
    return names + (f" and {len(peers) - most} more" if len(peers) > most else "")
