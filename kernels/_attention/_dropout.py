"""The dropout mask as a function of position: no state, so backward and every path see the same one."""

import torch
from torch import Tensor

LOW = 0xFFFFFFFF
# Multipliers of the `lowbias32` integer hash (C. Wellons, 2018, found by search for low avalanche bias).
MIX_A, MIX_B = 0x7FEB352D, 0x846CA68B
ROW, HEAD = 0x9E3779B9, 0x85EBCA6B


def mix(x: Tensor) -> Tensor:
    """Hash 32-bit values held in int64."""
    x = ((x ^ (x >> 16)) * MIX_A) & LOW
    x = ((x ^ (x >> 15)) * MIX_B) & LOW
    return x ^ (x >> 16)


def threshold(dropout_p: float) -> int:
    """The value in [0, 2**24] below which the top 24 bits of a hash say: drop."""
    return round(dropout_p * 2**24)


def keep_mask(seed: int, dropout_p: float, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Which probabilities stay.

    Args:
        head: `b * Hq + h`, with `b` the batch entry or the packed sequence; int64, broadcast with the others.

    Returns:
        bool, the broadcast shape; True with probability `1 - dropout_p`.
    """
    row = mix(mix((seed + head * HEAD) & LOW) ^ ((q_idx * ROW) & LOW))
    return (mix(row ^ kv_idx) >> 8) >= torch.tensor(threshold(dropout_p), device=kv_idx.device)
