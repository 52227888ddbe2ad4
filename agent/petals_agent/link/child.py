"""Starts a child process of this package with a link to it: one end of a socketpair is ours, the other it inherits."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import TypeVar

from pydantic import TypeAdapter

from petals_agent.link.channel import Channel
from petals_agent.processes import start_child

T = TypeVar("T")


async def start_linked(
    module: str,
    incoming: TypeAdapter[T],
    options: Sequence[str],
    environment: Mapping[str, str] | None = None,
) -> tuple[asyncio.subprocess.Process, Channel[T]]:
    """Run `python -m MODULE --link-fd=N OPTIONS`; what comes over the link is checked by `incoming`. Raises OSError."""
    ours, theirs = socket.socketpair()
    channel = await Channel.open(ours, incoming)
    # -P: the folder that we happen to be in holds no code of ours
    command = [sys.executable, "-P", "-m", module, f"--link-fd={theirs.fileno()}", *options]
    try:
        process = await start_child(command, environment=environment, pass_fds=(theirs.fileno(),))
    except BaseException:
        channel.close()
        raise
    finally:
        theirs.close()
    return process, channel
