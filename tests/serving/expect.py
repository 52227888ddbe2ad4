"""What the tests of handlers say again and again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from serving.caller import P2PHandlerError, Session

WIDTH = 32  # of the tiny model


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random values, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal but for rounding, relative to the largest value."""
    return ours.shape == expected.shape and bool((ours - expected).abs().max() <= 1e-4 * expected.abs().max())


async def refused(session: Session, message: Any, error: str) -> None:
    """`message` ends the session with an error that matches."""
    await session.send(message)
    with pytest.raises(P2PHandlerError, match=error):
        await session.receive()


async def closed_quietly(session: Session) -> None:
    """The server has closed or will, without an error; if it has, hivemind's end marker hits a closed stream."""
    await session.send(None)
    with pytest.raises((StopAsyncIteration, ConnectionError)):
        await session.receive(timeout=5)
