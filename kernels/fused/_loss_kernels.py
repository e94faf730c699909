# mypy: ignore-errors
# (Triton's language, which Python's types do not describe.)
"""Cross-entropy of a chunk of rows, its gradient written over the logits."""

import triton
import triton.language as tl


@triton.jit
def cross_entropy(LOGITS, TARGETS, LOSS, V, ignore_index, scale, BLOCK: tl.constexpr):
    """One row: LOSS = logsumexp - logit of the target, then LOGITS becomes (softmax - onehot) * scale.

    A target of `ignore_index` gives loss and gradient 0.
    """
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * V
    target = tl.load(TARGETS + row)
    counted = target != ignore_index
    # A target outside the vocabulary gives NaN, not a neighbour's logit. Read before anything is written over it.
    known = counted & (target >= 0) & (target < V)
    chosen = tl.load(LOGITS + target, mask=known, other=float("nan")).to(tl.float32)
    m = float("-inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(LOGITS + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
        top = tl.maximum(m, tl.max(x, 0))
        total = total * tl.exp(m - top) + tl.sum(tl.exp(x - top), 0)
        m = top
    loss = m + tl.log(total) - chosen
    tl.store(LOSS + row, tl.where(counted, loss, 0.0))
    factor = tl.where(counted, scale, 0.0)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(LOGITS + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
        p = tl.exp(x - m) / total
        g = tl.where(cols == target, p - 1.0, p) * factor
        tl.store(LOGITS + cols, g.to(LOGITS.dtype.element_ty), mask=cols < V)
