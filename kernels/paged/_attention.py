"""`PagedAttention`: planned once a batch, run once a layer."""

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainkit.kernels._attention import _triton
from trainkit.kernels._attention._call import Tiling
from trainkit.kernels._attention._spec import ScoreMod, Spec
from trainkit.kernels._attention._variant import build
from trainkit.kernels.fused._launch import on
from trainkit.kernels.paged import _launch, _planner
from trainkit.kernels.paged._gradients import attend
from trainkit.kernels.paged._plan_reference import Shape
from trainkit.kernels.paged._reference import reference
from trainkit.kernels.paged._tables import LAYOUTS, Tables, check, check_page_size, on_host, pages_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FP8 = torch.float8_e4m3fn
BACKENDS = ("auto", "triton", "reference")


class Maximum(NamedTuple):
    """What a CUDA graph that runs a plan must hold of any later plan."""

    requests: int
    tokens: int
    """Query rows of all requests."""
    pages: int
    """Numbers in kv_indices."""


class Planned(NamedTuple):
    """What `plan` was told and made."""

    tables: Tables
    shape: Shape
    num_qo_heads: int
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    scale: float
    tiles: Tiling
    device: torch.device


class PagedAttention:
    """Attention of ragged queries over keys in pages: decoding, prompts in chunks, both at once; shared prefixes read once.

    Query i of a request with Sq queries and Sk keys stands at key `i + Sk - Sq`, as in `attention`, whose order on scores
    holds: scale, soft cap, ALiBi, score_mod, masks, sinks.

    Args:
        causal: a query sees the keys up to where it stands.
        window: and of these the last so many.
        softcap: scores become `softcap * tanh(score / softcap)`.
        alibi: whether `run` brings slopes.
        sinks: whether `run` brings sinks.
        score_mod: FlexAttention's function, `b` a request and indices those inside it.
        layout: "NHD", caches `[pages, 2, page, Hkv, D]`, or "HND", `[pages, 2, Hkv, page, D]`.
        backend: "auto", "triton" or "reference".

    Raises:
        ValueError: arguments that break a rule.

    Example:
        >>> paged = PagedAttention()
        >>> paged.plan(qo_indptr, kv_indptr, kv_indices, kv_last_page_len, num_qo_heads=32, num_kv_heads=8, head_dim=128,
        ...            page_size=16, num_pages=4096, dtype=torch.bfloat16)
        >>> out, lse = paged.run(q, kv_cache)
    """

    def __init__(
        self, *, causal: bool = True, window: int | None = None, softcap: float | None = None, alibi: bool = False,
        sinks: bool = False, score_mod: ScoreMod | None = None, layout: Literal["NHD", "HND"] = "NHD", backend: str = "auto",
    ) -> None:  # fmt: skip
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            raise ValueError(f"window counts visible keys and must be an int of at least 1, got {window!r}")
        if softcap is not None and not 0 < softcap < float("inf"):
            raise ValueError(f"softcap must be positive and finite, got {softcap!r}; None turns it off")
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be 'NHD' or 'HND', got {layout!r}")
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        self.causal, self.window, self.softcap, self.score_mod = bool(causal), window, softcap, score_mod
        self.alibi, self.sinks, self.layout, self.backend = alibi, sinks, layout, backend
        self._planned: Planned | None = None
        self._planner = _planner.Planner()

    def plan(
        self, qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor, kv_last_page_len: Tensor, *, num_qo_heads: int,
        num_kv_heads: int, head_dim: int, page_size: int, num_pages: int, dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None, scale: float | None = None, share: bool = True,
        cuda_graph_max: Maximum | None = None, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        """Check a batch's tables and cut its work into equal shares, one a program; no wait for the device.

        Args:
            qo_indptr: int32 `[B + 1]`, on the host (a device tensor costs one copy that waits), like those below: request i
                has query rows `[qo_indptr[i], qo_indptr[i + 1])`.
            kv_indptr: `[B + 1]`, and pages `kv_indices[kv_indptr[i] : kv_indptr[i + 1]]`.
            kv_indices: page numbers.
            kv_last_page_len: `[B]`, keys in the last page of each.
            num_qo_heads: Hq, a multiple of `num_kv_heads`.
            num_pages: of the cache.
            dtype: of queries; bf16, fp16, fp32 (fp64 on the reference path).
            kv_dtype: of the cache; the default is `dtype`, or `torch.float8_e4m3fn`.
            scale: of `q @ k`; default `head_dim ** -0.5`.
            share: read pages that neighbouring requests begin with once for all of them.
            cuda_graph_max: room for any later plan up to this: `run` may then be captured once and replayed after each `plan`.
            device: where `run` will be; default CUDA's current device, where there is one.

        Raises:
            ValueError: tables that a kernel could not follow, or more than `cuda_graph_max`.
        """
        check_page_size(page_size)
        if num_kv_heads < 1 or num_qo_heads < 1 or num_qo_heads % num_kv_heads:
            raise ValueError(f"num_qo_heads must be a multiple of num_kv_heads, got {num_qo_heads} and {num_kv_heads}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be bf16, fp16, fp32 or fp64, got {dtype}")
        kv_dtype = dtype if kv_dtype is None else kv_dtype
        if kv_dtype not in (dtype, FP8):
            raise ValueError(f"kv_dtype must be dtype = {dtype} or {FP8}, got {kv_dtype}")
        if not 1 <= head_dim <= _triton.LARGEST_HEAD:
            raise ValueError(f"head_dim must be 1 to {_triton.LARGEST_HEAD}, got {head_dim}")
        names = ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len")
        given = (qo_indptr, kv_indptr, kv_indices, kv_last_page_len)
        tables = Tables(*(on_host(n, x) for n, x in zip(names, given, strict=True)))
        if device is None:
            device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        device = torch.device(device)
        group = num_qo_heads // num_kv_heads
        most = cuda_graph_max
        if most is not None:
            got = Maximum(len(tables.qo_indptr) - 1, int(tables.qo_indptr[-1]), len(tables.kv_indices))
            for name, n, limit in zip(Maximum._fields, got, most, strict=True):
                if n > limit:
                    raise ValueError(f"cuda_graph_max holds {limit} {name}, got {n}: declare more and capture again")
            longest = max(1, most.tokens - most.requests + 1)
        else:
            longest = int(np.diff(tables.qo_indptr).max(initial=1))
        share = share and (most is None or longest > 1)
        rows = longest * group if not share or not _planner.shares(tables) else max(64, longest * group)
        tiles = _launch.tiling(rows, head_dim, device)
        if group > tiles.bm:
            raise ValueError(f"at most {tiles.bm} query heads share a key head, got {group}")
        shape = Shape(
            page_size, num_pages, group, num_kv_heads, self.causal, self.window or 0, tiles.bm, tiles.bn,
            _launch.workers(device), share,
        )  # fmt: skip
        scale = head_dim**-0.5 if scale is None else float(scale)
        self._planned = Planned(tables, shape, num_qo_heads, head_dim, dtype, kv_dtype, scale, tiles, device)
        if self._kernels():
            self._planner.plan(tables, shape, head_dim, device, most)
        else:
            check(tables, page_size, num_pages)

    def _kernels(self) -> bool:
        """Whether Triton serves the plan.

        Raises:
            ValueError: asked for, and it cannot.
        """
        planned = self._planned
        assert planned is not None
        if self.backend == "reference":
            return False
        like = torch.empty(1, 1, 1, planned.head_dim, dtype=planned.dtype, device=planned.device)
        lacking = _triton.why_not(like, like, Spec(1.0))
        if lacking and self.backend == "triton":
            raise ValueError(f"backend='triton' cannot serve this plan: {lacking}; take backend='auto'")
        return lacking is None

    def run(
        self, q: Tensor, kv_cache: Tensor | tuple[Tensor, Tensor], *, alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Attend as planned; differentiable in q, the cache and the sinks.

        Args:
            q: `[tokens, Hq, D]`, requests end to end.
            kv_cache: one tensor as `layout` says, or (keys, values) without the 2.
            alibi_slopes: `[Hq]` or `[B, Hq]`, with `alibi=True`.
            sinks: `[Hq]`, with `sinks=True`.
            k_scale: fp32 `[Hkv]`, of a cache in fp8: a key is the stored number times this.
            v_scale: the same for values.

        Returns:
            out `[tokens, Hq, D]` in q's dtype, and lse `[tokens, Hq]`, natural log, fp32; a row without keys gives 0 and
            -inf. Rows beyond the plan's (under `cuda_graph_max`) hold nothing of meaning.

        Raises:
            ValueError: tensors that are not what was planned.
            RuntimeError: without a plan.
        """
        planned = self._planned
        if planned is None:
            raise RuntimeError("nothing is planned: call plan() first")
        pages = pages_of(kv_cache, self.layout)
        self._agree(planned, q, pages, alibi_slopes, sinks, k_scale, v_scale)
        spec = Spec(
            planned.scale, self.causal, self.window, self.softcap, alibi_slopes,
            None if sinks is None else sinks.contiguous(), self.score_mod,
        )  # fmt: skip
        scales = (k_scale, v_scale)
        if not self._kernels():
            rows = int(planned.tables.qo_indptr[-1])
            return reference(q[:rows], pages, planned.tables, spec, scales)
        longest = max(q.shape[0], q.shape[1], pages.keys.shape[0] * pages.page_size)
        variant = build(spec, q.device, longest)
        with on(q):
            return attend(q, pages, spec, variant, planned, self._planner.arrays, scales)

    def _agree(
        self, planned: Planned, q: Tensor, pages: Any, alibi_slopes: Tensor | None, sinks: Tensor | None,
        k_scale: Tensor | None, v_scale: Tensor | None,
    ) -> None:  # fmt: skip
        shape, tokens = planned.shape, int(planned.tables.qo_indptr[-1])
        wanted = (planned.num_qo_heads, planned.head_dim)
        exact = self._planner.maximum is None
        if q.dim() != 3 or q.shape[1:] != wanted or q.shape[0] < tokens or (exact and q.shape[0] != tokens):
            raise ValueError(f"q must be [{tokens}, {wanted[0]}, {wanted[1]}] as planned, got {list(q.shape)}")
        if self._planner.maximum is not None and q.shape[0] > self._planner.maximum.tokens:
            raise ValueError(f"q must have {self._planner.maximum.tokens} rows at most, got {q.shape[0]}")
        keys = (shape.num_pages, shape.page_size, shape.kv_heads, planned.head_dim)
        for name, x in zip(pages._fields, pages, strict=True):
            if tuple(x.shape) != keys:
                raise ValueError(f"the cache's {name} must be {list(keys)} (as NHD) as planned, got {list(x.shape)}")
        for name, x, dtype in (("q", q, planned.dtype), ("the cache", pages.keys, planned.kv_dtype)):
            if x.dtype != dtype or x.device != planned.device:
                raise ValueError(f"{name} must be {dtype} on {planned.device} as planned, got {x.dtype} on {x.device}")
        if q.stride(2) != 1 or pages.keys.stride(3) != 1 or pages.values.stride(3) != 1:
            raise ValueError("the last dimension of q and of the cache must be laid out densely: call contiguous()")
        for name, x, said in (("alibi", alibi_slopes, self.alibi), ("sinks", sinks, self.sinks)):
            if (x is not None) != said:
                raise ValueError(
                    f"{name}={said} was said when PagedAttention was made, got {'a' if x is not None else 'no'} tensor"
                )
        heads, kv = planned.num_qo_heads, (shape.kv_heads,)
        requests = len(planned.tables.qo_indptr) - 1
        if alibi_slopes is not None and tuple(alibi_slopes.shape) not in ((heads,), (requests, heads)):
            raise ValueError(f"alibi_slopes must be [{heads}] or [{requests}, {heads}], got {list(alibi_slopes.shape)}")
        if sinks is not None and (tuple(sinks.shape) != (heads,) or sinks.device != planned.device):
            raise ValueError(f"sinks must be [{heads}] on {planned.device}, got {list(sinks.shape)} on {sinks.device}")
        if (k_scale is None) != (v_scale is None):
            raise ValueError("k_scale and v_scale come together, got one of them")
        for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
            if x is not None and (tuple(x.shape) != kv or x.dtype != torch.float32 or x.device != planned.device):
                raise ValueError(f"{name} must be fp32 [{kv[0]}] on {planned.device}, got {x.dtype} {list(x.shape)}")
