"""The key that is our peer id: made once, kept private, and never used by two agents at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from petals_agent.errors import IdentityTaken, SwarmError
from petals_agent.p2p import light

light.install(without_torch=True)


def ensure_identity(path: Path) -> str:
    """The peer id (base58) of the key at `path`, which is created with mode 0400 if it is not there.

    The file is libp2p's PrivateKey protobuf with a 2048-bit RSA key, as stock servers write it.
    Raises SwarmError when it cannot be read or written, or is no such key.
    """
    from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID
    from hivemind.proto import crypto_pb2
    from hivemind.utils.crypto import RSAPrivateKey

    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            key = crypto_pb2.PrivateKey(key_type=crypto_pb2.KeyType.RSA, data=RSAPrivateKey().to_bytes())
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o400)
            with os.fdopen(descriptor, "wb") as file:
                file.write(key.SerializeToString())
            os.rename(temporary, path)
        raw = path.read_bytes()
    except OSError as error:
        raise SwarmError(
            f"the identity {path} cannot be used ({error.strerror}); check the folder's owner and free space"
        ) from error
    try:
        return str(PeerID.from_identity(raw).to_base58())
    except Exception as error:
        raise SwarmError(
            f"{path} holds no libp2p key ({error}); move it away and a new identity is made at the next start"
        ) from error


class IdentityLock:
    """Held while an agent runs, so that a second one on this host with the same key is refused at once."""

    def __init__(self, path: Path) -> None:
        """Raises IdentityTaken when another process holds it."""
        self._file = open(path.with_name(f"{path.name}.lock"), "a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise IdentityTaken(
                f"another agent on this host runs with the identity {path}; give each its own swarm.identity"
            ) from None

    def release(self) -> None:
        self._file.close()
