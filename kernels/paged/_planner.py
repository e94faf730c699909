"""Plans from the native core, sent to the device in one copy that nobody waits for."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainkit.kernels._cache import capturing
from trainkit.kernels.paged import _plan_reference
from trainkit.kernels.paged._launch import Arrays
from trainkit.kernels.paged._plan_reference import PIECE, Shape
from trainkit.kernels.paged._tables import Tables

try:
    from trainkit.kernels import _native
except ImportError:  # not built: kernels run without it, plans take longer
    _native = None


def shares(tables: Tables) -> bool:
    """Whether some neighbours begin with the same page."""
    begins = tables.kv_indptr[:-1]
    some = np.diff(tables.kv_indptr) > 0
    begins = begins[some]
    if (begins < 0).any() or (begins >= len(tables.kv_indices)).any():
        return False
    first = tables.kv_indices[begins]
    return bool((first[1:] == first[:-1]).any())


class Staging:
    """Pinned memory that copies to the device read from while the host goes on."""

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, Any]] = []

    def take(self, size: int, device: torch.device) -> tuple[Tensor, Any]:
        """A buffer of `size` numbers at least that no copy is reading, and the event to record after the next."""
        if device.type != "cuda":
            return torch.empty(size, dtype=torch.int32), None
        for buffer, event in self._buffers:
            if buffer.numel() >= size and event.query():
                return buffer, event
        self._buffers = [b for b in self._buffers if not b[1].query()]
        made = torch.empty(2 * size, dtype=torch.int32, pin_memory=True), torch.cuda.Event()
        self._buffers.append(made)
        return made


def _aligned(n: int) -> int:
    return -(-n // 4) * 4


class Planner:
    """The arrays of the newest plan."""

    def __init__(self) -> None:
        self.arrays: Any = None
        self.maximum: Any = None
        self._staging = Staging()
        self._key: Any = None
        self._whole = torch.empty(0)
        self._native = None if _native is None else _native.Planner()

    def _make(self, tables: Tables, shape: Shape) -> tuple[tuple[int, ...], int, Any]:
        """Sizes of the plan's five arrays, rows of parts, and what writes the arrays into a buffer at offsets."""
        if self._native is not None:
            *sizes, rows = self._native.plan(*tables, *shape)
            return tuple(sizes), rows, self._native.write
        made = _plan_reference.plan(tables, shape)

        def write(buffer: Any, *offsets: int) -> None:
            for x, at in zip(made[:5], offsets, strict=True):
                buffer[at : at + x.size] = x.ravel()

        return tuple(x.size for x in made[:5]), made.rows, write

    def plan(self, tables: Tables, shape: Shape, head_dim: int, device: torch.device, most: Any) -> None:
        """Plan and send.

        Args:
            most: a `Maximum`, or None.
        """
        if capturing(device):
            raise RuntimeError("plan() inside a CUDA graph would be frozen in it: plan before, capture run()")
        sizes, rows, write = self._make(tables, shape)
        sizes = (*sizes, len(tables.kv_indices))
        tokens = int(tables.qo_indptr[-1])
        if most is not None:
            step = shape.bm // shape.group
            uncut = 2 * (most.requests + most.tokens // step) * shape.kv_heads
            merges = 2 * most.tokens * shape.kv_heads + shape.workers * step
            room = (
                shape.workers + 1, (uncut + shape.workers) * PIECE, most.tokens * 3, most.tokens * shape.kv_heads + 1, merges,
                most.pages,
            )  # fmt: skip
            if any(n > limit for n, limit in zip(sizes, room, strict=True)):
                # Levels upon levels of shared prefixes: without them it fits.
                return self.plan(tables, shape._replace(share=False), head_dim, device, most)
            rows, tokens = merges * shape.group, most.tokens
        else:
            room = sizes
        offsets = np.cumsum([0, *map(_aligned, room)])
        total = int(offsets[-1])
        kept = self.arrays if most is not None and self._fits(most, shape, device) else None
        buffer, event = self._staging.take(total, device)
        numbers = buffer.numpy()
        write(numbers, *(int(x) for x in offsets[:5]))
        numbers[offsets[5] : offsets[5] + sizes[5]] = tables.kv_indices
        if kept is not None:
            self._whole.copy_(buffer[:total], non_blocking=True)
        else:
            self._whole = buffer[:total].to(device, non_blocking=True)
            views = [self._whole[int(a) : int(a) + n] for a, n in zip(offsets, room, strict=False)]
            self.arrays = Arrays(
                *views,
                torch.empty(rows * head_dim, dtype=torch.float32, device=device),
                torch.empty(rows, dtype=torch.float32, device=device),
                torch.zeros(tokens * shape.kv_heads, dtype=torch.int32, device=device),
            )
            self.maximum, self._key = most, (most, shape._replace(share=True), device)
        if event is not None:
            event.record()
        return None

    def _fits(self, most: Any, shape: Shape, device: torch.device) -> bool:
        return self.arrays is not None and self.maximum == most and self._key == (most, shape._replace(share=True), device)
