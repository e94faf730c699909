"""`tree_attention`: tokens laid out as a tree, each node's tokens attending to their own past and to all their ancestors.

Prompts with their samples, conversations that fork, drafts of speculative decoding. A node is computed once, whoever descends
from it. In a pre-order layout the descendants of a node are one run of rows, so that attention splits into plain calls:
each node over itself, causally, and for each depth of ancestors, their descendants over them, every key seen. The results
are merged by their log-sum-exps. Backward needs no merge: with a row's final output and log-sum-exp, each call's own backward
gives its part of the gradients (the identity by which ring attention and split keys work: arXiv 2310.01889). Up to 32,768 tokens, forward is one call with
the tree as its mask instead: it spares the merging.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainkit.kernels._attention import _hopper, _triton
from trainkit.kernels._attention._autograd import run_forward
from trainkit.kernels._attention._call import Call, from_host
from trainkit.kernels._attention._delta import row_delta, sink_gradient
from trainkit.kernels._attention._dispatch import attention
from trainkit.kernels._attention._spec import Packed, Spec, check_tensors, make_spec
from trainkit.kernels._attention._variant import build
from trainkit.kernels._cache import Cache, capturing, contents, stream
from trainkit.kernels._once import only_once
from trainkit.kernels.paged import _merge

BACKENDS = ("auto", "hopper", "triton", "reference")


class Level(NamedTuple):
    """One plain call: query rows [q_lo, q_hi) over key rows [k_lo, k_hi), as sequences with these bounds."""

    q_lo: int
    q_hi: int
    k_lo: int
    k_hi: int
    bounds_q: tuple[int, ...]
    bounds_k: tuple[int, ...]
    causal: bool


@dataclass(frozen=True, eq=False)
class Tree:
    """A checked tree: nodes in pre-order."""

    parents: tuple[int, ...]
    bounds: tuple[int, ...]
    """Node i has rows [bounds[i], bounds[i + 1])."""
    ends: tuple[int, ...]
    """And with all its descendants [bounds[i], ends[i])."""
    depths: tuple[int, ...]

    def levels(self) -> tuple[Level, ...]:
        """The calls that attention over the tree is made of."""
        T = self.bounds[-1]
        found = [Level(0, T, 0, T, self.bounds, self.bounds, True)]
        for depth in range(max(self.depths, default=0) + 1):
            nodes = [
                i for i, d in enumerate(self.depths)
                if d == depth and self.ends[i] > self.bounds[i + 1] > self.bounds[i]
            ]  # fmt: skip
            if not nodes:
                continue
            q_lo, q_hi = self.bounds[nodes[0] + 1], self.ends[nodes[-1]]
            k_lo, k_hi = self.bounds[nodes[0]], self.bounds[nodes[-1] + 1]
            q, k = [0], [0]
            for i in nodes:
                # Rows between have no keys here, keys between no queries: first the ones go by, then the others.
                own, after = self.bounds[i], self.bounds[i + 1]
                for to_q, to_k in ((after - q_lo, k[-1]), (after - q_lo, own - k_lo), (self.ends[i] - q_lo, after - k_lo)):
                    if (to_q, to_k) != (q[-1], k[-1]):
                        q.append(to_q)
                        k.append(to_k)
            found.append(Level(q_lo, q_hi, k_lo, k_hi, tuple(q), tuple(k), False))
        return tuple(found)


def read(parents: Tensor, node_indptr: Tensor, tokens: int) -> Tree:
    """Check a tree.

    Raises:
        ValueError: not int32 vectors that fit each other and the tokens, or nodes that are not in pre-order.
    """
    for name, x in (("parents", parents), ("node_indptr", node_indptr)):
        if not isinstance(x, Tensor) or x.dtype != torch.int32 or x.dim() != 1:
            got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be an int32 tensor of one dimension, got {got}")
    numbers, bounds = tuple(parents.tolist()), tuple(node_indptr.tolist())
    if len(bounds) != len(numbers) + 1 or bounds[0] != 0 or bounds[-1] != tokens or any(b < a for a, b in pairwise(bounds)):
        raise ValueError(
            f"node_indptr must rise from 0 to the {tokens} tokens in {len(numbers)} steps, one a node, got {list(bounds[:8])}"
            + (f"... to {bounds[-1]}" if len(bounds) > 8 else "")
        )
    path: list[int] = []
    ends, depths = list(bounds[1:]), []
    for i, parent in enumerate(numbers):
        while path and path[-1] != parent:
            path.pop()
        if parent != -1 and not path:
            raise ValueError(
                f"nodes must be in pre-order, each after its parent and that parent's earlier children: node {i} has parent"
                f" {parent}"
            )
        depths.append(len(path))
        path.append(i)
    for i in range(len(numbers) - 1, -1, -1):
        if numbers[i] >= 0:
            ends[numbers[i]] = max(ends[numbers[i]], ends[i])
    return Tree(numbers, bounds, tuple(ends), tuple(depths))


_TREES: Cache[tuple[Tree, tuple[Level, ...]]] = Cache(64)


def _tree(parents: Tensor, node_indptr: Tensor, tokens: int) -> tuple[Tree, tuple[Level, ...]]:
    def make() -> tuple[Tree, tuple[Level, ...]]:
        tree = read(parents, node_indptr, tokens)
        return tree, tree.levels()

    given = (parents, node_indptr)
    keys = [contents(x) if isinstance(x, Tensor) else None for x in given]
    return _TREES.get(None if None in keys else (tokens, *keys), make, given)


class _Plan(NamedTuple):
    """The calls of each level, and the one call of forward that needs no merge, if it is worth its mask."""

    levels: tuple[Level, ...]
    calls: tuple[Call, ...]
    whole: Call | None

    def slices(self, i: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = self.levels[i]
        return q[:, a.q_lo : a.q_hi], k[:, a.k_lo : a.k_hi], v[:, a.k_lo : a.k_hi]


MASKED_PAIRS = 1 << 30
"""Queries times keys up to which a mask is read for its blocks: beyond, that takes longer than merging."""


def _calls(tree: Tree, levels: tuple[Level, ...], spec: Spec, q: Tensor, hopper: bool) -> _Plan:
    calls = []
    longest = max(q.shape[1], q.shape[2])
    own = Spec(spec.scale, softcap=spec.softcap, deterministic=spec.deterministic)
    for a in levels:
        # One sequence needs no list of tiles.
        packed = None
        if len(a.bounds_q) > 2:
            packed = Packed(from_host(a.bounds_q, q.device), from_host(a.bounds_k, q.device), a.bounds_q, a.bounds_k)
        level = replace(own, causal=a.causal)
        calls.append(Call(level, packed, build(level, q.device, longest), hopper))
    whole = None
    if len(levels) > 1 and q.shape[1] ** 2 <= MASKED_PAIRS:
        masked = replace(own, mask_mod=_mask(tree, q.device, None))
        whole = Call(masked, None, build(masked, q.device, longest), hopper)
    return _Plan(levels, tuple(calls), whole)


_PLANS: Cache[_Plan] = Cache(16)


FEWEST = 264
"""Tiles of keys, two for each multiprocessor of an H200, below which the queries are cut among copies of the keys."""
KEYS = 128
"""Keys of a tile of the Hopper backward."""


def _level_backward(
    part: tuple[Tensor, Tensor, Tensor], lse: Tensor, grad: Tensor, delta: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """A level's gradients of q, k and v."""
    q, k, v = part
    rows, heads = q.shape[1:3]
    copies = 1
    if call.hopper and call.packed is None and not call.spec.causal:
        tiles = -(-k.shape[1] // KEYS) * k.shape[2]
        while copies * tiles < FEWEST and rows % (2 * copies) == 0 and rows // (2 * copies) >= KEYS:
            copies *= 2

    def cut(x: Tensor) -> Tensor:
        return x.reshape(1, heads, copies, rows // copies).transpose(1, 2).reshape(copies, heads, -1).contiguous()

    queries = q.reshape(copies, -1, *q.shape[2:]), grad.reshape(copies, -1, *grad.shape[2:])
    keys = [x if copies == 1 else x.expand(copies, -1, -1, -1).contiguous() for x in (k, v)]
    told = cut(lse), queries[1], cut(delta), call
    dq, dk, dv = (_hopper.backward if call.hopper else _triton.backward)(queries[0], *keys, *told)[:3]
    if copies > 1:
        dk, dv = (x.sum(0, keepdim=True, dtype=torch.float32).to(x.dtype) for x in (dk, dv))
    return dq.reshape(q.shape), dk, dv


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Any:
        out, lse = run_forward(q, k, v, sinks, plan.whole or plan.calls[0])
        for i in range(1, 1 if plan.whole else len(plan.levels)):
            a = plan.levels[i]
            more, more_lse = run_forward(*plan.slices(i, q, k, v), None, plan.calls[i])
            rows = slice(a.q_lo, a.q_hi)
            whole = _merge.state(out[0, rows], lse[0, :, rows], True)
            _merge.run("merge", [whole, _merge.state(more[0], more_lse[0], True)], whole)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @only_once("tree_attention")
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        plan: _Plan = ctx.plan
        grad = torch.zeros_like(out) if grads[0] is None else grads[0]
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        delta = row_delta(out, grad, grads[1])
        totals: list[Tensor] = []
        for i, (a, call) in enumerate(zip(plan.levels, plan.calls, strict=True)):
            rows = slice(a.q_lo, a.q_hi)
            part = plan.slices(i, q, k, v)
            dq, dk, dv = _level_backward(part, lse[:, :, rows], grad[:, rows], delta[:, :, rows], call)
            if not totals:
                totals = [dq, dk, dv]
                continue
            keys = slice(a.k_lo, a.k_hi)
            for total, more, at in zip(totals, (dq, dk, dv), (rows, keys, keys), strict=True):
                total[:, at] += more
        dsinks = None if sinks is None else sink_gradient(sinks, lse, delta)
        return None, *totals, dsinks


def _mask(tree: Tree, device: torch.device, window: int | None) -> Any:
    """The tree as a mask_mod: key j is an ancestor's (or the query's own past), and near enough along the path."""
    node = np.repeat(np.arange(len(tree.parents)), np.diff(tree.bounds))
    ends = torch.from_numpy(np.array(tree.ends, np.int32)[node]).to(device)
    place = []
    for i, parent in enumerate(tree.parents):
        before = 0 if parent < 0 else place[parent] + tree.bounds[parent + 1] - tree.bounds[parent]
        place.append(before)
    stands = np.array(place, np.int64)[node] + np.arange(len(node)) - np.array(tree.bounds[:-1], np.int64)[node]
    at = torch.from_numpy(stands.astype(np.int32)).to(device)
    if window is None:
        return lambda b, h, i, j: (j <= i) & (i < ends[j])
    return lambda b, h, i, j: (j <= i) & (i < ends[j]) & (at[i] - at[j] < window)


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, parents: Tensor, node_indptr: Tensor, *, scale: float | None = None,
    window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None, deterministic: bool = False,
    return_lse: bool = False, backend: str = "auto",
) -> Any:  # fmt: skip
    """Differentiable attention of tokens in trees: each sees its node's past and every token of its node's ancestors.

    A prompt with its samples is a root and its children; several prompts are several roots in one call.

    Args:
        q: `[1, T, Hq, D]`, the nodes' tokens end to end, nodes in pre-order (a node, then its children's subtrees).
        k: `[1, T, Hkv, D]`.
        v: `[1, T, Hkv, Dv]`.
        parents: int32 `[nodes]`, -1 for a root; on the host, or on the device at the price of a copy that waits, once a tensor.
        node_indptr: int32 `[nodes + 1]`: node i has rows `[node_indptr[i], node_indptr[i + 1])`.
        scale: of `q @ k`; default `D ** -0.5`.
        window: the last so many tokens of the path are seen, the query's own included.
        softcap: scores become `softcap * tanh(score / softcap)`.
        sinks: `[Hq]`; `exp(sink)` joins the softmax's denominator. Gets gradients.
        deterministic: the same bits from run to run in backward too.
        return_lse: also return lse `[1, Hq, T]`, natural log.
        backend: "auto", "hopper", "triton" or "reference".

    Returns:
        out `[1, T, Hq, Dv]`, with `return_lse` also lse.

    Raises:
        ValueError: shapes or trees that break a rule, or a named backend that cannot serve.

    Example:
        >>> parents = torch.tensor([-1, 0, 0], dtype=torch.int32)  # a prompt of 4096 tokens, two samples of 512
        >>> indptr = torch.tensor([0, 4096, 4608, 5120], dtype=torch.int32)
        >>> out = tree_attention(q, k, v, parents, indptr)
    """
    check_tensors(q, k, v)
    if q.shape[0] != 1 or k.shape[1] != q.shape[1]:
        raise ValueError(
            f"tree_attention takes one row of tokens, q and k alike, got q {list(q.shape)} and k {list(k.shape)}"
        )
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    tree, levels = _tree(parents, node_indptr, q.shape[1])
    spec = make_spec(
        q, tokens=q.shape[1], sequences=1, causal=True, window=window, softcap=softcap, alibi_slopes=None, sinks=sinks,
        score_mod=None, mask_mod=None, scale=scale, softmax="softmax", dropout_p=0.0, seed=None, deterministic=deterministic,
        return_lse=return_lse,
    )  # fmt: skip
    lacks = {"hopper": _hopper.why_not(q, k, v, spec), "triton": _triton.why_not(q, v, spec)}
    if lacks.get(backend):
        raise ValueError(f"backend={backend!r} cannot serve this call: {lacks[backend]}; take backend='auto'")
    if spec.window is not None or backend == "reference" or lacks["triton"] is not None or q.numel() == 0:
        # How far a key lies behind differs among a node's children: only a mask says that.
        out, lse = attention(
            q, k, v, mask_mod=_mask(tree, q.device, spec.window), scale=spec.scale, softcap=softcap, sinks=sinks,
            deterministic=deterministic, return_lse=True, backend=backend,
        )  # fmt: skip
    else:
        hopper = lacks["hopper"] is None and backend != "triton"
        key = (id(tree), spec.scale, spec.softcap, spec.deterministic, hopper, q.shape[2], q.device, stream(q.device))
        plan = _PLANS.get(
            None if capturing(q.device) else key, lambda: _calls(tree, levels, spec, q, hopper), (tree,)
        )  # fmt: skip
        out, lse = _TreeAttention.apply(plan, q, k, v, spec.sinks)  # type: ignore[no-untyped-call]
    return (out, lse) if return_lse else out
