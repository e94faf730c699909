"""The definition of paged attention: pages gathered request by request, then plain attention; slow, obvious, differentiable."""

import numpy as np
import torch
from torch import Tensor

from trainkit.kernels._attention._reference import reference as dense
from trainkit.kernels._attention._spec import Packed, Spec
from trainkit.kernels.paged._tables import Pages, Tables, rows_of_keys


def gather(pages: Tensor, rows: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows of a cache end to end, `[keys, Hkv, D]`, times a scale a head."""
    found = pages.reshape(-1, *pages.shape[2:])[rows]
    if scale is None:
        return found.to(dtype)
    return (found.float() * scale[:, None]).to(torch.promote_types(dtype, torch.float32))


def reference(
    q: Tensor, pages: Pages, tables: Tables, spec: Spec, scales: tuple[Tensor | None, Tensor | None] = (None, None)
) -> tuple[Tensor, Tensor]:
    """Paged attention in fp32 (fp64 for fp64 inputs).

    Args:
        q: `[tokens, Hq, D]`.
        scales: of the stored keys and values, `[Hkv]`.

    Returns:
        out `[tokens, Hq, Dv]` in q's dtype, and lse `[tokens, Hq]`, natural log, fp32 (fp64 for fp64 inputs).
    """
    work = torch.promote_types(q.dtype, torch.float32)
    rows = rows_of_keys(tables, pages.page_size, q.device)
    k, v = (gather(x, rows, s, work) for x, s in zip(pages, scales, strict=True))
    bounds_q = tuple(map(int, tables.qo_indptr))
    bounds_k = (0, *map(int, np.cumsum(tables.lengths(pages.page_size))))
    if len(bounds_q) == 1:
        return q.new_zeros(0, q.shape[1], v.shape[2]), q.new_zeros(0, q.shape[1], dtype=work)
    empty = torch.empty(0, device=q.device)
    packed = Packed(empty, empty, bounds_q, bounds_k)
    out, lse = dense(q.to(work)[None], k[None], v[None], spec, packed)
    return out[0].to(q.dtype), lse[0].T.contiguous()
