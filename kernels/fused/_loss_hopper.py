# mypy: ignore-errors
# (Gluon's language, which Python's types do not describe.)
"""Cross-entropy of a chunk of rows that shared memory holds: each logit is read from memory once, and written once."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import async_copy

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def part(row, i: gl.constexpr, cols, V, BLOCK: gl.constexpr, BLOCKS: gl.constexpr, layout: gl.constexpr):
    """The i-th block of the kept row times log2(e), -inf beyond its end."""
    x = row.index(i).load(layout).to(gl.float32) * LOG2E
    if i == BLOCKS - 1:
        x = gl.where(i * BLOCK + cols < V, x, -float("inf"))
    return x


@gluon.jit
def cross_entropy(
    LOGITS, TARGETS, LOSS, V, ignore_index, scale, BLOCK: gl.constexpr, BLOCKS: gl.constexpr, num_warps: gl.constexpr
):
    """As `_loss_kernels.cross_entropy`, for rows of at most BLOCK * BLOCKS elements.

    A thread reads back what it copied itself. Two programs share a multiprocessor: one computes while the other copies.
    """
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [num_warps], [0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    program = gl.program_id(0)
    LOGITS += program.to(gl.int64) * V
    cols = gl.arange(0, BLOCK, layout)
    row = gl.allocate_shared_memory(LOGITS.dtype.element_ty, [BLOCKS, BLOCK], plain)
    for i in gl.static_range(BLOCKS):
        at = i * BLOCK + cols
        async_copy.async_copy_global_to_shared(row.index(i), LOGITS + at, mask=at < V)
        async_copy.commit_group()
    target = gl.load(TARGETS + program)
    counted = target != ignore_index
    # A target outside the vocabulary gives NaN, not a neighbour's logit. Read before anything is written over it.
    known = counted & (target >= 0) & (target < V)
    chosen = gl.load(LOGITS + target, mask=known, other=float("nan")).to(gl.float32)
    top = gl.full([BLOCK], -float("inf"), gl.float32, layout)
    for i in gl.static_range(BLOCKS):
        async_copy.wait_group(BLOCKS - 1 - i)
        top = gl.maximum(top, part(row, i, cols, V, BLOCK, BLOCKS, layout))
    m = gl.max(top, 0)
    total = gl.zeros([BLOCK], gl.float32, layout)
    for i in gl.static_range(BLOCKS):
        total += gl.exp2(part(row, i, cols, V, BLOCK, BLOCKS, layout) - m)
    lse = m + gl.log2(gl.sum(total, 0))
    gl.store(LOSS + program, gl.where(counted, lse * LN2 - chosen, 0.0))
    factor = gl.where(counted, scale, 0.0)
    for i in gl.static_range(BLOCKS):
        at = i * BLOCK + cols
        p = gl.exp2(part(row, i, cols, V, BLOCK, BLOCKS, layout) - lse)
        g = gl.where(at == target, p - 1.0, p) * factor
        gl.store(LOGITS + at, g.to(LOGITS.dtype.element_ty), mask=at < V)
