"""One small shape of each attention kernel, for compute-sanitizer.

compute-sanitizer --tool memcheck|racecheck python benchmarks/kernels/sanitize.py
"""

import torch

from trainkit.kernels import attention

if __name__ == "__main__":
    torch.manual_seed(0)
    for path in ("hopper", "triton"):
        leaves = [
            torch.randn(1, 200, h, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (4, 2, 2)
        ]
        for deterministic in (True, False):
            out = attention(*leaves, causal=True, backend=path, deterministic=deterministic)
            torch.autograd.grad(out, leaves, torch.randn_like(out))
    torch.cuda.synchronize()
    print("ran")
