"""Products of 4- and 8-bit weights against cuBLAS bf16, `_int_mm` and `_scaled_mm`, within CUDA graphs.

    python benchmarks/kernels/lowbit.py [--shapes 4096x4096,14336x4096,28672x8192] [--methods W4A4,W4A16,W4A8,W8A8]

Every figure includes the quantisation of the activations, but for `_int_mm` and `_scaled_mm`, which get 8-bit inputs made
beforehand. Below: what quantising costs behind a norm. The weights are random: only times are compared here.
"""

import argparse
import itertools
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from lowbit_tune import graph_us, weights

from trainkit.kernels import rms_norm
from trainkit.kernels.lowbit._activation import Norm, Recipe, quantise
from trainkit.kernels.lowbit._product import product4, product8

TOKENS = [1, 16, 64, 256, 2048, 8192]


def product(method, x, n):
    """A call that quantises x `[M, K]` and multiplies it."""
    k = x.shape[1]
    if method.startswith("W8A8"):
        kind = "int8" if method == "W8A8-int8" else "fp8"
        recipe = Recipe(kind, k, 0)
        stored = torch.int8 if kind == "int8" else torch.float8_e4m3fn
        weight = torch.randint(-100, 100, (n, k), device="cuda").to(stored)
        scales = torch.rand(n, device="cuda").bfloat16()
        return lambda: product8(quantise(x, recipe, None)[0], weight, scales, dtype=x.dtype)
    outliers = k // 32 if method == "W4A4" else 0
    weight, order = weights(n, k, outliers)
    recipe = {"W4A4": Recipe("int4", k, 128, outliers), "W4A8": Recipe("fp8", k, 0), "W4A16": None}[method]

    def run():
        codes = x if recipe is None else quantise(x, recipe, order)[0]
        return product4(codes, weight, recipe=recipe, group=128, channels=k, dtype=x.dtype)

    return run


def peers(x, n):
    """Other programs' products by name."""
    k = x.shape[1]
    dense = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    found = {"bf16": lambda: x @ dense.t()}
    x8, w8 = x.to(torch.float8_e4m3fn), dense.to(torch.float8_e4m3fn)
    if len(x) >= 16:
        one = torch.ones((), device="cuda")
        found["_scaled_mm"] = lambda: torch._scaled_mm(x8, w8.t(), one, one, out_dtype=torch.bfloat16)
    if len(x) > 16:
        xi, wi = x.to(torch.int8), dense.to(torch.int8)
        found["_int_mm"] = lambda: torch._int_mm(xi, wi.t())
    return found


def compile_one(job):
    """Run a product once on few rows of weights, so that its machine code lies in Triton's cache."""
    method, k, m = job
    product(method, torch.randn(m, k, device="cuda", dtype=torch.bfloat16), 16384)()
    product(method, torch.randn(m, k, device="cuda", dtype=torch.bfloat16), 256)()
    torch.cuda.synchronize()


def norms():
    """Microseconds of RMSNorm alone, of RMSNorm with the codes of its output, and of the codes alone."""
    for m, k in itertools.product((1, 64, 2048, 8192), (4096, 8192)):
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        weight = torch.ones(k, device="cuda", dtype=torch.bfloat16)
        order = torch.randperm(k, device="cuda").int()
        recipe, norm = Recipe("int4", k, 128, k // 32), Norm(weight, 1e-6)
        plain = graph_us(lambda x=x, weight=weight: rms_norm(x, weight, 1e-6))
        codes = graph_us(lambda x=x, recipe=recipe, order=order, norm=norm: quantise(x, recipe, order, norm=norm))
        both = graph_us(
            lambda x=x, recipe=recipe, order=order, norm=norm: quantise(x, recipe, order, norm=norm, keep=True)
        )
        print(
            f"norm {m} x {k}: RMSNorm {plain:.2f} us, to codes {codes:.2f} ({codes / plain:.2f}), to both {both:.2f}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="4096x4096,14336x4096,28672x8192")
    parser.add_argument("--methods", default="W4A4,W4A16,W4A8,W8A8-fp8,W8A8-int8")
    options = parser.parse_args()
    shapes = [tuple(map(int, s.split("x"))) for s in options.shapes.split(",")]
    methods = options.methods.split(",")
    jobs = list(itertools.product(methods, sorted({k for _, k in shapes}), TOKENS))
    with ProcessPoolExecutor(15, get_context("spawn")) as pool:
        list(pool.map(compile_one, jobs))
    norms()
    for (n, k), m in itertools.product(shapes, TOKENS):
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        calls = 5 if m > 1000 else 20
        bf16 = None
        line = f"{n} x {k}, {m}:"
        for name, call in {**peers(x, n), **{method: product(method, x, n) for method in methods}}.items():
            us = graph_us(call, calls)
            bf16 = bf16 or us
            line += f"  {name} {us:.1f} us ({bf16 / us:.2f})"
        print(line, flush=True)


if __name__ == "__main__":
    main()
