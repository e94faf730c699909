# mypy: ignore-errors
# (Triton's language, which Python's types do not describe.)
"""A hook of query, key or output over a tensor, and its derivative: all heads of one token a program."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["S", "H"])
def transform(
    X, G, Y, SEQUENCE, INDEX, sxb, sxs, sxh, sgb, sgs, sgh, S, H, args, D: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr,
    BACKWARD: tl.constexpr, PACKED: tl.constexpr, HOOK: tl.constexpr, BY_X: tl.constexpr, BY_PAIR: tl.constexpr,
):  # fmt: skip
    """Y (dense `[B, S, H, D]`) = HOOK of X; BACKWARD: X's gradient from Y's, G."""
    token = tl.program_id(0)
    b = (token // S).to(tl.int64)
    s = (token % S).to(tl.int64)
    if PACKED:
        sequence = tl.load(SEQUENCE + token)
        index = tl.load(INDEX + token)
    else:
        sequence = token // S
        index = token % S
    d = tl.arange(0, BD)[None, :]
    # Beyond the width, tables are read where it ends.
    d = tl.minimum(d, D - 1)
    other = tl.where(d < D // 2, d + D // 2, d - D // 2)
    for first in range(0, H, BH):
        h = first + tl.arange(0, BH)[:, None]
        mask = (h < H) & (tl.arange(0, BD)[None, :] < D)
        inside = tl.minimum(h, H - 1)
        far_h = inside.to(tl.int64)
        at = X + b * sxb + s * sxs + far_h * sxh
        x = tl.load(at + d, mask=mask, other=0.0).to(tl.float32)
        pair = tl.load(at + other, mask=mask, other=0.0).to(tl.float32)
        if BACKWARD:
            to = G + b * sgb + s * sgs + far_h * sgh
            g = tl.load(to + d, mask=mask, other=0.0).to(tl.float32)
            far = tl.load(to + other, mask=mask, other=0.0).to(tl.float32)
            # An element counts where it stands, and as the partner of its partner.
            y = BY_X(x, pair, g, sequence, inside, index, d, args) + BY_PAIR(
                pair, x, far, sequence, inside, index, other, args
            )
        else:
            y = HOOK(x, pair, sequence, inside, index, d, args)
        tl.store(Y + token.to(tl.int64) * H * D + far_h * D + d, y.to(Y.dtype.element_ty), mask=mask)
