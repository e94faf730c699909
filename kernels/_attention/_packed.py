"""Cumulative lengths of packed sequences: checked on the host, once a tensor."""

from itertools import pairwise

import torch
from torch import Tensor

from trainkit.kernels._attention._call import from_host
from trainkit.kernels._attention._spec import Packed
from trainkit.kernels._cache import Cache, capturing, contents

# Reading a CUDA tensor waits for the device: one pair of lengths serves every layer of a step, so it is read once.
_SEEN: Cache[tuple[int, ...]] = Cache(64)


def _host(cu: Tensor) -> tuple[int, ...]:
    key = None if cu.device.type == "cpu" else contents(cu)
    return _SEEN.get(key, lambda: tuple(int(x) for x in cu.tolist()), (cu,))


def _check(name: str, cu: Tensor, tokens: int) -> tuple[int, ...]:
    if isinstance(cu, Tensor) and capturing(cu.device):
        raise ValueError(
            f"cu_seqlens of {name} cannot be read from a GPU while a CUDA graph is captured: pass a CPU tensor (the graph then"
            " keeps its lengths)"
        )
    if not isinstance(cu, Tensor) or cu.dtype != torch.int32 or cu.dim() != 1 or cu.numel() < 2:
        got = f"{cu.dtype} {list(cu.shape)}" if isinstance(cu, Tensor) else type(cu).__name__
        raise ValueError(f"cu_seqlens of {name} must be an int32 [sequences + 1] tensor, got {got}")
    values = _host(cu)
    if values[0] != 0 or values[-1] != tokens or any(b < a for a, b in pairwise(values)):
        raise ValueError(
            f"cu_seqlens of {name} must rise from 0 to its {tokens} tokens, got {values[0]} to {values[-1]}"
            + ("" if values[-1] != tokens or values[0] != 0 else " with a step down")
        )
    return values


def make_packed(cu_seqlens: Tensor | tuple[Tensor, Tensor] | None, q: Tensor, k: Tensor) -> Packed | None:
    """Check `cu_seqlens` (one tensor for both sides, or a (q, k) pair) against q and k.

    Raises:
        ValueError: a batch other than 1, a wrong dtype, lengths that do not add up, or sides of different counts.
    """
    if cu_seqlens is None:
        return None
    if q.shape[0] != 1:
        raise ValueError(f"the batch must be 1 with cu_seqlens, got {q.shape[0]}: lay the sequences end to end")
    pair = cu_seqlens if isinstance(cu_seqlens, tuple | list) else (cu_seqlens, cu_seqlens)
    if len(pair) != 2:
        raise ValueError(f"cu_seqlens must be one tensor or a (q, k) pair, got {len(pair)} of them")
    cu_q, cu_k = pair
    bounds_q, bounds_k = _check("q", cu_q, q.shape[1]), _check("k", cu_k, k.shape[1])
    if len(bounds_q) != len(bounds_k):
        raise ValueError(
            f"cu_seqlens must name as many sequences of q as of k, got {len(bounds_q) - 1}, {len(bounds_k) - 1}"
        )
    return Packed(_on(cu_q, bounds_q, q), _on(cu_k, bounds_k, k), bounds_q, bounds_k)


def _on(cu: Tensor, bounds: tuple[int, ...], x: Tensor) -> Tensor:
    """The lengths where x lies."""
    return from_host(bounds, x.device) if cu.device != x.device else cu.contiguous()
