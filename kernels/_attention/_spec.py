"""What an attention call asks for, checked once: every path reads the same frozen description."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

FP32 = torch.finfo(torch.float32)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Spec:
    """One call's semantics, without its tensors of activations.

    The order on a score is: scale, soft cap, ALiBi, `score_mod`, masks, sinks. With `p = q_idx + Sk - Sq` (the last
    query stands at the last key) the causal mask keeps `kv_idx <= p`, and a window `w` keeps `0 <= p - kv_idx < w`
    if causal, `|p - kv_idx| < w` otherwise.
    """

    scale: float
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    """Positive slopes, fp32 `[Hq]` or `[B, Hq]`; the score loses `slope * |p - kv_idx|`."""
    sinks: Tensor | None = None
    """`[Hq]`, natural-log weight of a key that has no value."""
    score_mod: ScoreMod | None = None
    mask_mod: MaskMod | None = None
    sigmoid: bool = False
    """Each score becomes a probability by itself, without a denominator."""
    dropout_p: float = 0.0
    seed: int = 0
    """32 bits; names the dropout mask, which is the same on every path."""
    deterministic: bool = False

    @property
    def plain(self) -> bool:
        """Whether scale and the causal mask say everything."""
        extras = (self.window, self.softcap, self.alibi_slopes, self.sinks, self.score_mod, self.mask_mod)
        return all(extra is None for extra in extras) and not self.sigmoid and self.dropout_p == 0.0


@dataclass(frozen=True, eq=False)
class Packed:
    """Sequences laid end to end in a batch of one."""

    cu_q: Tensor
    cu_k: Tensor
    bounds_q: tuple[int, ...]
    bounds_k: tuple[int, ...]

    @property
    def max_q(self) -> int:
        """Tokens in the longest query sequence."""
        return max((b - a for a, b in pairwise(self.bounds_q)), default=0)


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse q, k, v unless `[B, Sq, Hq, D]`, `[B, Sk, Hkv, D]`, `[B, Sk, Hkv, Dv]` of one dtype and device."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be [batch, tokens, heads, head_dim], got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be bf16, fp16, fp32 or fp64, got {x.dtype}: cast it first")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}: cast them first")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"q, k and v must share the batch size, got {q.shape[0]}, {k.shape[0]}, {v.shape[0]}")
    if k.shape[1:3] != v.shape[1:3]:
        raise ValueError(f"k and v must share tokens and heads, got {tuple(k.shape[1:3])} and {tuple(v.shape[1:3])}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must share head_dim, got {q.shape[3]} and {k.shape[3]}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of key heads, got {q.shape[2]} and {k.shape[2]}")
    if 0 in (q.shape[2], q.shape[3], v.shape[3]):
        raise ValueError(f"heads and head_dim must be positive, got q {tuple(q.shape)}, v {tuple(v.shape)}")


def _heads_vector(name: str, x: Tensor, q: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    if tuple(x.shape) not in shapes or not x.is_floating_point():
        wanted = " or ".join(str(list(s)) for s in shapes)
        raise ValueError(f"{name} must be a floating-point {wanted}, got {x.dtype} {list(x.shape)}")
    if x.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")


def _number(name: str, x: float | Tensor | None) -> float | None:
    if isinstance(x, Tensor):
        if x.numel() != 1 or (x.requires_grad and torch.is_grad_enabled()):
            raise ValueError(
                f"{name} must be a number, got a tensor of {list(x.shape)}{' that requires gradients' * x.requires_grad}:"
                " learn it in a score_mod that captures it"
            )
        x = x.item()
    if x is not None and (isinstance(x, bool) or not isinstance(x, int | float)):
        raise ValueError(f"{name} must be a number, got {x!r}")
    return x


def make_spec(
    q: Tensor,
    *,
    tokens: int,
    sequences: int,
    causal: bool,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    score_mod: ScoreMod | None,
    mask_mod: MaskMod | None,
    scale: float | None,
    softmax: Literal["softmax", "sigmoid"],
    dropout_p: float,
    seed: int | None,
    deterministic: bool,
    return_lse: bool,
) -> Spec:
    """Check the arguments of `attention` that are not q, k, v, and freeze them.

    Args:
        tokens: queries or keys of a sequence at most: a window as wide as that hides nothing.
        sequences: how many `b` a `[B, Hq]` slope table must serve: the batch, or the packed sequences.

    Raises:
        ValueError: with the rule, the value got and what to do.
    """
    heads = q.shape[2]
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"window counts visible keys and must be an int of at least 1, got {window!r}")
    scale, softcap = _number("scale", scale), _number("softcap", softcap)
    dropout_p = _number("dropout_p", dropout_p) or 0.0
    if softcap is not None and not FP32.tiny <= softcap <= FP32.max:
        raise ValueError(f"softcap must be positive and finite in fp32, got {softcap!r}; None turns it off")
    if scale is not None and not abs(scale) <= FP32.max:
        raise ValueError(f"scale must be finite in fp32, got {scale!r}; None takes head_dim ** -0.5")
    if softmax not in ("softmax", "sigmoid"):
        raise ValueError(f"softmax must be 'softmax' or 'sigmoid', got {softmax!r}")
    if softmax == "sigmoid" and (sinks is not None or return_lse):
        got = "sinks" if sinks is not None else "return_lse=True"
        raise ValueError(f"sigmoid attention has no denominator, so no sinks and no lse, got {got}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p!r}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise ValueError(f"seed must be an int of at least 0, got {seed!r}; None draws one from torch's generator")
    for name, function in (("score_mod", score_mod), ("mask_mod", mask_mod)):
        if function is not None and not callable(function):
            raise ValueError(f"{name} must be a function of indices, got {type(function).__name__}")
    if alibi_slopes is not None:
        _heads_vector("alibi_slopes", alibi_slopes, q, ((heads,), (sequences, heads)))
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            raise ValueError("alibi_slopes must not require gradients, got one that does: learn it in a score_mod")
    if sinks is not None:
        _heads_vector("sinks", sinks, q, ((heads,),))
    if seed is None:
        # Drawn from the CPU generator, which torch.manual_seed governs and which needs no wait for the device.
        seed = int(torch.randint(2**31, ()).item()) if dropout_p > 0 else 0
    return Spec(
        scale=q.shape[3] ** -0.5 if scale is None else float(scale),
        causal=bool(causal),
        window=None if window is not None and window >= tokens else window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        score_mod=score_mod,
        mask_mod=mask_mod,
        sigmoid=softmax == "sigmoid",
        dropout_p=float(dropout_p),
        seed=seed & 0xFFFFFFFF,
        deterministic=bool(deterministic),
    )
