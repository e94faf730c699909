"""Page tables as servers keep them (FlashInfer's index arrays, unchanged), and the cache they point into; checked on the host."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Numbers = npt.NDArray[np.int32]
LARGEST_PAGE = 128
LAYOUTS = ("NHD", "HND")


class Tables(NamedTuple):
    """Which queries and which pages each of B requests has, int32."""

    qo_indptr: Numbers
    """`[B + 1]`: request i has query rows `[qo_indptr[i], qo_indptr[i + 1])`."""
    kv_indptr: Numbers
    """`[B + 1]`: and the pages `kv_indices[kv_indptr[i] : kv_indptr[i + 1]]`, in order."""
    kv_indices: Numbers
    kv_last_page_len: Numbers
    """`[B]`: keys in the last of them."""

    def lengths(self, page_size: int) -> Numbers:
        """Keys of each request, `[B]`."""
        pages = np.diff(self.kv_indptr)
        return np.where(pages > 0, (pages - 1) * page_size + self.kv_last_page_len, 0).astype(np.int32)


def on_host(name: str, x: Any) -> Numbers:
    """An index array as numpy's.

    A device tensor costs one copy that waits for the device.

    Raises:
        ValueError: not one dimension of int32.
    """
    if isinstance(x, Tensor):
        x = x.detach().cpu().numpy()
    if not isinstance(x, np.ndarray) or x.dtype != np.int32 or x.ndim != 1:
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, np.ndarray) else type(x).__name__
        raise ValueError(f"{name} must be an int32 tensor of one dimension, got {got}")
    return np.ascontiguousarray(x)


def check(tables: Tables, page_size: int, num_pages: int) -> None:
    """Refuse tables that a kernel could not follow.

    Raises:
        ValueError: lengths that disagree, offsets that fall, pages that do not exist, a last page that is empty or too full.
    """
    B = len(tables.qo_indptr) - 1
    if B < 0 or len(tables.kv_indptr) != B + 1 or len(tables.kv_last_page_len) != B:
        raise ValueError(
            "qo_indptr and kv_indptr must have one number more than there are requests and kv_last_page_len as many, got"
            f" {len(tables.qo_indptr)}, {len(tables.kv_indptr)} and {len(tables.kv_last_page_len)}"
        )
    for name, x in (("qo_indptr", tables.qo_indptr), ("kv_indptr", tables.kv_indptr)):
        if x[0] != 0:
            raise ValueError(f"{name} must begin with 0, got {x[0]}")
        falls = np.flatnonzero(np.diff(x) < 0)
        if falls.size:
            i = int(falls[0])
            raise ValueError(f"{name} must not fall, got {x[i]} and then {x[i + 1]} at request {i}")
    if tables.kv_indptr[-1] != len(tables.kv_indices):
        raise ValueError(
            f"kv_indptr must end at the {len(tables.kv_indices)} numbers of kv_indices, got {tables.kv_indptr[-1]}"
        )
    bad = np.flatnonzero((tables.kv_indices < 0) | (tables.kv_indices >= num_pages))
    if bad.size:
        i = int(bad[0])
        request = int(np.searchsorted(tables.kv_indptr, i, side="right")) - 1
        raise ValueError(
            f"kv_indices must name pages from 0 to {num_pages - 1}, got {tables.kv_indices[i]} at {i} (request {request})"
        )
    full = np.flatnonzero(
        (np.diff(tables.kv_indptr) > 0) & ((tables.kv_last_page_len < 1) | (tables.kv_last_page_len > page_size))
    )
    if full.size:
        i = int(full[0])
        raise ValueError(
            f"kv_last_page_len must be 1 to page_size = {page_size} keys, got {tables.kv_last_page_len[i]} at request {i}"
        )


def check_page_size(page_size: int) -> None:
    """Refuse pages that are no pages.

    Raises:
        ValueError: not 1 to 128 keys.
    """
    if not 1 <= page_size <= LARGEST_PAGE:
        raise ValueError(f"page_size must be 1 to {LARGEST_PAGE} keys, got {page_size}")


class Pages(NamedTuple):
    """Keys or values of a cache, `[pages, page, Hkv, D]` whatever its memory looks like."""

    keys: Tensor
    values: Tensor

    @property
    def page_size(self) -> int:
        return self.keys.shape[1]


def pages_of(cache: Tensor | tuple[Tensor, Tensor], layout: str) -> Pages:
    """Both halves of a cache as views.

    Args:
        cache: one tensor `[pages, 2, page, Hkv, D]` (NHD) or `[pages, 2, Hkv, page, D]` (HND), or (keys, values) without the 2.

    Raises:
        ValueError: another shape.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be 'NHD' or 'HND', got {layout!r}")
    if isinstance(cache, Tensor):
        if cache.dim() != 5 or cache.shape[1] != 2:
            raise ValueError(f"a cache of one tensor must be [pages, 2, ...] of 5 dimensions, got {list(cache.shape)}")
        keys, values = cache.unbind(1)
    else:
        keys, values = cache
    if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3]:
        raise ValueError(
            "keys and values of a cache must be of 4 dimensions and share pages, keys a page and heads, got"
            f" {list(keys.shape)} and {list(values.shape)}"
        )
    if keys.dtype != values.dtype or keys.device != values.device:
        raise ValueError(
            f"keys and values of a cache must share dtype and device, got {keys.dtype} on {keys.device}, {values.dtype} on"
            f" {values.device}"
        )
    if layout == "HND":
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    check_page_size(keys.shape[1])
    return Pages(keys, values)


def rows_of_keys(tables: Tables, page_size: int, device: torch.device) -> Tensor:
    """Which row of the flattened cache holds each key, all requests end to end, int64 `[keys]`."""
    rows = []
    for i, n in enumerate(tables.lengths(page_size)):
        pages = tables.kv_indices[tables.kv_indptr[i] : tables.kv_indptr[i + 1]].astype(np.int64)
        j = np.arange(n)
        rows.append(pages[j // page_size] * page_size + j % page_size)
    return torch.from_numpy(np.concatenate(rows) if rows else np.zeros(0, np.int64)).to(device)
