"""Who belongs to the fleet: a list of peer ids that all members have, or a named group that finds itself in the DHT.

A record in the DHT proves nothing: anybody can store one under anybody's name. It is a hint whom to ask, and only who answers as
the owner of that peer id counts. Whoever knows a group's name can join it: in a swarm of strangers, list the members.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from petals_agent.errors import AgentError, ConfigError, SwarmError
from petals_agent.heartbeat.messages import Answer, Known, Request, Who
from petals_agent.heartbeat.rules import MAX_MEMBERS
from petals_agent.swarm.uids import check_peer_id

if TYPE_CHECKING:
    from hivemind.dht.node import DHTNode

log = logging.getLogger("petals_agent.heartbeat")

_T = TypeVar("_T")
Ask = Callable[[str, Request, float], Awaitable[Answer]]
"""Ask a member (peer id) within so many seconds; raises SwarmError if there is no answer, or a refusal."""

RECORD_S = 60.0  # a record lives so long
_STORE_S = 20.0  # and is stored so often
_DHT_TIMEOUT_S = 10.0
_MAX_RECORDS = 4 * MAX_MEMBERS  # looked at, for some may be garbage
_AT_ONCE = 32


class Roll(Protocol):
    """How the fleet's members are known before the start."""

    name: str  # the same for all members of one fleet, and no others
    size: int | None  # how many there will be; None: those who come

    def admits(self, peer_id: str) -> bool:
        """Whether this peer may be a member."""

    async def look(self, me: str, ask: Ask, timeout: float) -> tuple[str, set[str]]:
        """Member 0 as far as can be seen now, and if that is us, who else is on its way to us.

        `timeout` seconds for each peer that is asked. Raises SwarmError when nothing can be seen.
        """

    async def keep_known(self, me: str) -> None:
        """As a task: let the others find us."""


class Listed:
    """The members are those of a list, in any order."""

    def __init__(self, members: Sequence[str], period: float) -> None:
        """Raises ConfigError for a list that is no fleet."""
        self.members = tuple(sorted(set(members)))
        if not 2 <= len(self.members) <= MAX_MEMBERS:
            raise ConfigError(
                f"heartbeat.members names {len(self.members)} peers; a fleet has 2 to {MAX_MEMBERS} members"
            )
        self.size: int | None = len(self.members)
        digest = hashlib.sha256(" ".join(self.members).encode()).hexdigest()[:8]
        self.name = f"{self.size} listed members ({digest}), period {period:g} s"

    def check_member(self, me: str) -> None:
        """Raises ConfigError when we are not among them."""
        if me not in self.members:
            raise ConfigError(
                f"heartbeat.members does not name this host, whose peer id is {me}; add it to all lists"
            )

    def admits(self, peer_id: str) -> bool:
        return peer_id in self.members

    async def look(self, me: str, ask: Ask, timeout: float) -> tuple[str, set[str]]:
        return self.members[0], set()

    async def keep_known(self, me: str) -> None:
        await asyncio.Event().wait()


class Group:
    """The members are those who are there under one name when it starts: `size` of them, or all who come."""

    def __init__(
        self, group: str, size: int | None, period: float, node: Callable[[], Awaitable[DHTNode]]
    ) -> None:
        """`node` gives the present DHT node. Raises ConfigError for a size that is no fleet's."""
        if size is not None and not 2 <= size <= MAX_MEMBERS:
            raise ConfigError(f"heartbeat.size is {size}; a fleet has 2 to {MAX_MEMBERS} members")
        self.size = size
        self.name = f"group {group}, size {size or 'auto'}, period {period:g} s"
        self._key = f"_petals-agent.heartbeat.{group}"
        self._node = node

    def admits(self, peer_id: str) -> bool:
        """Whoever can be asked; what names a member is a text from somebody else."""
        try:
            check_peer_id(peer_id)
        except ValueError:
            return False
        return True

    async def look(self, me: str, ask: Ask, timeout: float) -> tuple[str, set[str]]:
        """Member 0 is the lowest peer id that answers as a member of this group."""
        peers = await self._read()
        for some in _few([peer for peer in peers if peer < me]):
            if there := await self._answering(some, ask, timeout):
                return min(there), set()
        coming: set[str] = set()
        for some in _few([peer for peer in peers if peer > me]):
            there = await self._answering(some, ask, timeout)
            coming |= {peer for peer, answer in there.items() if answer.token is None}
        return me, coming

    async def _answering(self, peers: Sequence[str], ask: Ask, timeout: float) -> dict[str, Known]:
        async def who(peer: str) -> Answer | None:
            try:
                return await ask(peer, Who(fleet=self.name), timeout)
            except AgentError as error:
                log.debug("…%s is no member: %s", peer[-6:], error)
                return None

        answers = await asyncio.gather(*map(who, peers))
        return {
            peer: answer for peer, answer in zip(peers, answers, strict=True) if isinstance(answer, Known)
        }

    async def keep_known(self, me: str) -> None:
        while True:
            try:
                await self._store(me)
            except SwarmError as error:
                log.debug("%s", error)
            await asyncio.sleep(_STORE_S)

    async def _store(self, me: str) -> None:
        from hivemind.utils.timed_storage import get_dht_time

        async def store(node: DHTNode) -> bool:
            return bool(await node.store(self._key, 1, get_dht_time() + RECORD_S, subkey=me))

        if not await self._with_node(store):
            raise SwarmError(f"the DHT did not take our record of {self.name}")

    async def _read(self) -> list[str]:
        """Peer ids that have a record, in order; what is none is left out."""

        async def read(node: DHTNode) -> Any:
            return await node.get(self._key, sufficient_expiration_time=math.inf)

        return sorted(peers_of(await self._with_node(read)))[:_MAX_RECORDS]

    async def _with_node(self, action: Callable[[DHTNode], Awaitable[_T]]) -> _T:
        """Raises SwarmError for whatever hivemind raises; when p2pd is replaced, it cancels what it was doing for us."""
        try:
            async with asyncio.timeout(_DHT_TIMEOUT_S):
                return await action(await self._node())
        except (Exception, asyncio.CancelledError) as error:
            if we_are_cancelled(error):
                raise
            raise SwarmError(f"the DHT cannot be asked for {self.name}: {error!r:.200}") from error


def we_are_cancelled(error: BaseException) -> bool:
    """And not only something that hivemind was doing for us."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


def _few(peers: Sequence[str]) -> Iterator[Sequence[str]]:
    """So many at a time as are asked side by side."""
    for start in range(0, len(peers), _AT_ONCE):
        yield peers[start : start + _AT_ONCE]


def peers_of(found: Any) -> set[str]:
    """The peer ids among the subkeys of what `DHTNode.get` returned, whatever others have stored there."""
    value = getattr(found, "value", None)
    peers = set()
    for subkey in value if isinstance(value, dict) else ():
        try:
            peers.add(check_peer_id(subkey))
        except ValueError:
            continue
    return peers
