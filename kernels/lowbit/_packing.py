"""How 4-bit weights lie in memory, so that a kernel multiplies them after two bit operations.

A code q in -7..7 is a nibble in sign and magnitude: bit 3 the sign, bits 0 to 2 `|q|`. Moved apart (sign to bit 7 of a byte),
the nibble is the e4m3 number `q / 512` exactly, because e4m3's subnormal numbers are 0 to 7 times 2^-9. -8 has no place: a
symmetric scale has no use for it.

Channels come in blocks of 128. Byte j of a block holds channel j in its low and channel j + 64 in its high nibble, so that the
two halves multiply one after the other and nothing is interleaved. A block's rows lie together: `[K / 128, N, 64]`.
"""

import torch
from torch import Tensor

BLOCK = 128
"""Channels of a block."""


def padded(channels: int) -> int:
    """Channels with the padding that the last block needs."""
    return -(-channels // BLOCK) * BLOCK


def pack(codes: Tensor) -> Tensor:
    """Codes `[N, K]` int8 in -7..7, K a multiple of 128, as `[K / 128, N, 64]` uint8.

    Raises:
        ValueError: another width, or a code out of range.
    """
    rows, channels = codes.shape
    if channels % BLOCK:
        raise ValueError(f"packing takes a multiple of {BLOCK} channels, got {channels}: pad with zeros")
    if codes.numel() and int(codes.abs().max()) > 7:
        raise ValueError(f"packed codes are -7..7, got {int(codes.abs().max())} in magnitude: clamp them")
    nibbles = (codes.abs() | (codes < 0).to(torch.int8) << 3).to(torch.uint8).view(rows, -1, 2, BLOCK // 2)
    return (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).transpose(0, 1).contiguous()


def unpack(packed: Tensor) -> Tensor:
    """Codes `[N, K]` int8 of `[K / 128, N, 64]`."""
    nibbles = torch.cat((packed & 15, packed >> 4), -1)
    magnitude = (nibbles & 7).to(torch.int8)
    codes = torch.where(nibbles > 7, -magnitude, magnitude)
    return codes.transpose(0, 1).reshape(packed.shape[1], -1).contiguous()
