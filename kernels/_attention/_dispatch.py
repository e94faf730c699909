"""`attention`: checks once, then takes the fastest path that computes exactly what was asked."""

from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import torch
from torch import Tensor

from trainkit.kernels._attention import _hooks, _hopper, _ops, _sdpa, _triton
from trainkit.kernels._attention._autograd import attend, outside_graph
from trainkit.kernels._attention._hooks import Hook
from trainkit.kernels._attention._packed import make_packed
from trainkit.kernels._attention._reference import reference
from trainkit.kernels._attention._spec import MaskMod, Packed, ScoreMod, Spec, check_tensors, make_spec
from trainkit.kernels.fused._launch import autocast_dtype

BACKENDS = ("auto", "hopper", "triton", "sdpa", "reference")


class Options(TypedDict, total=False):
    """What `attention` takes by name, but what its results depend on."""

    causal: bool
    window: int | None
    softcap: float | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    score_mod: ScoreMod | None
    mask_mod: MaskMod | None
    rope: tuple[Tensor, Tensor] | None
    query_mod: Hook | None
    key_mod: Hook | None
    output_mod: Hook | None
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None
    scale: float | None
    softmax: Literal["softmax", "sigmoid"]
    dropout_p: float
    seed: int | None
    deterministic: bool
    backend: str


class Explanation(NamedTuple):
    """Which path a call took, and why not a faster one."""

    path: str
    reason: str


def _choose(
    q: Tensor, k: Tensor, v: Tensor, spec: Spec, packed: Packed | None, return_lse: bool, backend: str
) -> Explanation:
    if backend == "reference":
        return Explanation("reference", "asked for")
    if backend == "auto" and q.is_cuda and _hopper.why_not(q, k, v, spec) is None:
        return Explanation("hopper", "16-bit attention on a Hopper GPU")
    refusal = _sdpa.why_not(q, k, v, spec, packed, return_lse)
    if backend == "auto" and not q.is_cuda and torch.compiler.is_compiling():
        # The search for kernels cannot be traced, and finds none off the GPU.
        return Explanation("reference" if refusal else "sdpa", refusal or "plain attention in a compiled graph")
    if backend == "sdpa":
        if refusal:
            raise ValueError(f"backend='sdpa' cannot serve this call: {refusal}; take backend='auto'")
        return Explanation("sdpa", "asked for")
    hopper = _hopper.why_not(q, k, v, spec)
    lacks = {"hopper": hopper, "triton": _triton.why_not(q, v, spec)}
    if backend in lacks:
        if lacks[backend]:
            raise ValueError(f"backend={backend!r} cannot serve this call: {lacks[backend]}; take backend='auto'")
        return Explanation(backend, "asked for")
    if q.is_cuda and lacks["triton"] is None and (refusal is not None or spec.deterministic):
        return Explanation("triton", f"{refusal or 'deterministic'}; {hopper}")
    if refusal is None:
        return Explanation("sdpa", f"plain attention on {q.device.type}")
    return Explanation("reference", f"{refusal}; {lacks['triton']}")


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., explain: Literal[False] = ...,
    **options: Unpack[Options],
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    explain: Literal[False] = ...,
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = ...,
    explain: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, Explanation]: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], explain: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor, Explanation]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    query_mod: Hook | None = None,
    key_mod: Hook | None = None,
    output_mod: Hook | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    softmax: Literal["softmax", "sigmoid"] = "softmax",
    dropout_p: float = 0.0,
    seed: int | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
    explain: bool = False,
) -> Any:
    """Differentiable attention with every variant, on the fastest path that computes exactly that.

    Args:
        q: queries `[B, Sq, Hq, D]`, bf16, fp16, fp32 (fp64 on the reference path). Under autocast q, k and v are cast, as
            PyTorch's own attention casts them.
        k: keys `[B, Sk, Hkv, D]`; Hq a multiple of Hkv.
        v: values `[B, Sk, Hkv, Dv]`.
        causal: query i sees key j iff `j <= p`, where `p = i + Sk - Sq`.
        window: key j is seen iff `0 <= p - j < window` (not causal: `|p - j| < window`).
        softcap: scores become `softcap * tanh(score / softcap)`.
        alibi_slopes: `[Hq]` or `[B, Hq]`; scores lose `slope * |p - j|`. No gradient.
        sinks: `[Hq]`; `exp(sink)` joins the softmax's denominator. Gets gradients.
        score_mod: FlexAttention's `score_mod(score, b, h, q_idx, kv_idx)`; captured tensors allowed.
        mask_mod: FlexAttention's `mask_mod(b, h, q_idx, kv_idx)`, True where a key is seen.
        rope: (cos, sin), each `[positions, D / 2]`: rotary positions of q and k, key j at row j and query i at row p.
        query_mod: `query_mod(x, pair, b, h, idx, d)` in place of each element of q (after `rope`), `pair` being the
            element at `(d + D / 2) % D`. Captured tensors get no gradient.
        key_mod: the same for k, `h` being a key head.
        output_mod: the same for out.
        cu_seqlens: int32 `[n + 1]` cumulative lengths of packed sequences (B = 1), or a (q, k) pair; indices and `b`
            above then count inside a sequence, and sequences.
        scale: of `q @ k`; default `D ** -0.5`.
        softmax: "sigmoid" gives each score its own probability instead.
        dropout_p: probability that a softmax weight becomes 0; the others are divided by `1 - dropout_p`.
        seed: of the dropout, 32 bits; default drawn from torch's CPU generator.
        deterministic: the same bits from run to run in backward too.
        return_lse: also return the log of each row's denominator.
        backend: "auto", or one path by name.
        explain: also return an `Explanation(path, reason)`.

    Returns:
        out `[B, Sq, Hq, Dv]` in q's dtype, 0 in rows without keys. With `return_lse` also lse `[B, Hq, Sq]`, natural
        log, fp32, differentiable, -inf in rows without keys. With `explain` also the explanation, last.

    Raises:
        ValueError: shapes, dtypes, devices or arguments that break a rule, or a named backend that cannot serve.

    Example:
        >>> out = attention(q, k, v, causal=True, window=1024)
    """
    cast = autocast_dtype(q)
    if cast is not None:
        # As PyTorch casts its own attention's inputs; what follows is computed as it is written.
        q, k, v = (x if x.dtype == torch.float64 else x.to(cast) for x in (q, k, v))
    check_tensors(q, k, v)
    # In a compiled graph lengths cannot be read back: the operator checks them when it runs.
    functions = (score_mod, mask_mod, query_mod, key_mod, output_mod)
    traced = torch.compiler.is_compiling() and q.is_cuda and all(f is None for f in functions)
    cu_q, cu_k = cu_seqlens if isinstance(cu_seqlens, tuple | list) else (cu_seqlens, cu_seqlens)
    packed = None if traced else make_packed(cu_seqlens, q, k)
    if packed is not None:
        cu_q, cu_k = packed.cu_q, packed.cu_k
    sequences = q.shape[0] if cu_q is None else cu_q.shape[0] - 1
    if traced and dropout_p > 0 and seed is None:
        raise ValueError("dropout in a compiled graph needs its seed as an argument, got seed=None")
    spec = make_spec(
        q,
        tokens=max(q.shape[1], k.shape[1]),
        sequences=sequences,
        causal=causal,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        score_mod=score_mod,
        mask_mod=mask_mod,
        scale=scale,
        softmax=softmax,
        dropout_p=dropout_p,
        seed=seed,
        deterministic=deterministic,
        return_lse=return_lse,
    )
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    for name, hook in (("query_mod", query_mod), ("key_mod", key_mod), ("output_mod", output_mod)):
        if hook is not None and not callable(hook):
            raise ValueError(f"{name} must be a function of an element, got {type(hook).__name__}")
    plain = backend == "reference"
    compiled = traced and backend == "auto" and not explain
    explanation = None if compiled else _choose(q, k, v, spec, packed, return_lse, backend)
    # Queries are loaded once: the Hopper kernel turns them then. Keys are loaded for every tile of queries.
    in_load = rope is not None and query_mod is None and explanation is not None and explanation.path == "hopper"
    in_load = in_load and not torch.compiler.is_compiling()
    if rope is not None:
        if not traced or cu_q is None:
            _hooks.check_rope(rope, q, k, packed)
        offset = _hooks.rope_offset(q, k, cu_q, cu_k)
        if torch.compiler.is_compiling():
            q, k = _hooks.rope_formula(q, rope, offset, cu_q), _hooks.rope_formula(k, rope, 0, cu_k)
        else:
            if not in_load:
                q = _hooks.apply_rope(q, rope, offset, cu_q, plain)
            k = _hooks.apply_rope(k, rope, 0, cu_k, plain)
    q = q if query_mod is None else _hooks.apply(q, query_mod, cu_q, plain)
    k = k if key_mod is None else _hooks.apply(k, key_mod, cu_k, plain)
    if explanation is None:
        pair = _ops.compiled(q, k, v, spec, cu_q, cu_k)
        return pair if return_lse else pair[0]
    lse: Tensor | None = None
    if explanation.path == "sdpa":
        out = _sdpa.sdpa(q, k, v, spec)
    elif explanation.path in ("hopper", "triton"):
        run = outside_graph() if torch.compiler.is_compiling() else attend
        out, lse = run(q, k, v, spec, packed, explanation.path == "hopper", rope if in_load else None)
    else:
        out, lse = reference(q, k, v, spec, packed)
    if output_mod is not None:
        out = _hooks.apply(out, output_mod, cu_q, plain)
    results: tuple[Any, ...] = (out,)
    if return_lse:
        results += (lse,)
    if explain:
        results += (explanation,)
    return results if len(results) > 1 else out
