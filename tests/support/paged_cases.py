"""Random batches over pages, for the tests of paged attention."""

from typing import NamedTuple

import numpy as np
import torch


class Batch(NamedTuple):
    tables: list
    """qo_indptr, kv_indptr, kv_indices, kv_last_page_len."""
    pages: int
    page_size: int


def batch(queries, keys, page_size, *, prefix=0, seed=0, spare=3):
    """Requests of so many queries and keys, pages in random order; `prefix` pages are the same in all of them."""
    counts = [-(-n // page_size) for n in keys]
    indptr = torch.tensor([0, *counts]).cumsum(0).int()
    total = sum(counts) + spare
    indices = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: sum(counts)].int()
    for i in range(1, len(keys)):
        if prefix:
            indices[indptr[i] : indptr[i] + prefix] = indices[:prefix]
    last = [0 if n == 0 else n - (c - 1) * page_size for n, c in zip(keys, counts, strict=True)]
    qo = torch.tensor([0, *queries]).cumsum(0).int()
    return Batch([qo, indptr, indices, torch.tensor(last, dtype=torch.int32)], total, page_size)


def tensors(made, Hq, Hkv, D, dtype=torch.float32, device="cpu", layout="NHD", seed=0):
    """Queries and a cache."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(int(made.tables[0][-1]), Hq, D, generator=g)
    inner = (made.page_size, Hkv) if layout == "NHD" else (Hkv, made.page_size)
    cache = torch.randn(made.pages, 2, *inner, D, generator=g)
    return q.to(device, dtype), cache.to(device, dtype)


def planned(paged, made, q, cache, **more):
    """Plan for these tensors."""
    kv_heads = cache.shape[3] if paged.layout == "NHD" else cache.shape[2]
    paged.plan(
        *made.tables, num_qo_heads=q.shape[1], num_kv_heads=kv_heads, head_dim=q.shape[2], page_size=made.page_size,
        num_pages=made.pages, dtype=q.dtype, device=q.device, **more,
    )  # fmt: skip
    return paged


def numpy_tables(made):
    return [np.asarray(x) for x in made.tables]
