# mypy: ignore-errors
# (Triton's language, which Python's types do not describe.)
"""Block sparsity: which tiles of a mask are empty, partly or wholly seen, and lists of the others a tile of one side."""

import weakref

import torch
import triton
import triton.language as tl

from trainkit.kernels._attention._codegen import arguments
from trainkit.kernels._attention._triton_tiles import visible


@triton.jit(do_not_specialize=["Sq", "Sk", "w"])
def block_map(MAP, Sq, Sk, w, args, H, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
              MASK: tl.constexpr):  # fmt: skip
    """MAP `[B * H, tiles of queries, tiles of keys]`, int32: 0 unseen, 1 in part, 2 whole."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    b = tl.program_id(2) // H
    h = tl.program_id(2) % H
    off = Sk - Sq
    qi = tl.minimum(rows, Sq - 1)[:, None]
    kj = tl.minimum(cols, Sk - 1)[None, :]
    seen = visible(qi, cols[None, :], Sk, off, w, CAUSAL, WINDOW) & MASK(b, h, qi, kj, off, args)
    # A tile over the end of either side is never whole: whole ones are loaded without bounds.
    seen = seen & (rows < Sq)[:, None]
    state = tl.max(tl.max(seen.to(tl.int32), 1), 0) + tl.min(tl.min(seen.to(tl.int32), 1), 0)
    at = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(MAP + at, state)


_LISTS = weakref.WeakKeyDictionary()


def lists(variant, spec, B, H, Sq, Sk, BM, BN, device, by_keys):
    """Blocks to visit a tile: (blocks, counts, full, stride of b, stride of h, blocks a tile).

    Computed once a mask, shape and tiling, as long as the tensors that the mask captured do not change.

    Args:
        by_keys: list query blocks for each tile of keys (the reverse otherwise).
    """
    versions = tuple((id(t), t._version) for t in variant.mask.tables)
    key = (spec.causal, spec.window, B, H, Sq, Sk, BM, BN, by_keys, versions)
    known = _LISTS.setdefault(variant, {})
    if key not in known:
        varies = variant.mask_varies_with
        b, h = (B if "b" in varies else 1), (H if "h" in varies else 1)
        tiles = triton.cdiv(Sq, BM), triton.cdiv(Sk, BN)
        states = torch.empty(b * h, *tiles, dtype=torch.int32, device=device)
        mask = variant.functions("triton").mask
        block_map[(*tiles, b * h)](
            states, Sq, Sk, spec.window or 0, arguments(variant.mask), h, BM, BN, spec.causal,
            spec.window is not None, mask
        )  # fmt: skip
        if by_keys:
            states = states.mT
        blocks = torch.argsort(states, dim=-1, descending=True, stable=True).to(torch.int32).contiguous()
        rows = blocks.shape[1]
        strides = (h * rows if b > 1 else 0), (rows if h > 1 else 0)
        counts, full = ((states >= n).sum(-1, dtype=torch.int32).contiguous() for n in (1, 2))
        known[key] = (blocks, counts, full, *strides, blocks.shape[2])
    return known[key]
