# mypy: ignore-errors
# (Triton's language, which Python's types do not describe.)
"""Sampling a token of each row of logits, without sorting them."""

import triton
import triton.language as tl

from trainkit.kernels._attention._triton_tiles import HEAD, ROW, mix


@triton.jit
def rank(x):
    """fp32 as int32 of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def least_kept(X, top, want, low, inverse, V, BY_MASS: tl.constexpr, B: tl.constexpr):
    """The largest threshold above `low`, as `rank` orders numbers, from which on so many elements, or so much mass, remain."""
    # lo keeps enough, hi does not: each pass asks at three points between them.
    lo = low.to(tl.int64)
    hi = rank(top).to(tl.int64) + 1
    while hi - lo > 1:
        quarter = tl.maximum((hi - lo) // 4, 1)
        p1 = lo + quarter
        p2 = tl.minimum(p1 + quarter, hi - 1)
        p3 = tl.minimum(p2 + quarter, hi - 1)
        kept1 = tl.zeros([B], tl.float32)
        kept2 = tl.zeros([B], tl.float32)
        kept3 = tl.zeros([B], tl.float32)
        for i in range(0, V, B):
            at = i + tl.arange(0, B)
            x = tl.load(X + at, mask=at < V, other=float("-inf")).to(tl.float32)
            r = rank(x)
            if BY_MASS:
                w = tl.exp((x - top) * inverse)
            else:
                w = tl.where(at < V, 1.0, 0.0)
            kept1 += tl.where(r >= p1.to(tl.int32), w, 0.0)
            kept2 += tl.where(r >= p2.to(tl.int32), w, 0.0)
            kept3 += tl.where(r >= p3.to(tl.int32), w, 0.0)
        enough1 = tl.sum(kept1, 0) >= want
        enough2 = tl.sum(kept2, 0) >= want
        enough3 = tl.sum(kept3, 0) >= want
        lo = tl.where(enough3, p3, tl.where(enough2, p2, tl.where(enough1, p1, lo)))
        hi = tl.where(enough1, tl.where(enough2, tl.where(enough3, hi, p3), p2), p1)
    return lo.to(tl.int32)


@triton.jit(do_not_specialize=["V"])
def sample(LOGITS, OUT, TEMPERATURE, TOP_K, TOP_P, MIN_P, SEED, STEP, stride, V, B: tl.constexpr):
    """One row: two passes, and more where top-k or top-p ask where the line is."""
    row = tl.program_id(0)
    X = LOGITS + row.to(tl.int64) * stride
    temperature = tl.load(TEMPERATURE + row)
    best = tl.full([B], float("-inf"), tl.float32)
    for i in range(0, V, B):
        at = i + tl.arange(0, B)
        best = tl.maximum(best, tl.load(X + at, mask=at < V, other=float("-inf")).to(tl.float32))
    top = tl.max(best, 0)
    greedy = temperature == 0.0
    inverse = 1.0 / tl.where(greedy, 1.0, temperature)
    top_k = tl.load(TOP_K + row)
    top_p = tl.load(TOP_P + row)
    min_p = tl.load(MIN_P + row)
    line = rank(tl.full([], float("-inf"), tl.float32))
    if greedy:
        line = rank(top)
    else:
        if top_k > 0 and top_k < V:
            line = least_kept(X, top, top_k.to(tl.float32), line, inverse, V, False, B)
        if top_p < 1.0:
            mass = tl.zeros([B], tl.float32)
            for i in range(0, V, B):
                at = i + tl.arange(0, B)
                x = tl.load(X + at, mask=at < V, other=float("-inf")).to(tl.float32)
                mass += tl.where(rank(x) >= line, tl.exp((x - top) * inverse), 0.0)
            line = tl.maximum(line, least_kept(X, top, top_p * tl.sum(mass, 0), line, inverse, V, True, B))
        if min_p > 0.0:
            line = tl.maximum(line, rank(top + tl.log(min_p) * temperature))
    key = mix(mix(tl.load(SEED + row).to(tl.uint32)) ^ (tl.load(STEP + row).to(tl.uint32) * ROW))
    found = tl.full([B], float("-inf"), tl.float32)
    which = tl.zeros([B], tl.int32)
    for i in range(0, V, B):
        at = i + tl.arange(0, B)
        x = tl.load(X + at, mask=at < V, other=float("-inf")).to(tl.float32)
        # Gumbel's trick: the largest of log-weights with such noise falls on each as often as its weight says.
        u = ((mix(key ^ (at.to(tl.uint32) * HEAD)) >> 8).to(tl.float32) + 0.5) * (1.0 / (1 << 24))
        noisy = tl.where(greedy, x, x * inverse - tl.log(-tl.log(u)))
        noisy = tl.where((rank(x) >= line) & (at < V), noisy, float("-inf"))
        better = noisy > found
        which = tl.where(better, at, which)
        found = tl.where(better, noisy, found)
    most = tl.max(found, 0)
    tl.store(OUT + row, tl.min(tl.where(found == most, which, 0x7FFFFFFF), 0).to(tl.int64))
