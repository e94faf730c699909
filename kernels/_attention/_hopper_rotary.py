# mypy: ignore-errors
# (Gluon's language, which Python's types do not describe.)
"""RoPE in the load: rotary embedding is applied to queries in shared memory."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared


@gluon.jit
def apply_rotary(qt, first, Sq, off, COS, SIN, c: gl.constexpr):
    """Rotate 64 queries by their positions where they lie, before they are multiplied (Su et al., RoFormer, 3.2)."""
    # All rows at once, with their cosines, do not fit in the registers beside the last tile's sums.
    rows: gl.constexpr = 16 if c.D == 256 else 32
    for i in gl.static_range(64 // rows):
        rotate_rows(qt.slice(rows * i, rows, 0), first + rows * i, Sq, off, COS, SIN, rows, c)
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def rotate_rows(qt, first, Sq, off, COS, SIN, rows: gl.constexpr, c: gl.constexpr):
    half: gl.constexpr = c.D // 2
    # A thread holds the same columns of both halves.
    B: gl.constexpr = gl.BlockedLayout([1, 8], [512 // c.D, c.D // 16], [4, 1], [1, 0])
    low, high = qt.load(B).to(gl.float32).reshape([rows, 2, half]).permute((0, 2, 1)).split()
    P: gl.constexpr = low.type.layout
    at = gl.minimum(first + gl.arange(0, rows, gl.SliceLayout(1, P)), Sq - 1) + off
    to = at[:, None] * half + gl.arange(0, half, gl.SliceLayout(0, P))[None, :]
    cos = gl.load(COS + to)
    sin = gl.load(SIN + to)
    rotated = gl.join(low * cos - high * sin, high * cos + low * sin).permute((0, 2, 1)).reshape([rows, c.D])
    qt.store(gl.convert_layout(rotated, B).to(qt.dtype))
