"""8-bit tensors are read as hivemind and bitsandbytes write them."""

from __future__ import annotations

import numpy as np
import pytest

from petals_agent.codecs import BLOCKWISE_8BIT, QUANTILE_8BIT, UNIFORM_8BIT, dequantize


def packed(*tables: np.ndarray, indices: np.ndarray) -> bytes:
    sizes = b"".join(np.int64(len(table)).tobytes() for table in tables)
    return (
        sizes
        + b"".join(table.astype(np.float32).tobytes() for table in tables)
        + indices.astype(np.uint8).tobytes()
    )


@pytest.mark.parametrize("codec", [QUANTILE_8BIT, UNIFORM_8BIT])
def test_a_codebook_and_its_indices(codec: int) -> None:
    codebook, indices = np.linspace(-3, 3, 256), np.array([0, 255, 7, 7])
    values = dequantize(packed(codebook, indices=indices), codec, 4)
    assert np.allclose(values, codebook[indices])


def test_blocks_of_4096_share_a_scale() -> None:
    codebook, scales = np.linspace(-1, 1, 256), np.array([2.0, 0.5, 10.0])
    indices = np.arange(9000) % 256
    values = dequantize(packed(scales, codebook, indices=indices), BLOCKWISE_8BIT, 9000)
    expected = codebook[indices] * np.concatenate(
        [np.full(4096, 2.0), np.full(4096, 0.5), np.full(808, 10.0)]
    )
    assert np.allclose(values, expected)


@pytest.mark.parametrize(
    ("buffer", "codec", "elements", "error"),
    [
        (b"", UNIFORM_8BIT, 4, "buffer"),
        (packed(np.zeros(256), indices=np.zeros(3)), UNIFORM_8BIT, 4, "do not hold"),
        (packed(np.zeros(256), indices=np.zeros(5)), UNIFORM_8BIT, 4, "do not hold"),
        (np.int64(2**62).tobytes() + b"x" * 8, UNIFORM_8BIT, 4, "do not hold"),
        (np.int64(-1).tobytes() + b"x" * 8, UNIFORM_8BIT, 12, "do not hold"),
        (packed(np.zeros(4), indices=np.array([4])), QUANTILE_8BIT, 1, "is not among the 4"),
        (packed(np.zeros(2), np.zeros(256), indices=np.zeros(4)), BLOCKWISE_8BIT, 4, "2 scales for 4 values"),
    ],
)
def test_buffers_that_lie(buffer: bytes, codec: int, elements: int, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        dequantize(buffer, codec, elements)
