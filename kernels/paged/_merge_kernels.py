# mypy: ignore-errors
# (Triton's language, which Python's types do not describe.)
"""Merging attention over different keys: one program a few rows of one head, all states of them."""

import triton
import triton.language as tl


@triton.jit
def weights(states, i, h, n, S: tl.constexpr, B: tl.constexpr):
    """The states' total, natural log `[B]`, and its finite stand-in where all states are empty."""
    at = i + tl.arange(0, B)
    top = tl.full([B], float("-inf"), tl.float32)
    for s in tl.static_range(S):
        LSE, lr, lh = states[s][3:6]
        top = tl.maximum(top, tl.load(LSE + at * lr + h * lh, mask=at < n, other=float("-inf")).to(tl.float32))
    finite = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([B], tl.float32)
    for s in tl.static_range(S):
        LSE, lr, lh = states[s][3:6]
        total += tl.exp(tl.load(LSE + at * lr + h * lh, mask=at < n, other=float("-inf")).to(tl.float32) - finite)
    empty = total == 0.0
    known = finite + tl.log(tl.where(empty, 1.0, total))
    return tl.where(empty, float("-inf"), known), known


@triton.jit(do_not_specialize=["n"])
def merge(states, out, n, H, S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, B: tl.constexpr):
    """Write the merged state; a state is (out, its strides of rows and heads, lse, its strides of rows and heads)."""
    i = (tl.program_id(0) // H * B).to(tl.int64)
    h = (tl.program_id(0) % H).to(tl.int64)
    at = i + tl.arange(0, B)
    d = tl.arange(0, BD)
    kept = (at < n)[:, None] & (d < D)[None, :]
    total, known = weights(states, i, h, n, S, B)
    acc = tl.zeros([B, BD], tl.float32)
    for s in tl.static_range(S):
        O, r, oh, LSE, lr, lh = states[s]
        w = tl.exp(tl.load(LSE + at * lr + h * lh, mask=at < n, other=float("-inf")).to(tl.float32) - known)
        acc += w[:, None] * tl.load(O + at[:, None] * r + h * oh + d[None, :], mask=kept, other=0.0).to(tl.float32)
    O, r, oh, LSE, lr, lh = out
    tl.store(O + at[:, None] * r + h * oh + d[None, :], acc.to(O.dtype.element_ty), mask=kept)
    tl.store(LSE + at * lr + h * lh, total, mask=at < n)


@triton.jit(do_not_specialize=["n"])
def merge_backward(states, out, grad, grads, n, H, S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, B: tl.constexpr):
    """Write each state's gradient from that of the merged state: w (the state's share of it) times dOut, and w times
    (dOut . (out_s - out) + dLse).
    """
    i = (tl.program_id(0) // H * B).to(tl.int64)
    h = (tl.program_id(0) % H).to(tl.int64)
    at = i + tl.arange(0, B)
    d = tl.arange(0, BD)
    kept = (at < n)[:, None] & (d < D)[None, :]
    O, r, oh, LSE, lr, lh = out
    whole = tl.load(O + at[:, None] * r + h * oh + d[None, :], mask=kept, other=0.0).to(tl.float32)
    total = tl.load(LSE + at * lr + h * lh, mask=at < n, other=float("-inf"))
    known = tl.where(total == float("-inf"), 0.0, total)
    G, r, oh, GL, lr, lh = grad
    g = tl.load(G + at[:, None] * r + h * oh + d[None, :], mask=kept, other=0.0).to(tl.float32)
    gl = tl.load(GL + at * lr + h * lh, mask=at < n, other=0.0).to(tl.float32)
    for s in tl.static_range(S):
        O, r, oh, LSE, lr, lh = states[s]
        w = tl.exp(tl.load(LSE + at * lr + h * lh, mask=at < n, other=float("-inf")).to(tl.float32) - known)
        o = tl.load(O + at[:, None] * r + h * oh + d[None, :], mask=kept, other=0.0).to(tl.float32)
        O, r, oh, LSE, lr, lh = grads[s]
        tl.store(O + at[:, None] * r + h * oh + d[None, :], (w[:, None] * g).to(O.dtype.element_ty), mask=kept)
        tl.store(LSE + at * lr + h * lh, w * (tl.sum(g * (o - whole), 1) + gl), mask=at < n)
