"""`append_kv`: new keys and values into the pages of their requests."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trainkit.kernels.paged._tables import Numbers, Tables, check, on_host, pages_of


def slots(tables: Tables, page_size: int) -> Numbers:
    """Which row of the flattened cache each new token has, `[tokens]`: a request's queries are its last keys.

    Raises:
        ValueError: more tokens than keys, or a page that two requests would write.
    """
    lengths, counts = tables.lengths(page_size), np.diff(tables.qo_indptr)
    long = np.flatnonzero(counts > lengths)
    if long.size:
        i = int(long[0])
        raise ValueError(
            f"request {i} appends {counts[i]} tokens, but its pages hold {lengths[i]} keys: give it more pages before"
        )
    request = np.repeat(np.arange(len(counts)), counts)
    at = np.arange(len(request)) - tables.qo_indptr[request] + (lengths - counts)[request]
    pages = tables.kv_indices[tables.kv_indptr[request] + at // page_size]
    writes = np.unique(np.stack([pages, request]), axis=1)
    twice = np.flatnonzero(np.diff(writes[0]) == 0)
    if twice.size:
        page, first = writes[:, int(twice[0])]
        raise ValueError(
            f"page {page} is written by requests {first} and {writes[1, int(twice[0]) + 1]}: a shared page is read only, copy it"
        )
    return (pages.astype(np.int64) * page_size + at % page_size).astype(np.int32)


def append_kv(
    k: Tensor, v: Tensor, kv_cache: Tensor | tuple[Tensor, Tensor], qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor,
    kv_last_page_len: Tensor, *, layout: Literal["NHD", "HND"] = "NHD", k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Write new tokens' keys and values where the tables, which count them already, say their requests end; no gradient.

    Args:
        k: `[tokens, Hkv, D]`, requests end to end as in `qo_indptr`.
        v: `[tokens, Hkv, Dv]`.
        kv_cache: one tensor as `layout` says, or (keys, values); written in place.
        qo_indptr: int32 tables as `PagedAttention.plan` takes them, on the host.
        k_scale: fp32 `[Hkv]`, for a cache in fp8: what is stored is the key over this.
        v_scale: the same for values.

    Raises:
        ValueError: tables that cannot be, an append beyond a request's pages, or a page written by two requests.
    """
    pages = pages_of(kv_cache, layout)
    names = ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len")
    given = (qo_indptr, kv_indptr, kv_indices, kv_last_page_len)
    tables = Tables(*(on_host(n, x) for n, x in zip(names, given, strict=True)))
    check(tables, pages.page_size, pages.keys.shape[0])
    rows = slots(tables, pages.page_size)
    for name, x, cache in (("k", k, pages.keys), ("v", v, pages.values)):
        if tuple(x.shape) != (len(rows), *cache.shape[2:]):
            raise ValueError(f"{name} must be {[len(rows), *cache.shape[2:]]} as the tables say, got {list(x.shape)}")
    index = torch.from_numpy(rows.astype(np.int64)).to(k.device)
    for x, cache, scale in ((k, pages.keys, k_scale), (v, pages.values, v_scale)):
        write(x if scale is None else x.float() / scale[:, None], cache, index)


def write(x: Tensor, cache: Tensor, rows: Tensor) -> None:
    """Put `[tokens, Hkv, D]` into these rows, int64, of a cache `[pages, page, Hkv, D]`."""
    page_size = cache.shape[1]
    x = x.detach()
    if cache.dtype == torch.float8_e4m3fn:
        # A number beyond fp8's largest becomes that, not NaN; written as bytes, which every indexing kernel knows.
        most = torch.finfo(cache.dtype).max
        x, cache = x.float().clamp(-most, most).to(cache.dtype).view(torch.uint8), cache.view(torch.uint8)
    with torch.no_grad():
        cache[rows // page_size, rows % page_size] = x.to(cache.dtype)
