"""Reads tensors in hivemind's 8-bit codecs: its own code fails on numpy 2.4 and asks for bitsandbytes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# numbers of hivemind's CompressionType
QUANTILE_8BIT, UNIFORM_8BIT, BLOCKWISE_8BIT = 3, 4, 5
QUANTIZED = (QUANTILE_8BIT, UNIFORM_8BIT, BLOCKWISE_8BIT)
_BLOCK = 4096  # values that share a scale in BLOCKWISE_8BIT


def dequantize(buffer: bytes, codec: int, elements: int) -> npt.NDArray[np.float32]:
    """The `elements` values [elements] that `buffer` holds.

    All codecs: int64 sizes of the tables, the float32 tables (codebook; before it, for BLOCKWISE_8BIT, a scale for each
    block of values), one byte a value. Raises ValueError when the sizes do not add up.
    """
    counts = 2 if codec == BLOCKWISE_8BIT else 1
    sizes = [int(size) for size in np.frombuffer(buffer, np.int64, counts)]
    start = 8 * counts + 4 * sum(sizes)
    if min(sizes) < 0 or len(buffer) != start + elements:
        raise ValueError(f"{len(buffer)} bytes do not hold tables of {sizes} and {elements} values")
    tables = np.frombuffer(buffer, np.float32, sum(sizes), 8 * counts)
    scales, codebook = np.split(tables, [sizes[0]]) if codec == BLOCKWISE_8BIT else (None, tables)
    indices = np.frombuffer(buffer, np.uint8, elements, start)
    if elements and int(indices.max()) >= len(codebook):
        raise ValueError(f"value {int(indices.max())} is not among the {len(codebook)} of the codebook")
    values = codebook[indices]
    if scales is not None:
        if len(scales) != -(-elements // _BLOCK):
            raise ValueError(f"{len(scales)} scales for {elements} values in blocks of {_BLOCK}")
        values = values * np.repeat(scales, _BLOCK)[:elements]
    return values
