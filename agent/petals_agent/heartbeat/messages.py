"""What members say to each other: small msgpack maps, each checked against a model and a size before it means anything."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgpack
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from petals_agent.errors import LimitExceeded, RequestError
from petals_agent.heartbeat.rules import MAX_MEMBERS, TOKENS
from petals_agent.printable import printable

PROTOCOL = "/petals-agent/heartbeat/1"
"""Name and version on the wire: members of another version do not find each other, and say so."""

LIMIT = 16 * 1024  # bytes of one message; the largest names all members
SET_BYTES = 16  # of a set of members, always, so that traffic does not depend on who is in it
MAX_REASON = 300


Life = Annotated[bytes, Field(min_length=8, max_length=8)]
Token = Annotated[int, Field(ge=0, lt=TOKENS)]
Number = Annotated[int, Field(ge=0, lt=2**48)]
Members = Annotated[bytes, Field(min_length=SET_BYTES, max_length=SET_BYTES)]
Name = Annotated[str, Field(max_length=200)]
Reason = Annotated[str, Field(max_length=MAX_REASON), AfterValidator(printable)]


class Message(BaseModel):
    """Frozen, and exact about types; fields of later versions are ignored."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class Join(Message):
    """To the first member, at the start: I am there, in this life of mine."""

    kind: Literal["join"] = "join"
    fleet: Name
    life: Life


class Beat(Message):
    """In a round, to a witness: I take part, and so do those who are `known` to me."""

    kind: Literal["beat"] = "beat"
    life: Life
    token: Token
    round: Number
    known: Members


class Who(Message):
    """Who are you now? The answer is fresh, whatever came late or twice before."""

    kind: Literal["who"] = "who"
    fleet: Name


class Alarm(Message):
    """It is over for all of us."""

    kind: Literal["alarm"] = "alarm"
    life: Life
    reason: Reason


class Wait(Message):
    """To Join: not all are there; ask again."""

    kind: Literal["wait"] = "wait"
    here: Annotated[int, Field(ge=0, le=MAX_MEMBERS)]


class Elsewhere(Message):
    """To Join: somebody else is the first member."""

    kind: Literal["elsewhere"] = "elsewhere"


class Start(Message):
    """To Join: all are there; these are the members in the lives that they joined in, and this is our token."""

    kind: Literal["start"] = "start"
    token: Token
    lives: Annotated[dict[Annotated[str, Field(max_length=64)], Life], Field(max_length=MAX_MEMBERS)]


class Unequal(Message):
    """To Join: we run already, with a token that you do not have."""

    kind: Literal["unequal"] = "unequal"
    reason: Reason


class Known(Message):
    """To Beat and Who: who I am, at which round, and whom I know to take part in the round that was asked about.

    `token` is None before the start. The round begins in `next_in` seconds, or has begun.
    """

    kind: Literal["known"] = "known"
    life: Life
    token: Token | None
    round: Number = 0
    known: Members = bytes(SET_BYTES)
    next_in: Annotated[float, Field(ge=0, le=1e9)] = 0.0


class Heard(Message):
    """To Alarm."""

    kind: Literal["heard"] = "heard"


Request = Join | Beat | Who | Alarm
Answer = Wait | Elsewhere | Start | Unequal | Known | Heard
_REQUEST: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="kind")])
_ANSWER: TypeAdapter[Answer] = TypeAdapter(Annotated[Answer, Field(discriminator="kind")])
_T = TypeVar("_T")


def encode(message: Request | Answer) -> bytes:
    """At most LIMIT bytes, by what the models allow."""
    body: bytes = msgpack.packb(message.model_dump())
    return body


def read_request(body: bytes) -> Request:
    """Raises LimitExceeded or RequestError that says what is wrong with it."""
    return _read(_REQUEST, body)


def read_answer(body: bytes) -> Answer:
    """Raises LimitExceeded or RequestError that says what is wrong with it."""
    return _read(_ANSWER, body)


def _read(adapter: TypeAdapter[_T], body: bytes) -> _T:
    if len(body) > LIMIT:
        raise LimitExceeded(f"a heartbeat message has {len(body)} bytes; the limit is {LIMIT}")
    try:
        return adapter.validate_python(msgpack.unpackb(body))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise RequestError(f"no heartbeat message of version 1 ({where}: {first['msg']})") from None
    except Exception as error:  # whatever strangers can make a decoder raise
        raise RequestError(f"no heartbeat message: {error!r:.200}") from None


def packed(members: int) -> bytes:
    """A set of members on the wire."""
    return members.to_bytes(SET_BYTES, "little")


def unpacked(members: bytes) -> int:
    """A set of members from the wire."""
    return int.from_bytes(members, "little")
