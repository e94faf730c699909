"""One iteration's tokens of all requests as one batch, and its attention over the cache."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainkit.kernels import PagedAttention
from trainkit.kernels.paged._append import slots, write
from trainkit.kernels.paged._tables import Tables
from trainkit.serving.generate._decoder import CacheShape


class Part(NamedTuple):
    """What a request does in an iteration: these tokens, after `past` that are in its pages."""

    tokens: Sequence[int]
    past: int
    pages: Sequence[int]


class Cache:
    """Keys and values of all layers, and the plans of the batch that is being computed.

    Args:
        backend: of `PagedAttention`.
    """

    def __init__(
        self, shape: CacheShape, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device, backend: str
    ) -> None:
        self.shape, self.page_size, self.num_pages, self.device, self.backend = shape, page_size, num_pages, device, backend
        size = (shape.layers, num_pages, 2, page_size, shape.kv_heads, shape.head_dim)
        self.layers = torch.zeros(size, dtype=dtype, device=device)
        self._attention: dict[Any, PagedAttention] = {}
        self._planned: set[Any] = set()
        self._tables: list[Tensor] = []
        self._rows = torch.empty(0, dtype=torch.int64)

    def begin(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor, Tensor]:
        """Take up a batch.

        Returns:
            Tokens `[n]`, their positions, and the row of each part's last token.
        """
        counts = [len(p.tokens) for p in parts]
        lengths = [p.past + len(p.tokens) for p in parts]
        pages = [-(-n // self.page_size) for n in lengths]
        qo = np.cumsum([0, *counts], dtype=np.int32)
        tables = Tables(
            qo,
            np.cumsum([0, *pages], dtype=np.int32),
            np.array([x for p, n in zip(parts, pages, strict=True) for x in p.pages[:n]], np.int32),
            np.array([n - (m - 1) * self.page_size for n, m in zip(lengths, pages, strict=True)], np.int32),
        )
        tokens = np.array([t for p in parts for t in p.tokens], np.int64)
        positions = np.concatenate([np.arange(p.past, n) for p, n in zip(parts, lengths, strict=True)]).astype(np.int64)
        numbers = np.concatenate([tokens, positions, slots(tables, self.page_size), qo[1:] - 1])
        sent = torch.from_numpy(numbers).to(self.device)
        tokens_, positions_, self._rows, rows = sent.split([len(tokens), len(tokens), len(tokens), len(parts)])
        self._tables = [torch.from_numpy(x) for x in tables]
        self._planned.clear()
        return tokens_, positions_, rows

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, window: int | None = None,
        softcap: float | None = None, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Write a layer's new keys and values, and attend over all that its requests have."""
        cache = self.layers[layer]
        keys, values = cache.unbind(1)
        write(k[0], keys, self._rows)
        write(v[0], values, self._rows)
        key = (scale, window, softcap, sinks is not None)
        paged = self._attention.get(key)
        if paged is None:
            made = PagedAttention(window=window, softcap=softcap, sinks=sinks is not None, backend=self.backend)
            paged = self._attention[key] = made
        if key not in self._planned:
            paged.plan(
                *self._tables, num_qo_heads=q.shape[2], num_kv_heads=k.shape[2], head_dim=q.shape[3], page_size=self.page_size,
                num_pages=self.num_pages, dtype=cache.dtype, scale=scale, device=self.device,
            )  # fmt: skip
            self._planned.add(key)
        out, _ = paged.run(q[0].to(cache.dtype).contiguous(), (keys, values), sinks=sinks)
        return out[None].to(q.dtype)
