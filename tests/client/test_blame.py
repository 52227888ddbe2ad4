"""Bans and retries: whose fault, how long, when to stop."""

from __future__ import annotations

import pytest

from petals_agent.client.blame import Bans, Fault, PeerFailure, Retry, fault_of
from petals_agent.errors import ClientError


class Clock:
    """A clock that stands still until it is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("ValueError('Received 3 prompts for 4 backends')", Fault.REQUEST),
        ("Maximum length exceeded: prefix 5 + current 3 exceeds pre-allocated maximum 7", Fault.REQUEST),
        ("Cannot allocate KV cache for 99999 tokens, max = 2048", Fault.REQUEST),
        ("KeyError('adapter x not found')", Fault.REQUEST),
        ("Could not allocate 1000 bytes immediately: out of memory", Fault.BUSY),
        ("Remote peer does not serve tiny.3", Fault.BUSY),
        ("failed to negotiate protocol: protocols not supported: [X.rpc_y]", Fault.BUSY),
        ("5 cache units were asked for and 3 are free; try again or send alloc_timeout", Fault.BUSY),
        ("this server is leaving: open a new session at another one", Fault.BUSY),
        ("hypo_ids must be [3] with values from 0 to 2", Fault.REQUEST),
        ("LimitExceeded('the request took longer than request_timeout (180 s)')", Fault.PEER),
        ("", Fault.PEER),
        ("TimeoutError()", Fault.PEER),
        ("RuntimeError('CUDA error: device-side assert triggered')", Fault.PEER),
    ],
)
def test_whose_fault(text: str, fault: Fault) -> None:
    assert fault_of(text) is fault


def test_bans_double_until_a_success() -> None:
    clock = Clock()
    bans = Bans(clock)
    for seconds in (15, 30, 60):
        bans.failed("a")
        clock.now += seconds - 1
        assert bans.banned() == {"a"}
        clock.now += 1
        assert bans.banned() == set()
    bans.failed("a")
    bans.succeeded("a")
    assert bans.banned() == set()
    bans.failed("a")
    clock.now += 15
    assert bans.banned() == set()


def test_a_busy_peer_is_left_alone_for_a_moment_only() -> None:
    clock = Clock()
    bans = Bans(clock)
    bans.busy("a")
    bans.busy("a")
    assert bans.banned() == {"a"}
    clock.now = 5
    assert bans.banned() == set()


def test_back_off_then_give_up() -> None:
    retry = Retry(Bans(), 8, "step")
    waits = [retry.failed(PeerFailure("a", "lost")) for _ in range(8)]
    assert waits == [0, 1, 2, 4, 8, 16, 32, 60]
    with pytest.raises(ClientError, match=r"step: gave up after 9 attempts; .*lost"):
        retry.failed(PeerFailure("a", "lost"))


def test_a_refused_request_bans_nobody_and_ends_soon() -> None:
    bans = Bans()
    retry = Retry(bans, 8, "step")
    retry.failed(PeerFailure("a", "ValueError('no')", Fault.REQUEST))
    assert bans.banned() == set() and retry.avoided == {"a"}
    with pytest.raises(ClientError, match="refuse"):
        retry.failed(PeerFailure("b", "ValueError('no')", Fault.REQUEST))


def test_an_idle_stream_that_was_closed_is_nobodys_fault() -> None:
    bans = Bans()
    assert Retry(bans, 8, "step").failed(PeerFailure("a", "closed"), innocent=True) == 0
    assert bans.banned() == set()
