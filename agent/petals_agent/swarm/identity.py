"""The key that is our peer id: made once, kept private, and never used by two agents at a time."""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from dataclasses import replace
from pathlib import Path

from petals_agent.errors import DaemonError, IdentityTaken, SwarmError
from petals_agent.p2p import light

light.install(without_torch=True)

from petals_agent.p2p import control  # noqa: E402
from petals_agent.p2p.daemon import Daemon, DaemonOptions  # noqa: E402

_LINGER_S = 6.0  # our own p2pd of a moment ago may still be there
_LOOKUP_S = 2.0  # a fresh p2pd knows nobody until its first exchange with a bootstrap peer
_CONNECT_TIMEOUT_S = 5.0


def ensure_identity(path: Path) -> str:
    """The peer id (base58) of the key at `path`, which is created with mode 0400 if it is not there.

    The file is libp2p's PrivateKey protobuf with a 2048-bit RSA key, as stock servers write it.
    Raises SwarmError when it cannot be read or written, or is no such key.
    """
    from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID

    try:
        if not path.exists():
            _create(path)
        raw = path.read_bytes()
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        return str(PeerID.from_identity(raw).to_base58())
    except Exception as error:
        raise SwarmError(
            f"{path} holds no libp2p key ({error}); move it away and a new identity is made at the next start"
        ) from error


def _create(path: Path) -> None:
    from hivemind.proto import crypto_pb2
    from hivemind.utils.crypto import RSAPrivateKey

    path.parent.mkdir(parents=True, exist_ok=True)
    key = crypto_pb2.PrivateKey(key_type=crypto_pb2.KeyType.RSA, data=RSAPrivateKey().to_bytes())
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o400)
        with os.fdopen(descriptor, "wb") as file:
            file.write(key.SerializeToString())
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _unusable(path: Path, error: OSError) -> SwarmError:
    return SwarmError(
        f"the identity {path} cannot be used ({error.strerror}); check the folder's owner and free space"
    )


class IdentityLock:
    """Held while an agent runs, so that a second one on this host with the same key is refused at once."""

    def __init__(self, path: Path) -> None:
        """Raises IdentityTaken when another process holds it, SwarmError when it cannot be made."""
        try:
            self._file = open(path.with_name(f"{path.name}.lock"), "a+")
        except OSError as error:
            raise _unusable(path, error) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise IdentityTaken(
                f"another agent on this host runs with the identity {path}; give each its own swarm.identity"
            ) from None

    def release(self) -> None:
        self._file.close()


def is_there(path: Path) -> bool:
    """Whether a key was made before; one that we may not look at is said so when it is used."""
    try:
        return path.exists()
    except OSError:
        return False


async def check_not_live(options: DaemonOptions) -> None:
    """Dial the peer id that `options` would start a p2pd with, from another one: nobody must answer.

    Raises IdentityTaken when someone does for 6 s, DaemonError when no initial peer could be asked.
    """
    assert options.identity is not None
    path, peer_id = options.identity, ensure_identity(options.identity)
    prober = replace(
        options, identity=None, listen=(), announce=(), client=True, auto_nat=False, nat_port_map=False
    )
    daemon = await Daemon.start(prober)
    try:
        deadline = time.monotonic() + _LINGER_S
        while await _answers(daemon, peer_id):
            if time.monotonic() > deadline:
                raise IdentityTaken(
                    f"another live peer of this swarm uses the identity {path} (peer id {peer_id}); stop it, or move the "
                    "file away here and a new identity is made at the next start"
                )
            await control.disconnect(daemon.maddr, peer_id)
            await asyncio.sleep(0.5)
    finally:
        await daemon.stop()


async def _answers(daemon: Daemon, peer_id: str) -> bool:
    deadline = time.monotonic() + _LOOKUP_S
    while True:
        try:
            await control.connect(daemon.maddr, peer_id, _CONNECT_TIMEOUT_S)
            return True
        except DaemonError as error:
            if "failed to find any peer in table" not in str(error) or time.monotonic() > deadline:
                return False
        await asyncio.sleep(0.05)
