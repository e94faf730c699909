# mypy: ignore-errors
# (Gluon's language, which Python's types do not describe.)
"""Masks as packed bits: where a block's words lie, and what they leave of its scores; see `_block_lists.bits`."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from trainkit.kernels._attention._hopper_tiles import block_at


@gluon.jit
def visited(blocks, start, n, count, c: gl.constexpr):
    """The n-th block to visit; with bits the last of the list comes first: partial if any is, it is masked anyway."""
    if c.BITS:
        n = gl.where(n == 0, count, n) - 1
    return block_at(blocks, start, n, -1, c.BLOCK_SPARSE)


@gluon.jit
def bits_list(first, row, full, count, c: gl.constexpr):
    """Blocks of words of a tile whose blocks are visited in that order: (block 0's, how many lie before the n-th visited
    one's but for n, the first n after the full ones).
    """
    if c.BITS:
        before = gl.load(first + row) - full - 1
        return gl.where(full < count, before + count, 0), before, gl.minimum(full + 1, count)
    else:
        return 0, 0, full


@gluon.jit
def bits_of(words, n, W: gl.constexpr, TALL: gl.constexpr, WIDE: gl.constexpr, L: gl.constexpr, c: gl.constexpr):
    """Words `[64, 4]` of lines [64 W, 64 W + 64) of the n-th block of TALL, as `sifted` wants them; loaded before they are
    needed.
    """
    if c.BITS:
        X: gl.constexpr = gl.zeros([64, WIDE], gl.float32, L).reshape([64, WIDE // 8, 4, 2]).type.layout
        T: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, X))
        lines = 64 * W + gl.arange(0, 64, gl.SliceLayout(1, T))
        return gl.load(words + n * (4 * TALL) + (4 * lines[:, None] + gl.arange(0, 4, gl.SliceLayout(0, T))[None, :]))
    else:
        return 0


@gluon.jit
def sifted(S, words):
    """Scores of 64 lines of a block, -inf where its bits are 0; columns are told apart as in `_hopper_softmax.clipped`."""
    WIDE: gl.constexpr = S.shape[1]
    x = S.reshape([64, WIDE // 8, 4, 2])
    X: gl.constexpr = x.type.layout
    eights = gl.arange(0, WIDE // 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, X))))
    pair = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, X))))
    bit = 1 << (2 * eights[None, :, None, None] + pair[None, None, None, :])
    # In instructions of its own: out of tests of one word's bits LLVM makes vectors, and takes them apart again.
    code: gl.constexpr = (
        "{.reg .pred p; .reg .b32 t; and.b32 t, $2, $3; setp.ne.b32 p, t, 0; selp.f32 $0, $1, 0fFF800000, p;}"
    )
    x = gl.inline_asm_elementwise(
        code, "=f,f,r,r", [x, words[:, None, :, None], bit], dtype=gl.float32, is_pure=True, pack=1
    )
    return gl.convert_layout(x.reshape([64, WIDE]), S.type.layout)
