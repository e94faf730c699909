"""Which launch sizes suit which shape: compiles all candidates in parallel, times each within a CUDA graph, prints the best.

    python benchmarks/kernels/lowbit_tune.py [int4 | fp8 | 16] ...

`kernels/lowbit/_tuned.py` holds what it found.
"""

import itertools
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from trainkit.kernels.lowbit._activation import Recipe, quantise
from trainkit.kernels.lowbit._product import Weight4, product4
from trainkit.kernels.lowbit._tuned import Tile

SHAPES = [(4096, 4096), (14336, 4096), (28672, 8192)]
TOKENS = [1, 16, 64, 256, 2048, 8192]


def candidates(m):
    """Tiles worth trying for m tokens."""
    if m <= 16:
        for split, unroll, bn, stages in itertools.product((1, 2, 4, 8), (1, 2, 4), (64, 128), (3,)):
            yield Tile(16 if m > 8 else 8, bn, split, stages, bn // 16, 8, unroll)
    elif m <= 64:
        for split, unroll, bn, bm in itertools.product((1, 2, 4), (1, 2), (64, 128), (16, 32, 64)):
            yield Tile(bm, bn, split, 3, bn // 16, 8, unroll)
    else:
        for split, stages, unroll, (bm, bn, warps) in itertools.product(
            (1, 2) if m <= 256 else (1,),
            (3, 4),
            (1, 2),
            ((128, 64, 4), (128, 128, 8), (64, 128, 4), (64, 64, 4), (64, 128, 8)),
        ):
            yield Tile(bm, bn, split, stages, warps, 8, unroll)


def weights(n, k, outliers):
    """Random packed ones."""
    main = k - outliers
    w = torch.randint(0, 256, (main // 128, n, 64), dtype=torch.uint8, device="cuda")
    scales = torch.rand(main // 128, n, device="cuda").mul(0.01).bfloat16()
    if not outliers:
        return Weight4(w, scales), None
    out = torch.randint(-127, 128, (n, outliers), dtype=torch.int8, device="cuda")
    order = torch.randperm(k, device="cuda").int()
    return Weight4(w, scales, out, torch.rand(n, device="cuda").mul(1e-3).bfloat16()), order


def call(kind, x, weight, order, tile):
    """One product, its activations' quantisation included."""
    k = x.shape[1]
    outliers = 0 if weight.outliers is None else weight.outliers.shape[1]
    recipe = None if kind == "16" else Recipe(kind, k, 128, outliers)

    def run():
        codes = x if recipe is None else quantise(x, recipe, order)[0]
        return product4(codes, weight, recipe=recipe, group=128, channels=k, dtype=x.dtype, tile=tile)

    return run


def graph_us(function, calls=20):
    """Microseconds a call, of `calls` in one CUDA graph; the best of 5 replays."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    times = []
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / calls)
    return min(times[1:])


def compile_one(job):
    """Run a candidate once, so that its machine code lies in Triton's cache."""
    kind, k, outliers, m, tile = job
    try:
        weight, order = weights(256, k, outliers)
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        call(kind, x, weight, order, tile)()
        torch.cuda.synchronize()
    except Exception as error:  # a candidate may not fit
        return f"{job}: {str(error)[:120]}"
    return None


def main():
    kinds = sys.argv[1:] or ["int4"]
    start = time.perf_counter()
    outliers = {k: (k // 32 if kind == "int4" else 0) for kind in kinds for _, k in SHAPES}
    jobs = [(kind, k, outliers[k], m, t) for kind in kinds for k in outliers for m in TOKENS for t in candidates(m)]
    unique = {(kind, k, o, t, m == 1): (kind, k, o, m, t) for kind, k, o, m, t in jobs}
    with ProcessPoolExecutor(15, get_context("spawn")) as pool:
        failed = {str(f) for f in pool.map(compile_one, unique.values(), chunksize=4) if f}
    print(
        f"{len(unique)} compiled in {time.perf_counter() - start:.0f} s, {len(failed)} failed",
        *failed,
        sep="\n",
        flush=True,
    )
    for kind, (n, k), m in itertools.product(kinds, SHAPES, TOKENS):
        weight, order = weights(n, k, outliers[k])
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        dense = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        bf16 = graph_us(lambda x=x, dense=dense: x @ dense.t(), 5 if m > 1000 else 20)
        found = []
        for tile in candidates(m):
            try:
                found.append((graph_us(call(kind, x, weight, order, tile), 5 if m > 1000 else 20), tile))
            except Exception as error:
                print(tile, str(error)[:100])
        found.sort()
        print(f"{kind} {n} x {k}, {m} tokens: bf16 {bf16:.1f} us", flush=True)
        for us, tile in found[:6] + found[-1:]:
            print(f"  {us:8.1f} us {bf16 / us:5.2f}  {tuple(tile)}", flush=True)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
