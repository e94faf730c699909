"""Tensors seen as matrices, which is how TMA reads them."""

from typing import NamedTuple

import torch
from torch import Tensor

from trainkit.kernels._launch import Descriptor


class MatrixView(NamedTuple):
    """A tensor `[B, S, H, D]` as a matrix: token i of (b, h) is row `b * batch + h * head + i`, from column `h * col` on."""

    shape: tuple[int, int]
    stride: int
    batch: int
    head: int
    col: int
    copied: bool = False
    """Whether the matrix is that of a dense copy, neither tokens nor heads lying evenly."""

    @property
    def steps(self) -> tuple[int, int, int]:
        return self.batch, self.head, self.col

    def descriptor(self, slot: int, rows: int, width: int) -> Descriptor:
        return Descriptor(slot, self.shape, self.stride, (rows, width))


def matrix_view(x: Tensor) -> MatrixView:
    """The tensor as TMA reads it."""
    B, S, H, D = x.shape
    sb, ss, sh, sd = x.stride()
    even = sd == 1 and ss * x.element_size() % 16 == 0
    if even and sh == D and (B == 1 or sb == S * ss) and ss >= H * D:
        return MatrixView((B * S, H * D), ss, S, 0, D)
    if even and sh == S * ss and (B == 1 or sb == H * sh) and ss >= D:
        return MatrixView((B * H * S, D), ss, H * S, S, 0)
    return dense_view(*x.shape)._replace(copied=True)


def dense_view(B: int, S: int, H: int, D: int) -> MatrixView:
    """A contiguous tensor."""
    return MatrixView((B * S, H * D), H * D, S, 0, D)


def aligned(x: Tensor) -> Tensor:
    """The tensor, or a copy of it where TMA could not read it for its address."""
    return x.clone(memory_format=torch.contiguous_format) if x.data_ptr() % 16 else x
