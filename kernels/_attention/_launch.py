"""What keeps a kernel's launch short: descriptors unchecked, templates shared, compiled kernels kept by the caller's key."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Box(NamedTuple):
    """A TMA descriptor to be: a plane of memory and the boxes it is read in, as Triton's launcher wants them."""

    base: Tensor
    shape: Sequence[int]
    strides: Sequence[int]
    padding: str = "zero"


class Kept(NamedTuple):
    """A kernel that was launched before, and those of its arguments that do not change from call to call."""

    compiled: Any
    programs: int
    constants: tuple[Any, ...]

    def __call__(self, *arguments: Any) -> None:
        """Launch with `arguments` before the constants; what Triton specializes on must be as it was the first time."""
        compiled = self.compiled
        stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
        compiled.run(
            self.programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments,
            *self.constants,
        )  # fmt: skip


_COUNTERS: dict[tuple[int, int], Tensor] = {}


def counter(device: torch.device) -> Tensor:
    """A number in device memory that is 0 and that the kernel which counts with it leaves at 0.

    Kernels of one stream run one after the other and share it; a captured graph, which may run beside anything, gets its
    own.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (device.index, torch._C._cuda_getCurrentRawStream(device.index))
    known = _COUNTERS.get(key)
    if known is None:
        known = _COUNTERS[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return known
