"""Block floating point: fp32 chunks to integers that a switch can add, and back.

A chunk's exponent byte is the exponent field of its largest magnitude, taken over the bits, so that 0xFF means
inf or NaN by itself. Workers agree on the maximum of their bytes; the unit is a power of two, so that scaling is
exact, rounding happens once, and every path gives the same bits (SwitchML, NSDI 2021, section 3.7 and appendix C,
scales by INT32_MAX / (n 2^e)).

int32 has more bits than fp32's 24, so that its unit moves in steps of `COARSE` binary orders: it then seldom changes
from one training step to the next, and a guess of it is mostly right (see `_worker.py`). For n workers and a chunk
whose largest magnitude is m, the average is within n 2^-27 m of the exact one, an eighth of what n roundings to fp32
may take.
"""

import numpy as np
from numpy.typing import NDArray

from trainkit.switchml._packet import NON_FINITE, UP_BYTES

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]

COARSE = 4
"""Binary orders between two units of the int32 wire."""

_LIMIT = {"int32": 2**31 - 1, "int16": 2**15 - 1, "int8": 2**7 - 1}
SUM_TYPE: dict[str, np.dtype[np.signedinteger]] = {
    "int32": np.dtype(">i4"),
    "int16": np.dtype(">i4"),
    "int8": np.dtype(">i2"),
}
SENT_TYPE: dict[str, np.dtype[np.signedinteger]] = {
    "int32": np.dtype(">i4"),
    "int16": np.dtype(">i2"),
    "int8": np.dtype(">i1"),
}


def block_exponents(values: Floats, elements: int) -> NDArray[np.uint8]:
    """Exponent byte of each chunk.

    Args:
        values: gradients, fp32 `[N]`.
        elements: values a chunk; the last may be shorter.

    Returns:
        uint8 `[ceil(N / elements)]`: 0 for a chunk of zeros, 255 for one with inf or NaN.
    """
    if values.size == 0:
        return np.zeros(0, np.uint8)
    magnitudes = values.view(np.uint32) & np.uint32(0x7FFFFFFF)
    largest = np.maximum.reduceat(magnitudes, np.arange(0, values.size, elements))
    exponents = largest >> 23
    return np.where((exponents == 0) & (largest > 0), 1, exponents).astype(np.uint8)


def unit_exponent(exponent: int, world: int, wire: str) -> int:
    """log2 of the value of one integer step, for a chunk whose agreed exponent byte is `exponent`.

    int32 leaves room for the sum of `world` workers; the narrower wires are summed in wider integers.
    """
    if wire == "int32":
        exponent = -(-exponent // COARSE) * COARSE
    headroom = (world - 1).bit_length() if wire == "int32" else 0
    return exponent - 126 - (8 * UP_BYTES[wire] - 1 - headroom)


def _scaled(values: Floats, power: int) -> Floats:
    # 2^power itself may be outside fp32: two factors, of which the first is exact
    half = power // 2
    return values * np.float32(2.0**half) * np.float32(2.0 ** (power - half))


def quantise(values: Floats, exponent: int, world: int, wire: str) -> Integers:
    """Round to integers in units of the agreed exponent.

    Args:
        values: fp32 `[k]`.
        exponent: agreed byte, at least that of `values`.
        world: workers in the sum.
        wire: "int32", "int16" or "int8".

    Returns:
        int32 `[k]`; zeros where the agreed byte says that a worker has inf or NaN.
    """
    if exponent == NON_FINITE:
        return np.zeros(values.shape, np.int32)
    limit = _LIMIT[wire]
    rounded = np.rint(_scaled(values, -unit_exponent(exponent, world, wire)))
    if wire != "int32":  # a narrow wire may round up to one past its end; int32 has more bits than the values
        rounded = np.clip(rounded, -limit, limit)
    return rounded.astype(np.int32)


def dequantise(sums: Integers, exponent: int, world: int, wire: str) -> Floats:
    """The average that a sum of integers stands for.

    Returns:
        fp32 `[k]`; all NaN where a worker had inf or NaN in this chunk.
    """
    if exponent == NON_FINITE:
        return np.full(sums.shape, np.nan, np.float32)
    # divided first: the sum itself may be beyond fp32
    return _scaled(sums.astype(np.float32) / np.float32(world), unit_exponent(exponent, world, wire))


def restore(integers: Integers, exponent: int, world: int, wire: str) -> Floats:
    """What one worker's integers stand for; `exponent` is that of a finite chunk."""
    return _scaled(integers.astype(np.float32), unit_exponent(min(exponent, NON_FINITE - 1), world, wire))
