"""What a scheduler asks its driver to do."""

from typing import NamedTuple


class Dispatch(NamedTuple):
    """Run these requests as one batch on this GPU now; `on_gpu_free` says when they are done."""

    model: int
    ids: tuple[int, ...]
    gpu: int


class Drop(NamedTuple):
    """Answer these requests without running them: their deadlines can no longer be met."""

    model: int
    ids: tuple[int, ...]


Action = Dispatch | Drop
