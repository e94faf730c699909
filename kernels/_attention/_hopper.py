"""The Hopper path: Gluon kernels for bf16 and fp16 on compute capability 9, head_dim 64, 128 and 256."""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainkit.kernels._attention import _triton
from trainkit.kernels._attention._codegen import arguments
from trainkit.kernels._attention._spec import Spec
from trainkit.kernels._attention._triton import Call, Tiling

HEADS = (64, 128, 256)
GLUON = "3.6"
"""Gluon is experimental: its names change from one version of Triton to the next."""
ROWS = 128
"""Queries a program, 64 a warpgroup."""


@cache
def _triton_version() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])


@cache
def _capability(device: int) -> int:
    return torch.cuda.get_device_capability(device)[0]


def why_not(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> str | None:
    """The reason the Hopper path cannot serve the call, or None."""
    lack = _triton.why_not(q, v, spec)
    if lack:
        return lack
    if not q.is_cuda or _capability(q.device.index) != 9:
        return "the device is no Hopper GPU"
    if _triton_version() != GLUON:
        return f"the Hopper kernels are written in the Gluon of Triton {GLUON}, got {_triton_version()}"
    return unsupported(q, k, v, spec)


def unsupported(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> str | None:
    """What of the call, device aside, the Hopper kernels do not have."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"wgmma multiplies bf16 and fp16 here, got {q.dtype}"
    if q.shape[3] not in HEADS or v.shape[3] not in HEADS:
        return f"Hopper kernels have head_dim 64, 128 and 256, got {q.shape[3]} and {v.shape[3]}"
    if spec.sigmoid or spec.dropout_p > 0:
        return "sigmoid and dropout are in the Triton path"
    if spec.scale <= 0:
        return f"the folded softmax needs a positive scale, got {spec.scale}"
    return None


class Plane(NamedTuple):
    """A tensor `[B, S, H, D]` as a matrix of rows: token i of (b, h) is row `b * batch + h * head + i`, column `h * col`."""

    tensor: Tensor
    shape: tuple[int, int]
    stride: int
    batch: int
    head: int
    col: int


def plane(x: Tensor) -> Plane:
    """The tensor as TMA reads it: in place when its tokens or its heads lie evenly, else a copy."""
    B, S, H, D = x.shape
    sb, ss, sh, sd = x.stride()
    even = sd == 1 and x.data_ptr() % 16 == 0 and ss * x.element_size() % 16 == 0
    if even and sh == D and (B == 1 or sb == S * ss) and ss >= H * D:
        return Plane(x, (B * S, H * D), ss, S, 0, D)
    if even and sh == S * ss and (B == 1 or sb == H * sh) and ss >= D:
        return Plane(x, (B * H * S, D), ss, H * S, S, 0)
    return plane(x.contiguous())


def descriptor(p: Plane, rows: int, width: int) -> Any:
    """A TMA descriptor of `[rows, width]` boxes of a plane."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(
        p.tensor, list(p.shape), [p.stride, 1], [rows, width], _swizzle(rows, width, p.tensor.dtype)
    )


@cache
def _swizzle(rows: int, width: int, dtype: torch.dtype) -> Any:
    import triton.experimental.gluon.language as gl

    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}[dtype]
    return gl.NVMMASharedLayout.get_default_for([rows, width], element)


def _ring(d: int, dv: int) -> tuple[int, int]:
    """Keys a block and buffers in the ring, by what 227 KB of shared memory and 240 registers hold."""
    wide = max(d, dv)
    return (128, 4) if wide == 64 else (128, 2) if wide == 128 else (64, 2)


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: Call, launch: Any = None
) -> tuple[Tensor, Tensor]:
    """Compute out `[B, Sq, Hq, Dv]` and lse `[B, Hq, Sq]` fp32.

    Args:
        launch: called with the kernel and grid instead of `kernel[grid]` (the tests compile without a GPU).
    """
    from trainkit.kernels._attention import _hopper_forward

    spec, D, DV = call.spec, q.shape[3], v.shape[3]
    out = torch.empty(*q.shape[:3], DV, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    bn, stages = _ring(D, DV)
    grid, pointers, strides, listed = _triton.layout(call, q, k, Tiling(ROWS, bn, 4, stages), False)
    if 0 in grid:
        return out, lse
    qp, kp, vp, op = plane(q), plane(k), plane(v), plane(out)
    functions = call.variant.functions("gluon")
    kernel = _hopper_forward.forward
    (launch(kernel, grid) if launch else kernel[grid])(
        descriptor(qp, 64, D), descriptor(kp, bn, D), descriptor(vp, bn, DV), descriptor(op, 64, DV), out, lse, sinks,
        *pointers, *strides, *qp[3:], *kp[3:], *vp[3:], q.shape[2] * DV, q.shape[2], q.shape[1], k.shape[1],
        spec.window or 0, spec.scale,
        () if call.variant.score is None else arguments(call.variant.score),
        () if call.variant.mask is None else arguments(call.variant.mask),
        GROUP=q.shape[2] // k.shape[2], DV=DV, BN=bn, ST=stages, CAUSAL=spec.causal, WINDOW=spec.window is not None,
        SINK=sinks is not None, PACKED=call.packed is not None, LISTED=listed, TMA_OUT=D == DV,
        SCORE=functions.score, MASK=functions.mask, num_warps=4,
    )  # fmt: skip
    return out, lse


def _backward_tiles(d: int, dv: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(queries a block, ring) of the key kernel and (keys a block, ring) of the query kernel."""
    wide = max(d, dv)
    return ((64, 4), (64, 4)) if wide == 64 else ((64, 2), (64, 4)) if wide == 128 else ((32, 2), (32, 2))


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grad: Tensor,
    delta: Tensor,
    call: Call,
    launch: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous; `delta` as `_triton.row_delta` gives it."""
    from trainkit.kernels._attention import _hopper_backward_keys, _hopper_backward_queries

    spec, D, DV = call.spec, q.shape[3], v.shape[3]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    planes = qp, kp, vp, gp = plane(q), plane(k), plane(v), plane(grad)
    dqp, dkp, dvp = plane(dq), plane(dk), plane(dv)
    steps = tuple(n for p in planes for n in p[3:])
    functions = call.variant.functions("gluon")
    scalars = (
        q.shape[2], q.shape[1], k.shape[1], spec.window or 0, spec.scale,
        () if call.variant.score is None else arguments(call.variant.score),
        () if call.variant.mask is None else arguments(call.variant.mask),
    )  # fmt: skip
    constants = {
        "GROUP": q.shape[2] // k.shape[2], "D": D, "DV": DV, "CAUSAL": spec.causal, "WINDOW": spec.window is not None,
        "PACKED": call.packed is not None, "num_warps": 4,
    }  # fmt: skip
    (bm, ring), (bn, key_ring) = _backward_tiles(D, DV)

    grid, pointers, strides, listed = _triton.layout(call, q, k, Tiling(bm, ROWS, 4, ring), True)
    kernel = _hopper_backward_keys.backward_keys
    # Two accumulators of 256 columns do not fit beside a tile of scores: each gets a pass of its own.
    passes = ((True, False), (False, True)) if max(D, DV) == 256 else ((True, True),)
    # dQ in the same pass saves two of seven products; its atomic adds come in any order.
    fused = D == DV == 128 and not spec.deterministic
    total = (
        torch.zeros(q.shape, dtype=torch.float32, device=q.device) if fused else torch.empty(64, 64, device=q.device)
    )
    total_plane = plane(total) if fused else Plane(total, (64, 64), 64, 0, 0, 0)
    for want_dk, want_dv in passes if 0 not in grid else ():
        (launch(kernel, grid) if launch else kernel[grid])(
            descriptor(qp, bm, D), descriptor(kp, 64, D), descriptor(vp, 64, DV), descriptor(gp, bm, DV),
            descriptor(dkp, 64, D), descriptor(dvp, 64, DV), descriptor(total_plane, 64, 64), dk, dv, lse, delta,
            *pointers, *strides, *steps, k.shape[2] * D, k.shape[2] * DV, *scalars, BM=bm, ST=ring, WANT_DK=want_dk,
            WANT_DV=want_dv, FUSED=fused, LISTED=listed, SCORE=functions.score_t, GRAD=functions.score_grad_t,
            MASK=functions.mask_t, **constants,
        )  # fmt: skip
    if fused:
        return total.to(q.dtype), dk, dv

    grid, pointers, strides, listed = _triton.layout(call, q, k, Tiling(ROWS, bn, 4, key_ring), False)
    kernel = _hopper_backward_queries.backward_queries
    if 0 not in grid:
        (launch(kernel, grid) if launch else kernel[grid])(
            descriptor(qp, 64, D), descriptor(kp, bn, D), descriptor(vp, bn, DV), descriptor(gp, 64, DV),
            descriptor(dqp, 64, D), dq, lse, delta, *pointers, *strides, *steps, q.shape[2] * D, *scalars, BN=bn,
            ST=key_ring, LISTED=listed, SCORE=functions.score, GRAD=functions.score_grad, MASK=functions.mask,
            **constants,
        )  # fmt: skip
    return dq, dk, dv
