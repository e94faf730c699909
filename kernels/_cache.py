"""What is computed once and kept: bounded, locked, weak to tensors, and no longer true than what it was made from."""

import hashlib
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from threading import RLock
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

V = TypeVar("V")


class _Entry(NamedTuple):
    value: Any
    refs: tuple["weakref.ref[Any]", ...]
    nbytes: int


class Cache(Generic[V]):
    """Values by key, the oldest dropped first.

    A key is all that a value depends on (`identity` and `contents` say what that is of a tensor), or None for what cannot
    be told: then nothing is kept. Objects that the key names by their address are held weakly, and their end ends the entry;
    so a value must not hold them.

    Args:
        most: entries.
        most_bytes: of all values, as `get` is told.
    """

    def __init__(self, most: int, most_bytes: int | None = None) -> None:
        self.most, self.most_bytes = most, most_bytes
        self._entries: dict[Any, _Entry] = {}
        self._nbytes = 0
        # Backward runs in a thread for each device; an object may end while its entry is being dropped.
        self._lock = RLock()

    def get(
        self, key: Any, make: Callable[[], V], objects: Sequence[Any] = (), nbytes: Callable[[V], int] | None = None
    ) -> V:
        """What `make` returned for this key and these very objects; made anew where that is not known."""
        if key is None:
            return make()
        entry = self._entries.get(key)
        if entry is not None and all(ref() is x for ref, x in zip(entry.refs, objects, strict=True)):
            return entry.value  # type: ignore[no-any-return]
        value = make()
        refs = tuple(weakref.ref(x, partial(self._ended, key)) for x in objects)
        with self._lock:
            self._drop(key)
            made = self._entries[key] = _Entry(value, refs, 0 if nbytes is None else nbytes(value))
            self._nbytes += made.nbytes
            while len(self._entries) > self.most or (self.most_bytes is not None and self._nbytes > self.most_bytes):
                oldest = next(iter(self._entries))
                if oldest == key:
                    break
                self._drop(oldest)
        return value

    def _drop(self, key: Any) -> None:
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self._nbytes -= entry.nbytes

    def _ended(self, key: Any, ref: "weakref.ref[Any]") -> None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and any(r is ref for r in entry.refs):
                self._drop(key)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return self._nbytes


def identity(x: Tensor) -> tuple[Any, ...]:
    """Which tensor it is, where it lies and how it reads: all but its numbers."""
    return (id(x), x.data_ptr(), x.dtype, str(x.device), tuple(x.shape), x.stride(), x.requires_grad)


def contents(x: Tensor) -> Any:
    """`identity`, and what tells that the numbers have changed; None where nothing does.

    On the CPU, where reading them costs little, the numbers themselves. On a GPU the version that PyTorch counts: writing
    through `x.data` is not counted, and tensors made in inference mode have none.
    """
    if x.device.type == "cpu":
        numbers = x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return (*identity(x), hashlib.blake2b(numbers, digest_size=16).digest())
    return None if x.is_inference() else (*identity(x), x._version)


def stream(device: torch.device) -> int:
    """The current stream, as CUDA names it: what was made on one is not ready on another."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: it outlives what is kept here, and is replayed on tensors that have changed."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
