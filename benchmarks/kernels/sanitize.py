"""One small shape of each attention kernel and of the loss, for compute-sanitizer.

compute-sanitizer --tool memcheck|racecheck python benchmarks/kernels/sanitize.py
"""

import torch

from trainkit.kernels import attention, linear_cross_entropy

if __name__ == "__main__":
    torch.manual_seed(0)
    for path in ("hopper", "triton"):
        leaves = [
            torch.randn(1, 520, h, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (4, 2, 2)
        ]
        # dQ in a pass of its own, and with dK and dV, where queries meet enough keys.
        for causal in (True, False):
            out = attention(*leaves, causal=causal, backend=path, deterministic=causal)
            torch.autograd.grad(out, leaves, torch.randn_like(out))
    x, weight = (torch.randn(n, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (200, 8224))
    torch.autograd.grad(linear_cross_entropy(x, weight, torch.arange(200, device="cuda"), chunk=128), (x, weight))
    torch.cuda.synchronize()
    print("ran")
