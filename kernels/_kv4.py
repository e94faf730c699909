"""The 4-bit format of cached keys and values: asymmetric, one head of one token a group (Zhao et al., Atom, section 4.4).

A row of D numbers x is kept as codes c in 0..15 with `x = c * step + low`:

- codes: `[..., D / 2]` uint8; byte j holds c[j] in its low and c[j + D / 2] in its high nibble, so that a kernel reads the
  two halves of a row without interleaving.
- affine: `[..., 2]` fp16, step and low: D / 2 + 4 bytes a row, 4.25 bits a value at D = 128.

Atom keeps a 4-bit zero point instead of `low`; fp16 for it costs 12 bits a row and leaves the minimum where it is.
`_kv4_kernels` has the same formulas for Triton.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = 15
"""Steps between the least and the greatest code."""
SMALLEST_STEP = 2.0**-14
"""The least step, fp16's smallest normal number: a constant row has this one."""
LARGEST = 65504.0
"""fp16's greatest number: what lies beyond is clamped to it."""


class KV4(NamedTuple):
    """Keys or values in 4 bits."""

    codes: Tensor
    """`[..., D / 2]` uint8."""
    affine: Tensor
    """`[..., 2]` fp16: step and low."""


def kv4_bytes(head_dim: int) -> int:
    """Bytes of one head of one token."""
    return head_dim // 2 + 4


def kv4_empty(*shape: int, device: torch.device | str = "cpu") -> KV4:
    """Room for `[..., D]` numbers, `shape`'s last entry being D.

    Raises:
        ValueError: an odd D.
    """
    *rows, width = shape
    if width % 2:
        raise ValueError(f"4-bit keys and values need an even head dimension, got {width}: keep them in 16 bits")
    codes = torch.zeros(*rows, width // 2, dtype=torch.uint8, device=device)
    return KV4(codes, torch.zeros(*rows, 2, dtype=torch.float16, device=device))


def kv4_encode(x: Tensor) -> KV4:
    """4 bits of every number; NaN stays one, by its row's `low`.

    Args:
        x: `[..., D]`, D even.

    Raises:
        ValueError: an odd D.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"4-bit keys and values need an even head dimension, got {x.shape[-1]}: keep them in 16 bits")
    work = x.float().clamp(-LARGEST, LARGEST)
    least, greatest = work.aminmax(dim=-1, keepdim=True)
    low = least.half()
    # From the rounded minimum, and not below what reaches the maximum from there.
    step = ((greatest - low.float()) * (1 / LEVELS)).clamp(min=SMALLEST_STEP).half()
    scaled = ((work - low.float()) * (1.0 / step.float())).nan_to_num(0.0)
    codes = scaled.round().clamp(0, LEVELS).to(torch.uint8)
    first, second = codes.chunk(2, -1)
    return KV4(first | second << 4, torch.cat((step, low), -1))


def kv4_decode(kv: KV4, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`[..., D]` in `dtype`."""
    codes = torch.cat((kv.codes & 15, kv.codes >> 4), -1)
    step, low = kv.affine.float().unbind(-1)
    out: Tensor = codes * step[..., None] + low[..., None]
    return out.to(dtype)
