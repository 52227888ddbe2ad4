"""Messages come back as they were, are small, and nothing else passes for one."""

from __future__ import annotations

import contextlib

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_agent.errors import LimitExceeded, RequestError
from petals_agent.heartbeat import messages
from petals_agent.heartbeat.messages import (
    LIMIT,
    Alarm,
    Beat,
    Elsewhere,
    Heard,
    Join,
    Known,
    Start,
    Unequal,
    Wait,
    Who,
    encode,
    packed,
    read_answer,
    read_request,
    unpacked,
)
from petals_agent.heartbeat.rules import MAX_MEMBERS

LIFE = b"12345678"
REQUESTS = (
    Join(fleet="f", life=LIFE),
    Beat(life=LIFE, token=65534, round=2**40, known=packed(7)),
    Who(fleet="f"),
    Alarm(life=LIFE, reason="x" * 300),
)
ANSWERS = (
    Wait(here=3),
    Elsewhere(),
    Start(token=0, lives={f"Qm{number:062d}": LIFE for number in range(MAX_MEMBERS)}),
    Unequal(reason="r"),
    Known(life=LIFE, token=None),
    Known(life=LIFE, token=5, round=9, known=packed(2**100 - 1), next_in=2.5),
    Heard(),
)


@pytest.mark.parametrize("request_", REQUESTS)
def test_requests_come_back(request_: messages.Request) -> None:
    assert read_request(encode(request_)) == request_ and len(encode(request_)) < 400


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_come_back(answer: messages.Answer) -> None:
    assert read_answer(encode(answer)) == answer and len(encode(answer)) < LIMIT


def test_what_a_round_sends_does_not_grow_with_the_fleet() -> None:
    beats = [Beat(life=LIFE, token=1, round=1, known=packed(2**count - 1)) for count in (2, 100)]
    assert len({len(encode(beat)) for beat in beats}) == 1


@given(st.integers(0, 2**128 - 1))
def test_sets_come_back(members: int) -> None:
    assert unpacked(packed(members)) == members


WRONG = {
    "empty": b"",
    "no msgpack": b"\xc1",
    "no map": msgpack.packb([1, 2]),
    "unknown kind": msgpack.packb({"kind": "kill"}),
    "an answer": encode(Heard()),
    "token too large": msgpack.packb(
        {"kind": "beat", "life": LIFE, "token": 65535, "round": 1, "known": b"0" * 16}
    ),
    "token below zero": msgpack.packb(
        {"kind": "beat", "life": LIFE, "token": -1, "round": 1, "known": b"0" * 16}
    ),
    "token a text": msgpack.packb(
        {"kind": "beat", "life": LIFE, "token": "1", "round": 1, "known": b"0" * 16}
    ),
    "life too short": msgpack.packb({"kind": "join", "fleet": "f", "life": b"1"}),
    "set too long": msgpack.packb({"kind": "beat", "life": LIFE, "token": 1, "round": 1, "known": b"0" * 17}),
    "round too large": msgpack.packb(
        {"kind": "beat", "life": LIFE, "token": 1, "round": 2**50, "known": b"0" * 16}
    ),
    "reason too long": msgpack.packb({"kind": "alarm", "life": LIFE, "reason": "x" * 301}),
    "deep": b"\x91" * 10000 + b"\xc0",
    "huge claim": b"\xdd\xff\xff\xff\xff",
}


@pytest.mark.parametrize("name", WRONG)
def test_anything_else_is_refused_with_words(name: str) -> None:
    with pytest.raises(RequestError, match="heartbeat message"):
        read_request(WRONG[name])


def test_words_of_others_steer_no_terminal() -> None:
    alarm = read_request(encode(Alarm(life=LIFE, reason="\x1b[2Jgone\r\n")))
    assert isinstance(alarm, Alarm) and alarm.reason == " [2Jgone  "


def test_size_is_looked_at_first() -> None:
    with pytest.raises(LimitExceeded, match=str(LIMIT)):
        read_request(encode(Who(fleet="f")) + bytes(LIMIT))


def test_too_many_members_are_refused() -> None:
    lives = {f"p{number}": LIFE for number in range(MAX_MEMBERS + 1)}
    with pytest.raises(RequestError):
        read_answer(msgpack.packb({"kind": "start", "token": 1, "lives": lives}))


def test_a_later_version_may_add_fields() -> None:
    body = msgpack.packb({"kind": "who", "fleet": "f", "colour": "red"})
    assert read_request(body) == Who(fleet="f")


@given(st.binary(max_size=300))
def test_no_bytes_do_harm(body: bytes) -> None:
    with contextlib.suppress(RequestError):
        read_request(body)
    with contextlib.suppress(RequestError):
        read_answer(body)
