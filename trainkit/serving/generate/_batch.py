"""One iteration's tokens of all requests as one batch, and its attention over the cache."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainkit.kernels import Maximum, PagedAttention
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
        self.shape, self.page_size, self.num_pages, self.device, self.backend = (
            shape,
            page_size,
            num_pages,
            device,
            backend,
        )
        # One page more: what rows of a graph that stand for nobody write.
        size = (shape.layers, num_pages + 1, 2, page_size, shape.kv_heads, shape.head_dim)
        self.layers = torch.zeros(size, dtype=dtype, device=device)
        self._attention: dict[Any, PagedAttention] = {}
        self._planned: set[Any] = set()
        self._tables: list[Tensor] = []
        self._rows = (torch.empty(0, dtype=torch.int64),) * 2
        self._most: Maximum | None = None
        self._fixed: dict[int, Tensor] = {}

    def begin(self, parts: Sequence[Part], places: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Take up a batch.

        Args:
            places: of a CUDA graph, whose tensors stay where they are, for parts of one token each.

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
        at = slots(tables, self.page_size)
        n, ends = len(tokens), qo[1:] - 1
        if places is not None:
            empty = np.zeros(places - n, np.int64)
            tokens, positions = np.concatenate([tokens, empty]), np.concatenate([positions, empty])
            at = np.concatenate([at, np.full(places - n, self.num_pages * self.page_size, np.int32)])
            n, ends = places, np.arange(places, dtype=np.int32)
        numbers = torch.from_numpy(np.concatenate([tokens, positions, at // self.page_size, at % self.page_size, ends]))
        self._most = None
        if places is None:
            sent = numbers.to(self.device)
        else:
            per_request = -(-self.shape.max_length // self.page_size)
            self._most = Maximum(places, places, min(places * per_request, self.num_pages * places))
            sent = self._fixed.setdefault(places, torch.empty_like(numbers, device=self.device))
            sent.copy_(numbers)
        tokens_, positions_, page, place, rows = torch.split(sent, [n, n, n, n, len(ends)])
        self._rows = (page, place)
        self._tables = [torch.from_numpy(x) for x in tables]
        self._planned.clear()
        return tokens_, positions_, rows

    def replan(self) -> None:
        """Plan again, for a graph that was captured with plans of as many places."""
        for key, paged in self._attention.items():
            if key[0] == self._most and key not in self._planned:
                self._plan(key, paged)

    def _plan(self, key: Any, paged: PagedAttention) -> None:
        _, scale, _, _, _, heads, head_dim = key
        paged.plan(
            *self._tables, num_qo_heads=heads, num_kv_heads=self.layers.shape[4], head_dim=head_dim, page_size=self.page_size,
            num_pages=self.num_pages + 1, dtype=self.layers.dtype, scale=scale, cuda_graph_max=self._most, device=self.device,
        )  # fmt: skip
        self._planned.add(key)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, window: int | None = None,
        softcap: float | None = None, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Write a layer's new keys and values, and attend over all that its requests have."""
        cache = self.layers[layer]
        keys, values = cache.unbind(1)
        write(k[0], keys, *self._rows)
        write(v[0], values, *self._rows)
        key = (self._most, scale, window, softcap, sinks is not None, q.shape[2], q.shape[3])
        paged = self._attention.get(key)
        if paged is None:
            made = PagedAttention(window=window, softcap=softcap, sinks=sinks is not None, backend=self.backend)
            paged = self._attention[key] = made
        if key not in self._planned:
            self._plan(key, paged)
        out, _ = paged.run(q[0].to(cache.dtype).contiguous(), (keys, values), sinks=sinks)
        return out[None].to(q.dtype)
