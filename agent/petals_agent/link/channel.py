"""Length-prefixed msgpack over a socketpair, with every message checked against its schema."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Generic, TypeVar

import msgpack
from pydantic import BaseModel, TypeAdapter, ValidationError

from petals_agent.errors import ContainerError

_LENGTH = struct.Struct(">I")
MAX_MESSAGE = 2**20

T = TypeVar("T")


class Channel(Generic[T]):
    """One end of the link; `receive` gives messages of the type that `incoming` describes."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, incoming: TypeAdapter[T]
    ) -> None:
        self._reader, self._writer, self._incoming = reader, writer, incoming

    @classmethod
    async def open(cls, end: socket.socket, incoming: TypeAdapter[T]) -> Channel[T]:
        end.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=end)
        return cls(reader, writer, incoming)

    def send(self, message: BaseModel) -> None:
        """Queue one message; never blocks (the messages are few and small). A dead peer is noticed by `receive`."""
        body = msgpack.packb(message.model_dump(), use_bin_type=True)
        if not self._writer.is_closing():
            self._writer.write(_LENGTH.pack(len(body)) + body)

    async def receive(self) -> T | None:
        """The next message; None when the other end is gone.

        Raises ContainerError on a message that does not fit the schema.
        """
        try:
            (size,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if size > MAX_MESSAGE:
                raise ContainerError(
                    f"a message of {size} bytes came over the link; the limit is {MAX_MESSAGE}"
                )
            body = await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        try:
            return self._incoming.validate_python(msgpack.unpackb(body, raw=False))
        except (ValidationError, ValueError, msgpack.UnpackException) as error:
            raise ContainerError(f"the other end of the link sent nonsense: {error}") from error

    def close(self) -> None:
        self._writer.close()
