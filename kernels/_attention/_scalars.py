"""Running FlexAttention's functions of scalars: one element at a time as they are written, vectorised by vmap."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class ScalarIndex(TorchFunctionMode):
    """Makes `table[h, q_idx]` with 0-dim tensor indices a gather.

    PyTorch would read such an index as a Python number, which neither vmap nor a tracer allows.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__getitem__:
            x, index = args
            index = index if isinstance(index, tuple) else (index,)
            if any(isinstance(i, Tensor) for i in index) and all(isinstance(i, Tensor | int) for i in index):
                index = [i if isinstance(i, Tensor) else torch.tensor(i, device=x.device) for i in index]
                return torch.ops.aten.index(x, index)
        return func(*args, **(kwargs or {}))


def over_grid(scalar: Callable[..., Tensor], score: Tensor | None, indices: tuple[Tensor, ...]) -> Tensor:
    """Call a score_mod (or, with `score=None`, a mask_mod) at every (b, h, q_idx, kv_idx).

    Args:
        score: `[B, H, Sq, Sk]`.
        indices: the four index vectors, int `[B]`, `[H]`, `[Sq]`, `[Sk]`.

    Returns:
        `[B, H, Sq, Sk]`, and more dimensions if the function returns no scalar.
    """
    lead = () if score is None else (0,)
    device = indices[0].device

    def function(*args: Tensor) -> Tensor:
        # A constant is a result too.
        x = scalar(*args)
        return torch.full((), x, device=device) if isinstance(x, bool | int | float) else x

    over: Callable[..., Tensor] = function
    for axis in (3, 2, 1, 0):
        over = torch.vmap(over, in_dims=(*lead, *(0 if i == axis else None for i in range(4))))
    with ScalarIndex():
        return over(*indices) if score is None else over(score, *indices)
