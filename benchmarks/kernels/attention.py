"""Attention, ours against FLASH, cuDNN, compiled FlexAttention and FlashInfer, in one run on one GPU.

    python benchmarks/kernels/attention.py plain variants --seconds 0.1

TFLOP/s of forward and backward (4 and 10 times B * H * S^2 * D floating-point operations, half of it when causal;
masks are not discounted further), medians of turns that all arms take in one process; the ratio is ours over the
peer's. cuDNN and FLASH get tensors laid out `[B, H, S, D]`, ours and FlashInfer `[B, S, H, D]`.
"""

import argparse
import importlib.util
import itertools
import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from trainkit.kernels import attention

TOKENS, HIDDEN = 16384, 2048


ROUNDS = 3
"""Turns that every arm takes: a hot GPU is a slow one, so nobody runs first or last alone."""


def median_ms(run: Callable[[], Any], seconds: float) -> float:
    """Median of as many runs as fit."""
    return do_bench(run, warmup=int(seconds * 300), rep=int(seconds * 1000), return_mode="median")


def replayed(run: Callable[[], Any]) -> Callable[[], Any]:
    """The run as a CUDA graph of its own: its kernels, without the host's part."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def in_turns(runs: dict[str, Callable[[], Any]], seconds: float, graph: bool = False) -> dict[str, float]:
    """Milliseconds of each: the median of its turns' medians."""
    ready = {name: replayed(run) if graph else run for name, run in runs.items()}
    turns = [{name: median_ms(run, seconds / ROUNDS) for name, run in ready.items()} for _ in range(ROUNDS)]
    return {name: statistics.median(turn[name] for turn in turns) for name in runs}


Case = tuple[Callable[..., Tensor], list[Tensor], Tensor]
"""A forward, its inputs and the gradient of its output."""


def both(
    cases: dict[str, Case], seconds: float, graph: bool = False, ahead_only: dict[str, Callable[[], Any]] | None = None
) -> dict[str, tuple[float, float]]:
    """(forward, backward) of each in milliseconds; 0 for no backward: as a CUDA graph, and of peers without one."""

    def ahead(run: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], Tensor]:
        return lambda: run(*leaves)

    def behind(out: Tensor, leaves: list[Tensor], grad: Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    with torch.no_grad():
        runs = {name: ahead(run, leaves) for name, (run, leaves, _) in cases.items()}
        forward = in_turns(runs | (ahead_only or {}), seconds, graph)
    backward = {name: behind(run(*leaves), leaves, grad) for name, (run, leaves, grad) in cases.items()}
    back = {} if graph else in_turns(backward, seconds)
    return {name: (ms, back.get(name, 0.0)) for name, ms in forward.items()}


def tensors(B: int, S: int, Hq: int, Hkv: int, D: int, heads_first: bool) -> tuple[list[Tensor], Tensor]:
    shape = (lambda h: (B, h, S, D)) if heads_first else (lambda h: (B, S, h, D))
    leaves = [torch.randn(shape(h), device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (Hq, Hkv, Hkv)]
    return leaves, torch.randn(shape(Hq), device="cuda", dtype=torch.bfloat16)


def sdpa(backend: SDPBackend, causal: bool) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

    return run


def ours(**options: Any) -> Callable[..., Tensor]:
    return lambda q, k, v: attention(q, k, v, **options)


def flashinfer(B: int, S: int, Hq: int, Hkv: int, D: int, causal: bool) -> Callable[[], Any] | None:
    """Forward of FlashInfer's ragged prefill, fa3, where it is installed."""
    if importlib.util.find_spec("flashinfer") is None:
        return None
    import flashinfer

    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
        torch.empty(128 << 20, dtype=torch.uint8, device="cuda"), "NHD", backend="fa3"
    )
    ends = torch.arange(0, B + 1, dtype=torch.int32, device="cuda") * S
    wrapper.plan(ends, ends, Hq, Hkv, D, causal=causal, q_data_type=torch.bfloat16)
    q, k, v = (torch.randn(B * S, h, D, device="cuda", dtype=torch.bfloat16) for h in (Hq, Hkv, Hkv))
    return lambda: wrapper.run(q, k, v)


def row(name: str, flops: float, times: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Print and return one line: TFLOP/s forward/backward of each, and our ratios."""
    speed = {peer: (4 * flops / f / 1e9, 10 * flops / b / 1e9 if b else 0.0) for peer, (f, b) in times.items()}
    mine = speed["ours"]
    parts = [f"{peer} {f:.0f}/{b:.0f}" for peer, (f, b) in speed.items()]
    ratios = {
        p: [round(mine[0] / f, 3), round(mine[1] / b, 3) if b else None] for p, (f, b) in speed.items() if p != "ours"
    }
    print(f"{name:34} {'  '.join(parts)}  ratio {ratios}", flush=True)
    return {"name": name, "tflops": speed, "ratio": ratios}


def plain(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for D, S, causal in itertools.product(args.dims, args.lengths, (True, False)):
        B, H = TOKENS // S, HIDDEN // D
        cases: dict[str, Case] = {"ours": (ours(causal=causal), *tensors(B, S, H, H, D, False))}
        for peer, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
            cases[peer] = (sdpa(backend, causal), *tensors(B, S, H, H, D, True))
        times = both(cases, args.seconds, args.graph)
        rows.append(
            row(f"D{D} S{S} {'causal' if causal else 'full'}", B * H * S * S * D * (0.5 if causal else 1), times)
        )
    return rows


def grouped(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for S in args.lengths:
        B, Hq, Hkv, D = TOKENS // S, 32, 8, 128
        cases: dict[str, Case] = {
            "ours": (ours(causal=True), *tensors(B, S, Hq, Hkv, D, False)),
            "cudnn": (sdpa(SDPBackend.CUDNN_ATTENTION, True), *tensors(B, S, Hq, Hkv, D, True)),
        }
        peer = flashinfer(B, S, Hq, Hkv, D, True)
        times = both(cases, args.seconds, args.graph, {"flashinfer": peer} if peer else {})
        rows.append(row(f"GQA 32:8 D128 S{S} causal", B * Hq * S * S * D / 2, times))
    return rows


def variants(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each variant as our argument (or Flex's own function, for the last two), against FlexAttention compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    D, H, S = 128, 16, args.variant_length
    B = TOKENS // S
    slopes = 2.0 ** -torch.linspace(0.5, 8, H, device="cuda")
    doc = torch.arange(S, device="cuda") // 1500
    table = torch.randn(H, 128, device="cuda")
    sinks = torch.randn(H, device="cuda")

    def causal_mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    def window_mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < 1024)

    def doc_mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (doc[q] == doc[k])

    def soft(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return 30.0 * torch.tanh(s / 30.0)

    def alibi(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return s - slopes[h] * (q - k)

    def relative(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return s + table[h, (q - k) % 128]

    cases: dict[str, tuple[dict[str, Any], Any, Any]] = {
        "plain": ({"causal": True}, None, causal_mask),
        "soft cap": ({"causal": True, "softcap": 30.0}, soft, causal_mask),
        "ALiBi": ({"causal": True, "alibi_slopes": slopes}, alibi, causal_mask),
        "window 1024": ({"causal": True, "window": 1024}, None, window_mask),
        "sinks": ({"causal": True, "sinks": sinks}, None, causal_mask),
        "documents": ({"mask_mod": doc_mask}, None, doc_mask),
        "score_mod": ({"causal": True, "score_mod": relative}, relative, causal_mask),
    }
    rows, ratios = [], []
    for name, (options, score, mask) in cases.items():
        block_mask = create_block_mask(mask, None, None, S, S, device="cuda")
        # A fresh compile for each variant: Dynamo gives up on a function it has compiled too often.
        torch._dynamo.reset()
        flex = torch.compile(flex_attention)

        def peer(
            q: Tensor, k: Tensor, v: Tensor, flex: Any = flex, score: Any = score, block_mask: Any = block_mask,
            name: str = name,
        ) -> Tensor:  # fmt: skip
            if name != "sinks":
                return flex(q, k, v, score_mod=score, block_mask=block_mask)  # type: ignore[no-any-return]
            # FlexAttention has no sinks: its users rescale by the log-sum-exp.
            out, lse = flex(q, k, v, block_mask=block_mask, return_lse=True)
            return (out * torch.sigmoid(lse - sinks[:, None])[..., None]).to(out.dtype)  # type: ignore[no-any-return]

        memory = {}
        cases_run: dict[str, Case] = {}
        for who, run, leaves in (
            ("ours", ours(**options), tensors(B, S, H, H, D, False)),
            ("flex", peer, tensors(B, S, H, H, D, True)),
        ):
            cases_run[who] = (run, *leaves)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.autograd.grad(run(*leaves[0]), leaves[0], leaves[1])
            memory[who] = torch.cuda.max_memory_allocated() - before
        times = both(cases_run, args.seconds)
        rows.append(row(f"{name} D{D} S{S}", B * H * S * S * D / 2, times) | {"memory": memory})
        ratios += rows[-1]["ratio"]["flex"]
        print(f"{'':34} peak memory, ours over flex: {memory['ours'] / memory['flex']:.3f}", flush=True)
    print(f"geometric mean over FlexAttention: {math.exp(sum(map(math.log, ratios)) / len(ratios)):.3f}", flush=True)
    return rows


def sparse(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Masks with nearly empty or very unequal rows of blocks, against FlexAttention compiled: a prompt with leaves, documents."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    prompt, leaf, leaves, H, D = 512, 2048, 8, 16, 128
    sizes = {"tree 512 + 8 x 2048": prompt + leaf * leaves, "documents 300": TOKENS}
    branch = (torch.arange(max(sizes.values()), device="cuda") - prompt) // leaf
    document = torch.arange(TOKENS, device="cuda") // 300

    def tree(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & ((k < prompt) | (branch[q] == branch[k]))

    def documents(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (document[q] == document[k])

    rows = []
    for (name, S), mask in zip(sizes.items(), (tree, documents), strict=True):
        block_mask = create_block_mask(mask, None, None, S, S, device="cuda")
        torch._dynamo.reset()
        flex = torch.compile(flex_attention)

        def peer(q: Tensor, k: Tensor, v: Tensor, flex: Any = flex, block_mask: Any = block_mask) -> Tensor:
            return flex(q, k, v, block_mask=block_mask)  # type: ignore[no-any-return]

        cases: dict[str, Case] = {
            "ours": (ours(mask_mod=mask), *tensors(1, S, H, H, D, False)),
            "flex": (peer, *tensors(1, S, H, H, D, True)),
        }
        rows.append(row(f"{name} D{D}", H * S * S * D / 2, both(cases, args.seconds)))
    return rows


def main() -> None:
    """Run the parts named on the command line and write their rows as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["plain", "grouped", "variants"])
    parser.add_argument("--seconds", type=float, default=0.2, help="of measuring a kernel")
    parser.add_argument("--graph", action="store_true", help="time CUDA graphs of the forward: no host, no launches")
    parser.add_argument("--dims", type=int, nargs="*", default=[128, 64, 256])
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048, 4096, 16384])
    parser.add_argument("--variant-length", type=int, default=16384)
    parser.add_argument("--json")
    args = parser.parse_args()
    # The backward is timed over and over on one graph: compiled peers may not give its tensors away.
    torch._functorch.config.donated_buffer = False
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ceiling = 2 * 8192**3 / median_ms(lambda: a @ b, args.seconds) / 1e9
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; bf16 matmul 8192^3: {ceiling:.0f} TFLOP/s",
        flush=True,
    )
    parts = {"plain": plain, "grouped": grouped, "variants": variants, "sparse": sparse}
    rows = [r for part in args.parts for r in parts[part](args)]
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"matmul": ceiling, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
