"""A swarm as arrays: one reading of the DHT with what cannot be true dropped, counted and capped.

The view has already hidden records that break the format. What is left may still lie: a span beyond the model, a life
of years, a rate of nothing or of 10^30, one of ten times the truth. All but the last are dropped. A rate counts for at
most `RATE_CAP` times the median, so that one liar can starve the blocks it claims of at most that much help.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from petals_agent.swarm.records import ServerInfo, ServerState
from petals_agent.swarm.view import Record, Span, SwarmView

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

RATE_CAP = 16.0  # × the median; of a thousand honest GPUs, the fastest is about 12 × the median
MIN_RATE, MAX_RATE = 1e-6, 1e9  # tokens/s; nobody serves slower or faster, whatever the median is made to be
RATE_FLOOR = 1e-3  # × the median; who serves slower than this is as good as nobody
MAX_LIFE_S = 86400.0  # seconds; a record that would outlive its server by days is a lie
FOLLOWER = "petals-agent"  # how the `version` of a server begins that moves by this package's plan
FIXED = "(fixed)"  # how it ends if that server stays where it is all the same


@dataclass(frozen=True)
class Server:
    """One row of a snapshot: a span [start, start + length) at `rate` tokens/s."""

    peer: str
    start: int
    length: int
    rate: float
    joining: bool = False
    relayed: bool = False
    follows: bool = False  # moves by our plan, so others may count on it

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Who holds what, ordered by peer id; `starts`, `lengths`, `rates` and the flags have one entry a server.

    Rates are tokens/s, `taken_at` is DHT time in seconds. `left` are the peers that said OFFLINE, `unread` counts block
    keys that did not answer, `dropped` the servers whose records are not believed.
    """

    num_blocks: int
    peers: tuple[str, ...]
    starts: Ints
    lengths: Ints
    rates: Floats
    joining: Bools
    relayed: Bools
    follows: Bools
    taken_at: float = 0.0
    left: frozenset[str] = frozenset()
    unread: int = 0
    dropped: int = 0
    rows: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", {peer: row for row, peer in enumerate(self.peers)})

    @classmethod
    def of(
        cls,
        num_blocks: int,
        servers: Iterable[Server],
        *,
        taken_at: float = 0.0,
        left: Iterable[str] = (),
        unread: int = 0,
        dropped: int = 0,
    ) -> Snapshot:
        """Build from rows in any order; those that cannot be true are dropped and counted, high rates are capped."""
        given = sorted(servers, key=lambda server: server.peer)
        fits = [s for s in given if 0 <= s.start and 1 <= s.length and s.end <= num_blocks]
        rates = np.array([s.rate for s in fits], float)
        usable = rates[(rates >= MIN_RATE) & (rates <= MAX_RATE)]
        median = float(np.median(usable)) if len(usable) else 1.0
        floor = max(MIN_RATE, RATE_FLOOR * median)
        kept = [s for s in fits if floor <= s.rate <= MAX_RATE]
        return cls(
            num_blocks,
            tuple(s.peer for s in kept),
            np.array([s.start for s in kept], np.int64),
            np.array([s.length for s in kept], np.int64),
            np.minimum(np.array([s.rate for s in kept], float), RATE_CAP * median),
            np.array([s.joining for s in kept], bool),
            np.array([s.relayed for s in kept], bool),
            np.array([s.follows for s in kept], bool),
            taken_at,
            frozenset(left),
            unread,
            dropped + len(given) - len(kept),
        )

    @classmethod
    def from_view(cls, view: SwarmView) -> Snapshot:
        """The servers of `view` that are JOINING or ONLINE; one that is ONLINE and loads other blocks counts there.

        So others see a move from its beginning, and do not rush to the gap that it is about to fill; nor do they rely
        on the blocks that it is about to leave.
        """
        every = {record.peer_id for record in view.records}
        latest = view.taken_at + MAX_LIFE_S
        view = replace(view, records=tuple(record for record in view.records if record.expires <= latest))
        spans = view.spans(ServerState.OFFLINE)
        heading = _heading(view, spans)
        present = [span for span in spans if span.info.state is not ServerState.OFFLINE]
        believed = [
            heading.get(span.peer_id, span)
            for span in present
            if max(span.info.end_block or 0, heading.get(span.peer_id, span).end) <= view.num_blocks
        ]
        servers = (
            Server(
                span.peer_id,
                span.start,
                span.length,
                span.info.throughput,
                joining=span.info.state is ServerState.JOINING,
                relayed=bool(span.info.using_relay),
                follows=follows_plan(span.info),
            )
            for span in believed
        )
        return cls.of(
            view.num_blocks,
            servers,
            taken_at=view.taken_at,
            left=(span.peer_id for span in spans if span.info.state is ServerState.OFFLINE),
            unread=len(view.unread),
            dropped=len(every) - len(spans) + len(present) - len(believed),
        )

    def __len__(self) -> int:
        return len(self.peers)

    def server(self, row: int) -> Server:
        """One row as an object."""
        return Server(
            self.peers[row],
            int(self.starts[row]),
            int(self.lengths[row]),
            float(self.rates[row]),
            bool(self.joining[row]),
            bool(self.relayed[row]),
            bool(self.follows[row]),
        )

    def having(self, server: Server) -> Snapshot:
        """This snapshot with `server` in place of what the DHT says of it: of itself, a server knows better."""
        row = self.rows.get(server.peer)
        if row is not None and self.server(row) == server:
            return self
        others = [self.server(i) for i in range(len(self)) if i != row]
        return Snapshot.of(
            self.num_blocks,
            [*others, server],
            taken_at=self.taken_at,
            left=self.left - {server.peer},
            unread=self.unread,
            dropped=self.dropped,
        )

    def without(self, peer: str) -> Snapshot:
        """This snapshot without one server."""
        row = self.rows.get(peer)
        if row is None:
            return self
        rest = np.arange(len(self)) != row
        return replace(
            self,
            peers=tuple(p for p in self.peers if p != peer),
            **{
                name: getattr(self, name)[rest]
                for name in ("starts", "lengths", "rates", "joining", "relayed", "follows")
            },
        )

    @cached_property
    def inside(self) -> Bools:
        """(servers, blocks): whether the server's span contains the block."""
        blocks = np.arange(self.num_blocks)
        return (blocks >= self.starts[:, None]) & (blocks < (self.starts + self.lengths)[:, None])

    @cached_property
    def throughput(self) -> Floats:
        """(blocks,): the summed rate of each block's servers, those that are JOINING included."""
        return np.asarray(self.rates @ self.inside, dtype=float)

    @cached_property
    def fair(self) -> float:
        """Σ rate·length ÷ blocks: each block's throughput if the swarm could be spread like a fluid, tokens/s."""
        return float(self.rates @ self.lengths) / self.num_blocks

    @property
    def quality(self) -> float:
        """The weakest block's throughput as a share of `fair`; 0 in an empty swarm."""
        return float(self.throughput.min()) / self.fair if self.fair > 0 else 0.0

    def holders(self, rows: Bools | None = None) -> Ints:
        """(blocks,): how many servers hold each block; `rows` selects which of them count."""
        counted = slice(None) if rows is None else rows
        starts, lengths = self.starts[counted], self.lengths[counted]
        come, go = (np.bincount(at, minlength=self.num_blocks + 1) for at in (starts, starts + lengths))
        return np.asarray((come - go).cumsum()[:-1], dtype=np.int64)


def _heading(view: SwarmView, spans: Iterable[Span]) -> dict[str, Span]:
    """Where the servers go that are ONLINE and, beside that, JOINING on other blocks.

    Such a server announces under JOINING only the runs of blocks that it does not hold yet. A run that touches what
    it serves and is shorter is the new end of a span as long as now; one that is apart is the whole new span.
    """
    serving = {span.peer_id: span for span in spans if span.info.state is ServerState.ONLINE}
    loading: dict[str, list[Record]] = {}
    for record in view.records:
        span = serving.get(record.peer_id)
        if span and record.info.state is ServerState.JOINING and not span.start <= record.block < span.end:
            loading.setdefault(record.peer_id, []).append(record)
    found = {}
    for peer, records in loading.items():
        span = serving[peer]
        runs = [record.range or (record.block, record.block + 1) for record in records]
        first, last = min(run[0] for run in runs), max(run[1] for run in runs)
        if first == span.end:
            first = min(first, last - span.length)
        elif last == span.start:
            last = max(last, first + span.length)
        found[peer] = Span(peer, first, last, records[-1].info)
    return found


def follows_plan(info: ServerInfo) -> bool:
    """Whether a server moves by this package's plan, by its version; all others are taken to stay where they are."""
    version = info.version or ""
    return version.startswith(FOLLOWER) and not version.endswith(FIXED)
