"""Requests to a running p2pd over its control socket, each on a connection of its own and with a deadline.

hivemind's client keeps one address for its stream handlers and can remove only those. We also remove what a dead process
left behind, and ask a daemon whether it still answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from petals_agent.errors import DaemonError
from petals_agent.p2p import light

light.install(without_torch=False)

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # noqa: E402
from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID  # noqa: E402
from hivemind.proto import p2pd_pb2  # noqa: E402
from hivemind.utils.multiaddr import Multiaddr  # noqa: E402

log = logging.getLogger("petals_agent.p2p")

MAX_REPLY = 4 * 2**20


def unix_path(maddr: str) -> str:
    """`/unix/tmp/x.sock` → `/tmp/x.sock`."""
    return maddr.removeprefix("/unix")


def unix_maddr_bytes(path: str) -> bytes:
    """The binary multiaddr of a unix socket."""
    return bytes(Multiaddr(f"/unix{path}").to_bytes())


def _peer_bytes(peer_id: str) -> bytes:
    return bytes(PeerID.from_base58(peer_id).to_bytes())


def varint(value: int) -> bytes:
    """Unsigned LEB128, as protobuf's delimited messages use it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


async def _read_varint(reader: asyncio.StreamReader) -> int:
    value = shift = 0
    while True:
        byte = (await reader.readexactly(1))[0]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
        shift += 7
        if shift > 35:
            raise DaemonError("p2pd sent a length that makes no sense; restart it")


async def _write(writer: asyncio.StreamWriter, message: p2pd_pb2.Request) -> None:
    body = message.SerializeToString()
    writer.write(varint(len(body)) + body)
    await writer.drain()


async def _read(reader: asyncio.StreamReader, what: str) -> p2pd_pb2.Response:
    size = await _read_varint(reader)
    if size > MAX_REPLY:
        raise DaemonError(f"p2pd announced a reply of {size} bytes to {what}; the limit is {MAX_REPLY}")
    return p2pd_pb2.Response.FromString(await reader.readexactly(size))


async def _exchange(daemon: str, message: p2pd_pb2.Request, what: str) -> p2pd_pb2.Response:
    reader, writer = await asyncio.open_unix_connection(unix_path(daemon))
    try:
        await _write(writer, message)
        return await _read(reader, what)
    finally:
        writer.close()


async def request(daemon: str, message: p2pd_pb2.Request, timeout: float = 5.0) -> p2pd_pb2.Response:
    """Send one request to the daemon at multiaddr `daemon`.

    Raises DaemonError when it refuses, closes the connection, or does not answer within `timeout` seconds.
    """
    what = p2pd_pb2.Request.Type.Name(message.type)
    try:
        async with asyncio.timeout(timeout):  # wait_for loses a cancellation that comes with the answer
            reply = await _exchange(daemon, message, what)
    except TimeoutError:
        raise DaemonError(f"p2pd did not answer {what} within {timeout:g} s") from None
    except (OSError, EOFError) as error:
        raise DaemonError(f"p2pd is not there ({what}: {error!r})") from error
    except DecodeError as error:
        raise DaemonError(f"p2pd's reply to {what} makes no sense; restart it") from error
    if reply.type == p2pd_pb2.Response.ERROR:
        raise DaemonError(f"p2pd refused {what}: {reply.error.msg}")
    return reply


async def add_stream_handlers(daemon: str, listen_path: str, names: Sequence[str]) -> None:
    """Let the daemon open a connection to our socket `listen_path` for every stream to one of `names`."""
    for name in names:
        await request(
            daemon,
            p2pd_pb2.Request(
                type=p2pd_pb2.Request.STREAM_HANDLER,
                streamHandler=p2pd_pb2.StreamHandlerRequest(
                    addr=unix_maddr_bytes(listen_path), proto=[name], balanced=False
                ),
            ),
        )


async def remove_stream_handlers(daemon: str, listen_path: str, names: Sequence[str]) -> None:
    """Remove handlers by the address that registered them: also those of a process that is dead."""
    for name in names:
        await request(
            daemon,
            p2pd_pb2.Request(
                type=p2pd_pb2.Request.REMOVE_STREAM_HANDLER,
                removeStreamHandler=p2pd_pb2.RemoveStreamHandlerRequest(
                    addr=unix_maddr_bytes(listen_path), proto=[name]
                ),
            ),
        )


async def connect(daemon: str, peer_id: str, timeout: float) -> None:
    """Let the daemon find and dial a peer (base58); raises DaemonError when that fails or takes longer than `timeout` s."""
    message = p2pd_pb2.ConnectRequest(peer=_peer_bytes(peer_id))
    await request(daemon, p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=message), timeout)


async def dial(daemon: str, maddrs: Sequence[str], timeout: float) -> None:
    """Let the daemon connect to a peer at any of its multiaddresses (with /p2p/PEER); raises DaemonError."""
    if not maddrs:
        raise DaemonError("no address to dial is known")
    peer_id = maddrs[0].rsplit("/", 1)[1]
    addrs = [bytes(Multiaddr(maddr.rsplit("/p2p/", 1)[0]).to_bytes()) for maddr in maddrs]
    message = p2pd_pb2.ConnectRequest(peer=_peer_bytes(peer_id), addrs=addrs)
    await request(daemon, p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=message), timeout)


async def find_peer(daemon: str, peer_id: str, timeout: float) -> list[str]:
    """Multiaddresses of a peer (without its /p2p/ID) that the daemon knows or finds through libp2p's own routing.

    Raises DaemonError when it finds none, or takes longer than `timeout` s. Addresses that make no sense are left out.
    """
    message = p2pd_pb2.DHTRequest(type=p2pd_pb2.DHTRequest.FIND_PEER, peer=_peer_bytes(peer_id))
    reply = await request(daemon, p2pd_pb2.Request(type=p2pd_pb2.Request.DHT, dht=message), timeout)
    addresses = []
    for raw in reply.dht.peer.addrs:
        try:
            addresses.append(str(Multiaddr(raw)).rsplit(f"/p2p/{peer_id}", 1)[0])
        except Exception as error:  # whatever a parser does with bytes from a stranger
            log.debug("an address of …%s cannot be read: %r", peer_id[-6:], error)
    return addresses


async def disconnect(daemon: str, peer_id: str) -> None:
    """Let the daemon close its connections to a peer (base58); raises DaemonError."""
    message = p2pd_pb2.DisconnectRequest(peer=_peer_bytes(peer_id))
    await request(daemon, p2pd_pb2.Request(type=p2pd_pb2.Request.DISCONNECT, disconnect=message))


async def identify(daemon: str, timeout: float = 5.0) -> tuple[str, list[str]]:
    """The daemon's peer id (base58) and the multiaddresses it can be seen at; proof that it answers."""
    reply = await request(daemon, p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY), timeout)
    peer = PeerID(reply.identify.id)
    return peer.to_base58(), [f"{Multiaddr(raw)}/p2p/{peer.to_base58()}" for raw in reply.identify.addrs]


async def open_stream(
    daemon: str, peer_id: str, name: str, timeout: float
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Let the daemon open a stream for protocol `name` to a peer (base58), whose identity libp2p proves.

    Raises DaemonError when that fails or takes longer than `timeout` s.
    """
    message = p2pd_pb2.StreamOpenRequest(peer=_peer_bytes(peer_id), proto=[name])
    request = p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=message)
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_unix_connection(unix_path(daemon))
            try:
                await _write(writer, request)
                reply = await _read(reader, "STREAM_OPEN")
            except BaseException:
                writer.close()
                raise
    except TimeoutError:
        raise DaemonError(f"…{peer_id[-6:]} was not reached within {timeout:g} s") from None
    except (OSError, EOFError) as error:
        raise DaemonError(f"p2pd is not there (STREAM_OPEN: {error!r})") from error
    except DecodeError as error:
        raise DaemonError("p2pd's reply to STREAM_OPEN makes no sense; restart it") from error
    if reply.type == p2pd_pb2.Response.ERROR:
        writer.close()
        raise DaemonError(f"…{peer_id[-6:]} was not reached: {reply.error.msg:.200}")
    return reader, writer
