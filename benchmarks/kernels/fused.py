"""RMSNorm, SwiGLU, RoPE and the fused output layer: ours against the plain formula compiled, and Liger-Kernel.

    python benchmarks/kernels/fused.py

Forward and backward together, milliseconds (medians), bf16, 16,384 tokens; the ratio is the peer's time over ours.
Liger-Kernel takes part where it is installed.
"""

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench

from trainkit.kernels import linear_cross_entropy, rms_norm, rope, swiglu

TOKENS = 16384


def step(function: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], Any]:
    """Forward and backward of `function`, as one call."""
    with torch.no_grad():
        grad = torch.randn_like(function(*leaves)) if function(*leaves).dim() else None
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


def compare(name: str, leaves: list[Tensor], functions: dict[str, Callable[..., Tensor]], seconds: float) -> None:
    """Print one line: milliseconds and peak memory of each, and the ratios."""
    times, memory = {}, {}
    for who, function in functions.items():
        run = step(function, leaves)
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        memory[who] = (torch.cuda.max_memory_allocated() - before) / 2**20
        times[who] = do_bench(run, warmup=int(seconds * 300), rep=int(seconds * 1000), return_mode="median")
    parts = [f"{who} {times[who]:.3f} ms {memory[who]:.0f} MiB" for who in functions]
    ratios = {who: round(times[who] / times["ours"], 3) for who in functions if who != "ours"}
    print(f"{name:32} {'  '.join(parts)}  ratio {ratios}", flush=True)


def leaf(*shape: int) -> Tensor:
    return (torch.randn(shape, device="cuda") * 0.5).to(torch.bfloat16).requires_grad_()


def main() -> None:
    """Every kernel at the sizes of a small and of a large model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.2, help="of measuring a kernel")
    seconds = parser.parse_args().seconds
    liger = importlib.util.find_spec("liger_kernel") is not None
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Liger-Kernel {'present' if liger else 'absent'}")
    if liger:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    for width in (768, 4096):
        functions: dict[str, Callable[..., Tensor]] = {
            "ours": lambda x, w: rms_norm(x, w),
            "compiled": torch.compile(lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6)),
        }
        if liger:
            # Not in place, as ours: its default overwrites the incoming gradient.
            functions["liger"] = lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False)
        compare(f"RMSNorm {width}", [leaf(TOKENS, width), leaf(width)], functions, seconds)

    for width in (2048, 14336):
        functions = {"ours": swiglu, "compiled": torch.compile(lambda a, b: F.silu(a) * b)}
        if liger:
            functions["liger"] = lambda a, b: LigerSiLUMulFunction.apply(a, b)
        compare(f"SwiGLU {width}", [leaf(TOKENS, width), leaf(TOKENS, width)], functions, seconds)

    S, H, D = 4096, 16, 128
    angle = torch.outer(torch.arange(S, device="cuda").float(), 1e4 ** (-torch.arange(0, D, 2, device="cuda") / D))
    cos, sin = angle.cos(), angle.sin()

    def formula(x: Tensor) -> Tensor:
        low, high = x.float().chunk(2, -1)
        c, s = cos[:, None], sin[:, None]
        return torch.cat([low * c - high * s, high * c + low * s], -1).to(x.dtype)

    functions = {"ours": lambda x: rope(x, cos, sin), "compiled": torch.compile(formula)}
    if liger:
        wide = [torch.cat([t, t], -1)[None] for t in (cos, sin)]
        # Liger turns q and k together: half the time of two, here both halves of the heads.
        functions["liger"] = lambda x: torch.cat(
            LigerRopeFunction.apply(*(t.transpose(1, 2) for t in x.chunk(2, 2)), *wide), 1
        )
    compare(f"RoPE {H} x {D}", [leaf(TOKENS // S, S, H, D)], functions, seconds)

    for width, vocabulary in ((768, 50304), (4096, 128256)):
        target = torch.randint(vocabulary, (TOKENS,), device="cuda")
        functions = {"ours": lambda x, w, target=target: linear_cross_entropy(x, w, target)}
        if vocabulary < 100_000:
            functions["compiled"] = torch.compile(
                lambda x, w, target=target: F.cross_entropy((x @ w.T).float(), target)
            )
        if liger:
            functions["liger"] = lambda x, w, target=target: LigerFusedLinearCrossEntropyFunction.apply(x, w, target)[0]
        compare(
            f"linear + loss {width} x {vocabulary}", [leaf(TOKENS, width), leaf(vocabulary, width)], functions, seconds
        )


if __name__ == "__main__":
    main()
