"""PyTorch's own `scaled_dot_product_attention`, taken only where it computes exactly what was asked."""

import torch
from torch import Tensor

from trainkit.kernels._attention._spec import Packed, Spec


def why_not(q: Tensor, k: Tensor, v: Tensor, spec: Spec, packed: Packed | None, return_lse: bool) -> str | None:
    """The reason SDPA cannot serve the call, or None."""
    if packed is not None:
        return "SDPA has no packed sequences"
    if not spec.plain:
        return "SDPA has no such variant"
    if return_lse:
        return "SDPA returns no lse"
    if spec.causal and q.shape[1] != k.shape[1]:
        return "SDPA aligns its causal mask to the top left"
    if 0 in (q.shape[0], q.shape[1], k.shape[1]):
        return "SDPA says nothing of empty sequences"
    return None


def sdpa(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> Tensor:
    """Attention of `[B, S, H, D]` tensors through SDPA; the backend is PyTorch's choice."""
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        qt, kt, vt, is_causal=spec.causal, scale=spec.scale, enable_gqa=q.shape[2] != k.shape[2]
    )
    return out.transpose(1, 2)
