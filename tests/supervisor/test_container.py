"""The agent's end of the link, with a process that lives and a container that says what a test wants."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import BaseModel

from petals_agent import __version__
from petals_agent.errors import AgentError, CheckpointError, ConfigError, ContainerError
from petals_agent.link import messages
from petals_agent.link.channel import Channel
from petals_agent.processes import describe_exit, start_child
from petals_agent.supervisor.container import ContainerProcess


class Scripted:
    """The other end: reads what the agent sends, answers as told."""

    def __init__(self, channel: Channel[Any], raw: socket.socket) -> None:
        self.channel, self.raw = channel, raw

    async def answer(self, *answers: BaseModel) -> Any:
        """Wait for one message and send these."""
        message = await asyncio.wait_for(self.channel.receive(), 10)
        for answer in answers:
            self.channel.send(answer)
        return message


Pair = tuple[ContainerProcess, Scripted]


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    ours, theirs = socket.socketpair()
    process = await start_child(["sleep", "60"])
    container = ContainerProcess(process, await Channel.open(ours, messages.TO_AGENT))
    scripted = Scripted(await Channel.open(theirs, messages.TO_CONTAINER), theirs)
    yield container, scripted
    await container.stop(grace=0.0)
    scripted.channel.close()
    assert not container.alive


HELLO = messages.Hello(package=__version__, pid=1)
LOAD = messages.Load(start=0, end=1)
FAILED = messages.Failed(doing="load", code="checkpoint", exit_code=66, message="x.safetensors is torn")


async def test_hello(pair: Pair) -> None:
    pair[1].channel.send(HELLO)
    await pair[0].hello(5.0)


@pytest.mark.parametrize(
    "hello",
    [messages.Hello(package="0.0.0", pid=1), messages.Hello(package=__version__, pid=1, version=99)],
)
async def test_container_of_another_version(pair: Pair, hello: messages.Hello) -> None:
    pair[1].channel.send(hello)
    with pytest.raises(AgentError, match="start the agent again") as raised:
        await pair[0].hello(5.0)
    assert not isinstance(raised.value, ContainerError)  # the next one would be no other


async def test_silence(pair: Pair) -> None:
    with pytest.raises(ContainerError, match=r"did not say hello within 0\.1 s"):
        await pair[0].hello(0.1)
    with pytest.raises(ContainerError, match=r"did not drain within 0\.1 s"):
        await pair[0].request(messages.Drain(timeout=0), messages.Drained, 0.1)


async def test_log_level(pair: Pair) -> None:
    pair[0].tell(messages.SetLog(level="debug"))
    assert await pair[1].answer() == messages.SetLog(level="debug")
    with pytest.raises(ValueError, match="warning"):
        messages.SetLog.model_validate({"level": "loud"})


async def test_answer_between_other_messages(pair: Pair) -> None:
    container, scripted = pair
    told: list[messages.Progress] = []
    container.on_progress = told.append
    progress = messages.Progress(text="loading", done=1, total=2)
    beat = messages.Beat(loop_lag_s=0.0, tokens=5)
    answering = asyncio.create_task(scripted.answer(progress, beat, messages.Drained(in_flight=3)))
    assert (await container.request(messages.Drain(timeout=1.0), messages.Drained, 5.0)).in_flight == 3
    assert await answering == messages.Drain(timeout=1.0)
    assert told == [progress] and container.beat == beat


async def test_failure_comes_as_the_error_that_it_was(pair: Pair) -> None:
    answering = asyncio.create_task(pair[1].answer(FAILED))
    with pytest.raises(CheckpointError, match=r"x\.safetensors is torn") as raised:
        await pair[0].request(LOAD, messages.Loaded, 5.0)
    assert raised.value.exit_code == 66
    await answering


@pytest.mark.parametrize(
    ("code", "kind"), [("config", ConfigError), ("internal", ContainerError), ("?", ContainerError)]
)
async def test_kinds_of_failures(pair: Pair, code: str, kind: type[Exception]) -> None:
    failed = messages.Failed(doing="load", code=code, exit_code=70, message="no")
    answering = asyncio.create_task(pair[1].answer(failed))
    with pytest.raises(kind):
        await pair[0].request(LOAD, messages.Loaded, 5.0)
    await answering


async def test_death_while_waiting(pair: Pair) -> None:
    waiting = asyncio.create_task(pair[0].request(LOAD, messages.Loaded, None))
    await pair[1].answer()
    pair[0].kill()
    with pytest.raises(ContainerError, match=r"ended \(killed by signal 9\) before it could load"):
        await asyncio.wait_for(waiting, 5)
    assert await pair[0].ended() == "the container ended: killed by signal 9"


async def test_one_request_at_a_time(pair: Pair) -> None:
    waiting = asyncio.create_task(pair[0].request(LOAD, messages.Loaded, None))
    await pair[1].answer()
    with pytest.raises(ContainerError, match="before the answer to another one"):
        await pair[0].request(LOAD, messages.Loaded, 1.0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_late_answer_is_not_taken_for_the_next_one(pair: Pair) -> None:
    container, scripted = pair
    with pytest.raises(ContainerError, match="within"):
        await container.request(messages.Drain(timeout=0), messages.Drained, 0.05)
    await scripted.answer(messages.Drained(in_flight=9))
    answering = asyncio.create_task(scripted.answer(messages.Attached()))
    attach = messages.Attach(daemon="/unix/x", peer_id="Qm", client_mode=False)
    assert isinstance(await container.request(attach, messages.Attached, 5.0), messages.Attached)
    await answering


async def test_nonsense_is_the_end_of_it(pair: Pair) -> None:
    pair[1].raw.sendall(struct.pack(">I", 3) + b"\xc1\xc1\xc1")
    assert await asyncio.wait_for(pair[0].ended(), 5) == "the container ended: killed by signal 9"


async def test_stop_asks_before_it_kills(pair: Pair) -> None:
    stopping = asyncio.create_task(pair[0].stop(grace=5.0))
    assert isinstance(await pair[1].answer(), messages.Stop)
    pair[0].kill()  # as if it had ended by itself
    await asyncio.wait_for(stopping, 5)


def test_exits_in_words() -> None:
    assert describe_exit(-11) == "killed by signal 11" and describe_exit(3) == "exit status 3"
