# mypy: ignore-errors
# (Triton's language, which Python's types do not describe.)
"""Cross-entropy of a chunk of rows, its gradient written over the logits."""

import triton
import triton.language as tl


@triton.jit
def capped(x, cap, CAP: tl.constexpr):
    """Logits under the soft cap, and the cap's derivative."""
    if CAP:
        t = 2.0 / (1.0 + tl.exp(-2.0 * x / cap)) - 1.0
        return cap * t, 1.0 - t * t
    else:
        return x, 1.0


@triton.jit
def cross_entropy(
    LOGITS, TARGETS, LOSS, WEIGHTS, SCALES, NUMBERS, V, ignore_index, smoothing, cap, WEIGHTED: tl.constexpr,
    SCALED: tl.constexpr, CAP: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its LOSS, then LOGITS becomes the loss's gradient, times the row's SCALE if there is one.

    With y the target, w the class weights (1 without), e the smoothing and lse = log(sum(exp(logits))): the loss is
    (1 - e) w_y (lse - logit_y) + e / V sum_c w_c (lse - logit_c) + z lse^2, as PyTorch defines its terms, and Z-loss as in
    PaLM (Chowdhery et al., section 5). NUMBERS holds z and the sum of w. A target of `ignore_index` gives loss and gradient 0.
    """
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * V
    target = tl.load(TARGETS + row)
    counted = target != ignore_index
    # A target outside the vocabulary gives NaN, not a neighbour's logit. Read before anything is written over it.
    known = counted & (target >= 0) & (target < V)
    chosen, _slope = capped(tl.load(LOGITS + target, mask=known, other=float("nan")).to(tl.float32), cap, CAP)
    m = float("-inf")
    total = 0.0
    spread = 0.0
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x, _slopes = capped(tl.load(LOGITS + cols, mask=cols < V, other=float("-inf")).to(tl.float32), cap, CAP)
        x = tl.where(cols < V, x, float("-inf"))
        top = tl.maximum(m, tl.max(x, 0))
        total = total * tl.exp(m - top) + tl.sum(tl.exp(x - top), 0)
        m = top
        if SMOOTH:
            share = tl.where(cols < V, x, 0.0)
            if WEIGHTED:
                share *= tl.load(WEIGHTS + cols, mask=cols < V, other=0.0).to(tl.float32)
            spread += tl.sum(share, 0)
    lse = m + tl.log(total)
    mine = 1.0
    if WEIGHTED:
        mine = tl.load(WEIGHTS + target, mask=known, other=0.0).to(tl.float32)
    loss = mine * (lse - chosen)
    factor = mine
    if SMOOTH:
        even = smoothing / V
        total_weight = tl.load(NUMBERS + 1)
        loss = (1.0 - smoothing) * loss + even * (lse * total_weight - spread)
        factor = (1.0 - smoothing) * mine + even * total_weight
        mine = (1.0 - smoothing) * mine
    if Z_LOSS:
        z = tl.load(NUMBERS)
        loss += z * lse * lse
        factor += 2.0 * z * lse
    tl.store(LOSS + row, tl.where(counted, loss, 0.0))
    scale = 1.0
    if SCALED:
        scale = tl.load(SCALES + row)
    scale = tl.where(counted, scale, 0.0)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x, slope = capped(tl.load(LOGITS + cols, mask=cols < V, other=float("-inf")).to(tl.float32), cap, CAP)
        g = factor * (tl.exp(x - m) / total)
        g = tl.where(cols == target, g - mine, g)
        if SMOOTH:
            share = even
            if WEIGHTED:
                share *= tl.load(WEIGHTS + cols, mask=cols < V, other=0.0).to(tl.float32)
            g -= share
        # An ignored row may hold anything: its gradient is 0 all the same.
        g = tl.where(counted, g * slope * scale, 0.0)
        tl.store(LOGITS + cols, g.to(LOGITS.dtype.element_ty), mask=cols < V)
