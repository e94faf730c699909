"""Decoding over pages, ours against FlashInfer's wrappers (where it is installed), in one run on one GPU.

    python benchmarks/kernels/paged.py decode shared fp8 --seconds 0.2

bf16, 32 query and 8 key heads of 128, pages of 16 in random order, one query a request. Microseconds inside a CUDA graph, the
median of replays, and TB/s of keys and values read (each key once a request that reads it; `shared` counts a shared key once).
The L2 cache (50 MB) is flushed between replays, as `triton.testing.do_bench` does.
"""

import argparse
import importlib.util
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

from trainkit.kernels import PagedAttention

HQ, HKV, D, PAGE = 32, 8, 128, 16


def lengths_of(name: str) -> list[int]:
    """Keys of each request of a row of the table."""
    if name == "skewed":
        return [131072] + [512] * 63
    if name == "pareto":
        g = torch.Generator().manual_seed(0)
        return (64 * torch.rand(64, generator=g) ** -1.2).clamp(64, 65536).int().tolist()
    batch, context = name.split("x")
    return [int(context)] * int(batch)


ROWS = ("1x4096", "1x65536", "16x1024", "16x8192", "64x4096", "128x1024", "128x8192", "64x2560", "skewed", "pareto")


def tables(lengths: list[int], shared: int = 0) -> tuple[list[Tensor], int]:
    """Index arrays of requests of one query each, whose first `shared` pages are the same, and the pages of the cache."""
    pages = [-(-n // PAGE) for n in lengths]
    indptr = torch.tensor([0, *pages]).cumsum(0).int()
    total = sum(pages)
    indices = torch.randperm(total, generator=torch.Generator().manual_seed(0)).int()
    if shared:
        for i in range(1, len(lengths)):
            indices[indptr[i] : indptr[i] + shared] = indices[:shared]
    last = torch.tensor([n - (p - 1) * PAGE for n, p in zip(lengths, pages, strict=True)]).int()
    return [torch.arange(len(lengths) + 1).int(), indptr, indices, last], total


def replayed(run: Callable[[], Any]) -> Callable[[], Any]:
    """The run as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def ours(index: list[Tensor], total: int, q: Tensor, cache: Tensor, scale: Tensor | None = None) -> Callable[[], Any]:
    paged = PagedAttention()
    paged.plan(
        *index, num_qo_heads=HQ, num_kv_heads=HKV, head_dim=D, page_size=PAGE, num_pages=total, dtype=q.dtype,
        kv_dtype=cache.dtype,
    )  # fmt: skip
    return lambda: paged.run(q, cache, k_scale=scale, v_scale=scale)


def flashinfer_arms(index: list[Tensor], q: Tensor, cache: Tensor) -> dict[str, Callable[[], Any]]:
    """FlashInfer's ways to decode, where it is installed."""
    if importlib.util.find_spec("flashinfer") is None:
        return {}
    import flashinfer

    arms = {}
    room = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    _, indptr, indices, last = (x.cuda() for x in index)
    for name, cores in (("flashinfer cuda cores", False), ("flashinfer tensor cores", True)):
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(room, "NHD", use_tensor_cores=cores)
        wrapper.plan(indptr, indices, last, HQ, HKV, D, PAGE, q_data_type=q.dtype, kv_data_type=cache.dtype)
        arms[name] = lambda wrapper=wrapper: wrapper.run(q, cache)
    return arms


def time_us(run: Callable[[], Any], seconds: float) -> float:
    return 1000 * do_bench(replayed(run), warmup=25, rep=int(seconds * 1000), return_mode="median")


def row(name: str, dtype: torch.dtype, seconds: float, peers: bool) -> dict[str, Any]:
    lengths = lengths_of(name)
    index, total = tables(lengths)
    q = torch.randn(len(lengths), HQ, D, device="cuda", dtype=torch.bfloat16)
    cache = torch.randn(total, 2, PAGE, HKV, D, device="cuda", dtype=torch.bfloat16).to(dtype)
    nbytes = sum(lengths) * HKV * D * 2 * cache.element_size()
    scale = torch.ones(HKV, device="cuda") if dtype != torch.bfloat16 else None
    arms = {"ours": ours(index, total, q, cache, scale), **(flashinfer_arms(index, q, cache) if peers else {})}
    found: dict[str, Any] = {"row": name, "dtype": str(dtype).removeprefix("torch.")}
    for arm, run in arms.items():
        us = time_us(run, seconds)
        found[arm] = [round(us, 1), round(nbytes / us / 1e6, 2)]
    return found


def shared(seconds: float) -> dict[str, Any]:
    """64 requests over one prefix of 8192 keys, with 256 of their own."""
    index, total = tables([8192 + 256] * 64, shared=8192 // PAGE)
    q = torch.randn(64, HQ, D, device="cuda", dtype=torch.bfloat16)
    cache = torch.randn(total, 2, PAGE, HKV, D, device="cuda", dtype=torch.bfloat16)
    us = time_us(ours(index, total, q, cache), seconds)
    nbytes = (8192 + 64 * 256) * HKV * D * 2 * 2
    return {"row": "prefix 8192 + 64 x 256", "ours": [round(us, 1), round(nbytes / us / 1e6, 2)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["decode", "fp8", "shared"])
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--rows", nargs="+", default=ROWS)
    options = parser.parse_args()
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}), flush=True)
    if "decode" in options.what:
        for name in options.rows:
            print(json.dumps(row(name, torch.bfloat16, options.seconds, True)), flush=True)
    if "fp8" in options.what:
        for name in ("32x16384", "1x4096", "8x4096"):
            for dtype in (torch.bfloat16, torch.float8_e4m3fn):
                print(json.dumps(row(name, dtype, options.seconds, False)), flush=True)
    if "shared" in options.what:
        print(json.dumps(shared(options.seconds)), flush=True)


if __name__ == "__main__":
    main()
