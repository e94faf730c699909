"""Training on prompts with several samples: `tree_attention` against attention over repeated prompts, in one run on one GPU.

    python benchmarks/kernels/shared_prompt.py --seconds 0.3

bf16, head_dim 128, forward + backward in milliseconds. `flat` repeats the prompt in front of every sample, through cuDNN's
attention and through ours; `flex` is compiled FlexAttention with a tree mask over the packed tokens; `gather` copies each
sample's own prefix (what TRL 1.16 packs for FlashAttention-3, here through our packed attention). Peak is the memory above
the inputs, MiB.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from triton.testing import do_bench

from trainkit.kernels import attention, tree_attention

D = 128
CASES = ((4096, 16, 512, 16, 16), (4096, 16, 512, 32, 8), (512, 8, 2048, 16, 16))


def make(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def timed(forward: Callable[..., Tensor], inputs: list[Tensor], seconds: float) -> tuple[float, float, float]:
    """Milliseconds of forward, and of both, and the peak in MiB."""
    grad = torch.randn_like(forward(*inputs))

    def both() -> Any:
        return torch.autograd.grad(forward(*inputs), inputs, grad)

    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    turns = [
        [do_bench(run, warmup=25, rep=int(seconds * 333), return_mode="median") for run in (lambda: forward(*inputs), both)]
        for _ in range(3)
    ]
    return *(statistics.median(x) for x in zip(*turns, strict=True)), peak


def case(prompt: int, samples: int, length: int, Hq: int, Hkv: int, seconds: float) -> dict[str, Any]:
    T, whole = prompt + samples * length, prompt + length
    parents = torch.tensor([-1] + [0] * samples, dtype=torch.int32)
    indptr = torch.tensor([0, *(prompt + i * length for i in range(samples + 1))], dtype=torch.int32)
    packed = [make(1, T, h, D) for h in (Hq, Hkv, Hkv)]
    # cuDNN's layout, and ours.
    heads_first = [make(samples, h, whole, D) for h in (Hq, Hkv, Hkv)]
    tokens_first = [make(samples, whole, h, D) for h in (Hq, Hkv, Hkv)]

    def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=Hq != Hkv)

    node = torch.zeros(T, dtype=torch.int32, device="cuda")
    node[prompt:] = 1 + torch.arange(T - prompt, device="cuda") // length

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & ((node[j] == 0) | (node[j] == node[i]))

    blocks = create_block_mask(seen, None, None, T, T)
    compiled = torch.compile(flex_attention)

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=blocks, enable_gqa=Hq != Hkv)

    index = torch.cat([torch.arange(prompt)] + [
        torch.cat([torch.arange(prompt), torch.arange(prompt + i * length, prompt + (i + 1) * length)])
        for i in range(samples)
    ]).cuda()  # fmt: skip
    cu_k = torch.tensor([0, *(prompt + i * whole for i in range(samples + 1))], dtype=torch.int32)

    def gather(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k[:, index], v[:, index], causal=True, cu_seqlens=(indptr, cu_k))

    arms: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        "flat cuDNN": (cudnn, heads_first),
        "flat ours": (lambda q, k, v: attention(q, k, v, causal=True), tokens_first),
        "flex": (flex, packed),
        "gather": (gather, packed),
        "tree": (lambda q, k, v: tree_attention(q, k, v, parents, indptr), packed),
    }
    found: dict[str, Any] = {"prompt": prompt, "samples": f"{samples} x {length}", "heads": f"{Hq}:{Hkv}"}
    for name, (forward, inputs) in arms.items():
        try:
            ms = timed(forward, inputs, seconds)
            found[name] = [round(ms[0], 3), round(ms[1], 3), round(ms[2])]
        except (RuntimeError, torch.OutOfMemoryError) as error:
            found[name] = str(error)[:120]
    for name in arms:
        if isinstance(found[name], list):
            found[f"{name} / tree"] = round(found[name][1] / found["tree"][1], 2)
    found["error"] = errors(packed, parents, indptr, prompt, samples, length, seen)
    return found


def errors(packed: list[Tensor], parents: Tensor, indptr: Tensor, prompt: int, samples: int, length: int, seen: Any) -> Any:
    """Largest differences of out, dq, dk, dv from flat attention's (cuDNN, fp32 sums over the samples), over the largest."""
    grad = torch.randn_like(packed[0])
    tree = [tree_attention(*packed, parents, indptr)]
    tree += torch.autograd.grad(tree[0], packed, grad)
    index = torch.stack([
        torch.cat([torch.arange(prompt), torch.arange(prompt + i * length, prompt + (i + 1) * length)]) for i in range(samples)
    ]).cuda()  # fmt: skip
    leaves = [x.detach().float().requires_grad_() for x in packed]
    flat = [x[0][index].bfloat16() for x in leaves]
    out = attention(*flat, causal=True)
    g = grad[0][index].clone()
    g[1:, :prompt] = 0
    grads = torch.autograd.grad(out, leaves, g)
    want = torch.zeros_like(packed[0])
    want[0, index.flatten()] = out.flatten(0, 1)
    pairs = zip(tree, (want, *grads), strict=True)
    return [f"{((a.float() - b.float()).abs().max() / b.float().abs().max()).item():.1e}" for a, b in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--cases", nargs="+", type=int, default=range(len(CASES)))
    options = parser.parse_args()
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}), flush=True)
    for i in options.cases:
        print(json.dumps(case(*CASES[i], options.seconds)), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
