"""A training step of the demo's GPT of 124 million parameters: our kernels, SDPA, FlexAttention and Liger-Kernel.

    python benchmarks/kernels/gpt.py --vocab 50304 256 --arms ours cudnn flash flex liger

Batch 4 x 4096, bf16 autocast over fp32 weights, torch.compile and fused AdamW in every arm; one GPU. Every arm takes its
turn in each of the rounds, in this process; medians, peak memory, and the first arm's speed over each other's.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainkit.demo import _model
from trainkit.demo._config import SIZES
from trainkit.kernels import attention, linear_cross_entropy, swiglu


class Arm(NamedTuple):
    """What a step is made of: attention of unrotated heads `[B, S, H, D]`, a norm, the gated product, the loss."""

    attend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    norm: Callable[[nn.Module, Tensor], Tensor]
    gate: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    backend: SDPBackend | None = None


def plain_norm(module: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, module.normalized_shape, module.weight, module.eps)


def plain_gate(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


def plain_loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).flatten(0, 1).float(), target.flatten())


def chunked_loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return linear_cross_entropy(x.to(torch.bfloat16), weight.to(torch.bfloat16), target)


def rotated(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Attention of `[B, H, S, D]`, after the model's own RoPE."""

    def run(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = (_model._rotate(x, cos, sin) for x in (q, k))
        return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    return run


@rotated
def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def ours(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return attention(q, k, v, causal=True, rope=(cos[:, 0], sin[:, 0]))


def flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 4096, 4096, device="cuda")
    return rotated(lambda q, k, v: flex_attention(q, k, v, block_mask=mask, enable_gqa=True))


def liger() -> Arm:
    """What Liger-Kernel's patches put in: norm, gated product, RoPE and fused loss; attention is SDPA's."""
    from liger_kernel.ops import (
        LigerFusedLinearCrossEntropyFunction,
        LigerRMSNormFunction,
        LigerRopeFunction,
        LigerSiLUMulFunction,
    )

    def attend(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = (torch.cat([t[:, 0], t[:, 0]], -1)[None] for t in (cos, sin))
        q, k = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    @torch.compiler.disable
    def loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        x = x.flatten(0, 1).to(torch.bfloat16)
        return LigerFusedLinearCrossEntropyFunction.apply(x, weight.to(torch.bfloat16), target.flatten())[0]

    return Arm(
        attend,
        lambda module, x: LigerRMSNormFunction.apply(x, module.weight, module.eps, 0.0, "llama", True),
        lambda both: LigerSiLUMulFunction.apply(*both.chunk(2, dim=-1)),
        loss,
        SDPBackend.CUDNN_ATTENTION,
    )


def arm(name: str) -> Arm:
    """An arm by name."""
    if name == "liger":
        return liger()
    attend: Callable[..., Tensor] = ours if name.startswith("ours") else flex() if name == "flex" else sdpa
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    gate, loss = (swiglu, chunked_loss) if name == "ours" else (plain_gate, plain_loss)
    return Arm(attend, plain_norm, gate, loss, backends.get(name))


class Step:
    """The model with an arm's parts, its optimizer, and one training step."""

    def __init__(self, parts: Arm, vocab: int) -> None:
        torch.manual_seed(0)
        size = SIZES["124m"]
        self.parts = parts
        self.model = _model.GPT(size, vocab, 1e-4).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
        # Code of its own, and nothing from a cache: neither asks which backend SDPA was told to take.
        code = Step.loss.__code__.replace(co_name=f"loss_{id(self)}")
        self.run = torch.compile(partial(FunctionType(code, globals()), self))

    def loss(self, batch: Tensor) -> Tensor:
        model, parts = self.model, self.parts
        tokens, target = batch[:, :-1], batch[:, 1:].contiguous()
        B, S = tokens.shape
        x = model.embedding(tokens)
        for block in model.blocks:
            heads = block.qkv(parts.norm(block.attention_norm, x)).view(B, S, -1, block.head_dim)
            q, k, v = heads.split((block.heads, block.kv_heads, block.kv_heads), dim=2)
            mixed = parts.attend(q, k, v, model.cos[:S], model.sin[:S])
            x = x + block.out(mixed.reshape(B, S, -1))
            x = x + block.down(parts.gate(block.gate_up(parts.norm(block.mlp_norm, x))))
        return parts.loss(parts.norm(model.norm, x), model.head.weight, target)

    def __call__(self, batch: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            if self.parts.backend is None:
                loss = self.run(batch)
            else:
                with sdpa_kernel(self.parts.backend):
                    loss = self.run(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def measure(vocab: int, names: list[str], rounds: int, steps: int) -> dict[str, Any]:
    """Print and return each arm's milliseconds a step, peak memory and first loss."""
    size = SIZES["124m"]
    generator = torch.Generator("cuda").manual_seed(1)
    batch = torch.randint(min(vocab, 256), (size.batch, size.context + 1), device="cuda", generator=generator)
    ready: dict[str, Step] = {}
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            step = Step(arm(name), vocab)
            first = step(batch).item()
            for _ in range(3):
                step(batch)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step(batch)
            memory = (torch.cuda.max_memory_allocated() - before) >> 20
        except Exception as error:  # a peer that this machine cannot run is said, not hidden
            print(f"{name}: not run: {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
            continue
        ready[name] = step
        results[name] = {"loss": first, "MiB above weights": memory, "ms": []}
    for _ in range(rounds):
        for name, step in ready.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            step(batch)
            start.record()
            for _ in range(steps):
                step(batch)
            stop.record()
            torch.cuda.synchronize()
            results[name]["ms"].append(start.elapsed_time(stop) / steps)
    first_ms = None
    for name, found in results.items():
        found["median"] = statistics.median(found["ms"])
        first_ms = first_ms or found["median"]
        print(
            f"vocabulary {vocab:6}  {name:8} {found['median']:7.2f} ms a step ({min(found['ms']):.2f} to {max(found['ms']):.2f})"
            f"  {found['MiB above weights']:6} MiB  first loss {found['loss']:.4f}"
            f"  {found['median'] / first_ms:.3f} of {next(iter(results))}",
            flush=True,
        )
    return results


def main() -> None:
    """Measure the arms at each vocabulary and write the figures as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="*", default=[50304, 256])
    parser.add_argument("--arms", nargs="*", default=["ours", "ours-attention", "cudnn", "flash", "flex", "liger"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.compiler.config.force_disable_caches = True
    # TF32 for what stays in fp32 in every arm alike.
    torch.set_float32_matmul_precision("high")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    found = {vocab: measure(vocab, args.arms, args.rounds, args.steps) for vocab in args.vocab}
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
