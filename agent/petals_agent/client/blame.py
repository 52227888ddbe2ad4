"""After a failure: whose fault it was, whom to avoid for how long, and whether to try again."""

from __future__ import annotations

import enum
import re
import time
from collections.abc import Callable

from petals_agent.errors import ClientError

BAN = 15.0  # seconds, doubled with each failure in a row
MAX_BAN = 3600.0
BUSY_BAN = 5.0
MAX_BACK_OFF = 60.0
REFUSALS = 2  # as many peers call our request wrong before we believe it


class Fault(enum.Enum):
    """Who is to blame for a failed request."""

    PEER = "peer"  # gone, silent, or answers nonsense
    BUSY = "busy"  # healthy, but cannot take us now
    REQUEST = "request"  # says that the request is wrong


class PeerFailure(ClientError):
    """A request to one peer failed."""

    code = "peer"

    def __init__(self, peer_id: str, message: str, fault: Fault = Fault.PEER) -> None:
        super().__init__(f"server …{peer_id[-6:]}: {message}")
        self.peer_id = peer_id
        self.fault = fault


# There are no error codes on the wire, only texts (protocol.md §2.3): those of published servers and our own.
_BUSY = re.compile(
    r"AllocationFailed|Could not allocate|cache is full|cache units|CacheFull|Refused|is leaving|does not serve"
    r"|protocols? not supported|try again|try another|lasted longer"
)
_LATE = re.compile(r"took longer|did not arrive")
_REQUEST = re.compile(
    r"(ValueError|KeyError|AssertionError|TypeError|RequestError|LimitExceeded)\("
    r"|Maximum length exceeded|Cannot allocate KV cache for|max_length|max_batch_size|adapter .* not found|prompts for"
    r"|the limit here is|is expected|must be "
)


def fault_of(text: str) -> Fault:
    """Read an error text that a peer sent."""
    if _BUSY.search(text):
        return Fault.BUSY
    return Fault.REQUEST if _REQUEST.search(text) and not _LATE.search(text) else Fault.PEER


class Bans:
    """Peers to avoid for some time: 15 s after a failure, twice as long after each further one, until one success."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}
        self._streak: dict[str, int] = {}

    def failed(self, peer_id: str) -> None:
        """The peer did not do its work."""
        streak = self._streak[peer_id] = self._streak.get(peer_id, 0) + 1
        self._until[peer_id] = self._clock() + min(BAN * 2.0 ** (streak - 1), MAX_BAN)

    def busy(self, peer_id: str) -> None:
        """The peer is healthy but full or on its way."""
        self._until[peer_id] = max(self._until.get(peer_id, 0.0), self._clock() + BUSY_BAN)

    def succeeded(self, peer_id: str) -> None:
        """The peer did its work: its record is clean."""
        self._streak.pop(peer_id, None)
        self._until.pop(peer_id, None)

    def banned(self) -> set[str]:
        """Whom to avoid now."""
        now = self._clock()
        self._until = {peer: until for peer, until in self._until.items() if until > now}
        return set(self._until)


class Retry:
    """The attempts at one piece of work: counts failures, bans, and says how long to wait before the next attempt."""

    def __init__(self, bans: Bans, max_retries: int, what: str) -> None:
        self._bans = bans
        self._max_retries = max_retries
        self._what = what
        self._failures = 0
        self._refused: list[str] = []

    @property
    def avoided(self) -> set[str]:
        """Peers to leave out of the next route, unless nobody else is left."""
        return self._bans.banned() | set(self._refused)

    def failed(self, error: ClientError, *, innocent: bool = False) -> float:
        """Take in a failure; `innocent`: the peer only closed what had been idle for long.

        Returns the seconds to wait before the next attempt; raises ClientError when there is no point in one.
        """
        self._failures += 1
        if isinstance(error, PeerFailure) and not innocent:
            if error.fault is Fault.REQUEST:
                self._refused.append(error.peer_id)
            elif error.fault is Fault.BUSY:
                self._bans.busy(error.peer_id)
            else:
                self._bans.failed(error.peer_id)
        if len(self._refused) >= REFUSALS:
            raise ClientError(f"{self._what}: servers refuse the request: {error}") from error
        if self._failures > self._max_retries:
            raise ClientError(
                f"{self._what}: gave up after {self._failures} attempts; the last: {error}"
            ) from error
        return 0.0 if self._failures == 1 else min(2.0 ** (self._failures - 2), MAX_BACK_OFF)
