"""`torch.nn.attention.activate_flash_attention_impl("trainkit")`: SDPA's flash backend runs our kernels."""

from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from trainkit.kernels._attention._autograd import run_backward, run_forward
from trainkit.kernels._attention._ops import make_call

NAME = "trainkit"


class Handle:
    """What the registry keeps while our kernels are active; `remove` gives PyTorch its own back."""

    def __init__(self, library: Library) -> None:
        self._library: Library | None = library

    def remove(self) -> None:
        """Take our kernels out of the dispatcher."""
        if self._library is not None:
            self._library._destroy()  # type: ignore[no-untyped-call]
        self._library = None


def _call(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, is_causal: bool, scale: float | None) -> Any:
    if dropout_p:
        raise ValueError(f"trainkit's flash attention has no dropout of PyTorch's kind, got dropout_p={dropout_p}")
    if is_causal and q.shape[1] != k.shape[1]:
        # SDPA aligns a causal mask to the top left, our kernels to the last key.
        raise ValueError(f"causal attention through SDPA needs as many queries as keys, got {q.shape[1]}, {k.shape[1]}")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    deterministic = torch.are_deterministic_algorithms_enabled()
    options = (is_causal, None, None, scale, False, 0.0, 0, deterministic)
    return make_call(q, k, v, None, None, None, None, options)


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """Laid out as PyTorch says of its own kernels, which compiled graphs count on: as the input is."""
    wanted = torch.empty_like(like[..., : x.shape[3]], dtype=x.dtype) if like.shape[3] >= x.shape[3] else x
    return x if wanted.stride() == x.stride() else wanted.copy_(x)


def forward(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
    return_debug_mask: bool = False, *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """`aten::_scaled_dot_product_flash_attention` of `[B, H, S, D]` tensors."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, lse = run_forward(q, k, v, None, _call(q, k, v, dropout_p, is_causal, scale))
    none = torch.empty(0, dtype=torch.uint64, device=q.device)
    debug = torch.empty(0, dtype=q.dtype, device=q.device)
    return _laid_out(out.transpose(1, 2), query), lse, None, None, q.shape[1], k.shape[1], none, none, debug


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, cum_seq_q: Any,
    cum_seq_k: Any, max_q: int, max_k: int, dropout_p: float, is_causal: bool, philox_seed: Any, philox_offset: Any, *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`aten::_scaled_dot_product_flash_attention_backward`."""
    q, k, v, o, g = (x.transpose(1, 2) for x in (query, key, value, out, grad_out))
    call = _call(q, k, v, dropout_p, is_causal, scale)
    dq, dk, dv, _, _ = run_backward(q, k, v, None, o, logsumexp, g, None, call)
    pairs = zip((dq, dk, dv), (query, key, value), strict=True)
    return tuple(_laid_out(x.transpose(1, 2), like) for x, like in pairs)


def _activate() -> Handle:
    library = Library("aten", "IMPL", "CUDA")  # type: ignore[no-untyped-call]
    library.impl("_scaled_dot_product_flash_attention", forward, "CUDA")  # type: ignore[no-untyped-call]
    library.impl("_scaled_dot_product_flash_attention_backward", backward, "CUDA")  # type: ignore[no-untyped-call]
    return Handle(library)


def register_torch() -> str:
    """Make our kernels known to `torch.nn.attention` as a flash attention implementation.

    After `torch.nn.attention.activate_flash_attention_impl("trainkit")`, `scaled_dot_product_attention` on CUDA runs them
    wherever PyTorch chooses its flash backend; `restore_flash_attention_impl()` ends that. A call that they cannot serve
    (dropout, a causal mask over other keys than queries) raises.

    Returns:
        The name to activate.

    Raises:
        ImportError: a PyTorch without the registry.
    """
    try:
        from torch.nn.attention import register_flash_attention_impl
    except ImportError as error:
        raise ImportError(f"torch {torch.__version__} has no registry of flash attention kernels: {error}") from error
    register_flash_attention_impl(NAME, register_fn=_activate)
    return NAME
