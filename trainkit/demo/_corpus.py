"""The corpus: the source text of the running Python's standard library, as bytes, and a loader that can be resumed."""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainkit._files import publish

_VALIDATION_SHARE = 20  # one file in twenty


def write_corpus(folder: Path) -> None:
    """Write `train.bin` and `validation.bin` (uint8): every .py file of the standard library, split by file.

    A run keeps its own copy, so that it resumes on the same bytes after Python itself was upgraded.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, list[bytes]] = {"train": [], "validation": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if name.parts[0] in ("site-packages", "dist-packages") or not path.is_file():
            continue
        chosen = hashlib.blake2s(name.as_posix().encode()).digest()[0] % _VALIDATION_SHARE == 0
        parts["validation" if chosen else "train"].append(path.read_bytes())
    for split, texts in parts.items():
        if len(b"".join(texts)) < 1 << 16:
            raise ValueError(f"the standard library's source is needed as corpus, {root} holds hardly any: install it")
        temporary = folder / f".{split}.tmp"
        temporary.write_bytes(b"".join(texts))
        publish(temporary, folder / f"{split}.bin")


def read_corpus(folder: Path, split: str) -> Tensor:
    """The bytes of one split, shape [n], uint8, mapped from disk."""
    return torch.from_numpy(np.memmap(folder / f"{split}.bin", dtype=np.uint8, mode="c"))


class WindowLoader:
    """Batches of random windows of the corpus; batch `i` is a function of (seed, i) alone.

    Iterating goes on where the loader stands, and `state_dict` says where that is: a resumed run sees the batches
    that the interrupted one would have seen.

    Args:
        data: the corpus, [n] uint8.
        batch: sequences a batch and rank.
        context: bytes a sequence.
        length: batches an epoch.
        seed: of the windows.
        rank: which share of each batch is ours.
        world_size: how many shares there are.
    """

    def __init__(
        self, data: Tensor, *, batch: int, context: int, length: int, seed: int, rank: int, world_size: int
    ) -> None:
        self._data, self._batch, self._context, self._length = data, batch, context, length
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._next = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Tensor]:
        # A loader that stands inside an epoch finishes it: that is what resuming means.
        while True:
            index = self._next
            self._next += 1
            yield self._read(index)
            if self._next % self._length == 0:
                return

    def _read(self, index: int) -> Tensor:
        rows = self._batch * self._world_size
        random = np.random.default_rng([self._seed, index])
        starts = random.integers(0, len(self._data) - self._context, size=rows)[self._rank :: self._world_size]
        windows = [self._data[start : start + self._context + 1] for start in starts.tolist()]
        return torch.stack(windows).long()

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, in batches given out."""
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand there again."""
        self._next = int(state["next"])
