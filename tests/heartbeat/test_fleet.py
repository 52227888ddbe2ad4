"""Who is a member: lists that are no fleet, and records in the DHT that are none."""

from __future__ import annotations

import asyncio
import hashlib
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_agent.errors import ConfigError, SwarmError
from petals_agent.heartbeat.fleet import Group, Listed, peers_of
from petals_agent.heartbeat.messages import Answer, Heard, Known, Request, Who

_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def peer_id(number: int) -> str:
    """The sha256 multihash of some key, in base58."""
    value, text = int.from_bytes(b"\x12\x20" + hashlib.sha256(bytes([number])).digest(), "big"), ""
    while value:
        value, digit = divmod(value, 58)
        text = _BASE58[digit] + text
    return text


PEERS = sorted(map(peer_id, range(5)))
A, B = PEERS[0], PEERS[1]
JUNK = (
    st.none()
    | st.integers()
    | st.text(max_size=80)
    | st.binary(max_size=80)
    | st.tuples(st.text(max_size=3))
    | st.floats()
)


@given(st.dictionaries(JUNK | st.sampled_from(PEERS), JUNK, max_size=20))
def test_only_peer_ids_are_found_among_records(subkeys: dict[Any, Any]) -> None:
    assert peers_of(SimpleNamespace(value=subkeys)) == set(PEERS) & set(subkeys)


@given(JUNK)
def test_a_key_without_subkeys_is_nobody(value: Any) -> None:
    assert peers_of(SimpleNamespace(value=value)) == set() and peers_of(value) == set()


def test_lists_that_are_no_fleet() -> None:
    with pytest.raises(ConfigError, match="1 peers; a fleet has 2 to 100"):
        Listed([A, A], 3.0)
    with pytest.raises(ConfigError, match="101 peers"):
        Listed([f"{number}" for number in range(101)], 3.0)
    with pytest.raises(ConfigError, match=f"does not name this host, whose peer id is {B}"):
        Listed([A, "c"], 3.0).check_member(B)


def test_lists_are_compared_by_what_is_in_them() -> None:
    assert Listed([A, B], 3.0).name == Listed([B, A, B], 3.0).name
    names = {Listed([A, B], 3.0).name, Listed([A, "c"], 3.0).name, Listed([A, B], 4.0).name}
    assert len(names) == 3


@pytest.mark.parametrize("size", [1, 101])
def test_sizes_that_are_no_fleet(size: int) -> None:
    with pytest.raises(ConfigError, match=f"heartbeat.size is {size}"):
        Group("g", size, 3.0, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answers", "seen"),
    [
        ({}, (PEERS[3], set())),
        ({PEERS[4]: Known(life=b"1" * 8, token=None)}, (PEERS[3], {PEERS[4]})),
        ({PEERS[4]: Known(life=b"1" * 8, token=9)}, (PEERS[3], set())),
        (
            {PEERS[1]: Known(life=b"1" * 8, token=None), PEERS[2]: Known(life=b"2" * 8, token=3)},
            (PEERS[1], set()),
        ),
        ({PEERS[0]: Heard(), PEERS[2]: Known(life=b"2" * 8, token=3)}, (PEERS[2], set())),
    ],
)
async def test_the_first_member_is_the_lowest_that_answers(
    answers: dict[str, Answer], seen: tuple[str, set[str]]
) -> None:
    asked = []

    async def ask(peer: str, request: Request, timeout: float) -> Answer:
        assert request == Who(fleet=group.name) and timeout == 1.0
        asked.append(peer)
        if peer not in answers:
            raise SwarmError("no answer")
        return answers[peer]

    class Node:
        """What a DHT gives back, whoever stored it."""

        async def get(self, key: str, **options: Any) -> Any:
            assert key == "_petals-agent.heartbeat.g"
            return SimpleNamespace(value={peer: 1 for peer in [*PEERS, "junk"]})

    async def node() -> Any:
        return Node()

    group = Group("g", None, 3.0, node)
    assert await group.look(PEERS[3], ask, 1.0) == seen
    assert sorted(asked) == PEERS[:3] + (PEERS[4:] if seen[0] == PEERS[3] else []), "others only by the first"


def test_only_who_can_be_asked_is_a_member() -> None:
    """Names come from whoever is the first member of a group."""
    group = Group("g", None, 3.0, None)  # type: ignore[arg-type]
    assert group.admits(A)
    assert not any(map(group.admits, ("junk", "", "<script>", "1" * 46, "Qm" + "1" * 44)))


class Cancelling:
    """A DHT node whose p2pd is replaced: hivemind cancels what waits for it."""

    async def get(self, key: str, **options: Any) -> Any:
        raise asyncio.CancelledError

    store = get


async def cancelling() -> Any:
    return Cancelling()


async def nobody(peer: str, request: Request, timeout: float) -> Answer:
    raise AssertionError("nobody is known")


async def test_what_hivemind_cancels_does_not_end_us() -> None:
    group = Group("g", None, 3.0, cancelling)
    with pytest.raises(SwarmError, match="cannot be asked for group g"):
        await group.look(A, nobody, 1.0)
    known = asyncio.create_task(group.keep_known(A))
    await asyncio.sleep(0.05)
    assert not known.done()
    known.cancel()
    with pytest.raises(asyncio.CancelledError):
        await known


async def test_we_can_be_cancelled_while_the_dht_is_asked() -> None:
    never = asyncio.Event()

    async def node() -> Any:
        await never.wait()

    looking = asyncio.create_task(Group("g", None, 3.0, node).look(A, nobody, 1.0))
    await asyncio.sleep(0.01)
    looking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await looking


async def test_a_dht_that_does_not_answer_is_said() -> None:
    async def node() -> Any:
        raise RuntimeError("p2pd is gone")

    with pytest.raises(SwarmError, match=r"cannot be asked for group g.*p2pd is gone"):
        await Group("g", None, 3.0, node).look(A, nobody, 1.0)
