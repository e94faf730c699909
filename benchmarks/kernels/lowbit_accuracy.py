"""What each part of Atom is worth: the demo's GPT, trained here, with outlier channels that change nothing in 16 bits.

    python benchmarks/kernels/lowbit_accuracy.py [--size 30m] [--steps 800] [--seeds 3] [--out FILE.json]

One percent of the channels behind every norm is scaled by 30 to 60, and the columns of the next layer divided by the same: the
model computes what it did. Then every variant is quantised from the same weights on the same calibration batches, and its
perplexity a byte measured on the validation half of the corpus. "plain" is round-to-nearest with one scale a weight row and one
a token; variants but "Atom" are simulated in fp32 with the package's own rounding, "Atom" runs through `quantize_`.
"""

import argparse
import copy
import json
import math
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from trainkit.demo import _model
from trainkit.demo._config import SIZES
from trainkit.demo._corpus import WindowLoader, read_corpus, write_corpus
from trainkit.demo._model import GPT
from trainkit.kernels import W4A4, quantize_
from trainkit.kernels._kv4 import kv4_decode, kv4_encode
from trainkit.kernels.lowbit._calibration import measure
from trainkit.kernels.lowbit._handlers import RATIOS
from trainkit.kernels.lowbit._reference import integers
from trainkit.kernels.lowbit._rounding import Blocks, quantised
from trainkit.kernels.lowbit._walk import candidates

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def train(size, steps, seed, data):
    """The demo's GPT by AdamW, 1e-3 with a warm-up and a cosine."""
    torch.manual_seed(seed)
    model = GPT(size, 256, 1e-3).to(DEVICE)
    optimizer = model.configure_optimizers()
    loader = WindowLoader(data, batch=size.batch, context=size.context, length=steps, seed=seed, rank=0, world_size=1)
    for step, batch in enumerate(loader):
        rate = 1e-3 * min(1, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = model._loss(batch.to(DEVICE))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def inject(model, seed):
    """Outlier channels by a rescaling that changes nothing: norm's weight times c, next layer's columns over c."""
    generator = torch.Generator().manual_seed(seed)
    for block in model.blocks:
        for norm, layer in ((block.attention_norm, block.qkv), (block.mlp_norm, block.gate_up)):
            width = norm.weight.numel()
            chosen = torch.randperm(width, generator=generator)[: max(1, round(width / 100))].to(DEVICE)
            factor = (30 + 30 * torch.rand(len(chosen), generator=generator)).to(DEVICE)
            norm.weight[chosen] *= factor
            layer.weight[:, chosen] /= factor


@torch.no_grad()
def bits(model, batches):
    """Bits a byte on the validation windows."""
    losses = []
    for batch in batches:
        logits = model(batch[:, :-1])
        losses.append(functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten()).item())
    return sum(losses) / len(losses) / math.log(2)


class Simulated(nn.Module):
    """A linear layer with rounded weights that rounds its input: groups, then outliers."""

    def __init__(self, weight, order, group, outliers, clip):
        super().__init__()
        self.weight, self.order, self.group, self.outliers, self.clip = weight, order, group, outliers, clip

    def forward(self, x):
        """In fp32."""
        flat = x.flatten(0, -2)[:, self.order]
        rest = flat.shape[1] - self.outliers
        parts = []
        for part, group, most, clip in ((flat[:, :rest], self.group, 7, self.clip), (flat[:, rest:], 0, 127, 1.0)):
            if part.shape[1]:
                group = group or part.shape[1]
                padded = functional.pad(part, (0, -part.shape[1] % group))
                codes, scales = integers(padded, group, -8 if most == 7 else -127, most, clip)
                back = codes.float().view(len(flat), -1, group) * scales.t()[:, :, None]
                parts.append(back.flatten(1)[:, : part.shape[1]])
        return (torch.cat(parts, 1) @ self.weight.t()).view(*x.shape[:-1], -1)


def simulate(model, loader, *, group, outliers, clip, gptq):
    """A copy whose block layers are `Simulated`."""
    model = copy.deepcopy(model)
    config = W4A4(gptq=gptq, progress=False, keep_slower=True)
    layers, _ = candidates(model, config, None)
    inputs = measure(model, layers, config, loader)
    for name, layer in layers.items():
        made, channels = inputs[name], layer.in_features
        count = config.outliers_of(channels) if outliers else 0
        order = made.importance.argsort()
        weight = layer.weight.detach().float()[:, order]
        hessian = made.hessian[order][:, order] if gptq else None
        blocks = Blocks(channels, group, 7, count)
        codes, scales = quantised(weight, blocks, hessian, made.importance[order], None if clip else 1.0)
        back = torch.cat([codes[:, a:b] * s[:, None] for (a, b, _), s in zip(blocks.ranges, scales, strict=True)], 1)
        samples = torch.cat(made.samples)

        def error(ratio, samples=samples, order=order, count=count, back=back):
            one = Simulated(back, order, group, count, ratio)
            exact = samples[:, order] @ back.t()
            return float((one(samples) - exact).square().sum())

        ratio = min(RATIOS, key=error) if clip else 1.0
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Simulated(back, order, group, count, ratio))
    return model


def with_kv4(model, batches):
    """Bits a byte with keys (after their rotary embedding) and values through the 4-bit cache's format."""
    plain = _model.attention

    def through(q, k, v, **named):
        return plain(q, *(kv4_decode(kv4_encode(t), t.dtype) for t in (k, v)), **named)

    _model.attention = through
    try:
        return bits(model, batches)
    finally:
        _model.attention = plain


def one_seed(size, steps, seed, folder):
    """Bits a byte of every variant."""
    model = train(size, steps, seed, read_corpus(folder, "train"))

    def windows(split, count, seed):
        sizes = dict(batch=8, context=size.context, length=count, rank=0, world_size=1)
        return [b.to(DEVICE) for b in WindowLoader(read_corpus(folder, split), seed=seed, **sizes)]

    validation = windows("validation", 16, 1000)
    calibration = [b[:, :-1] for b in windows("train", 4, 2000 + seed)]
    found = {"trained": bits(model, validation)}
    inject(model, seed)
    found["full precision"] = bits(model, validation)
    variants = {
        "plain": dict(group=0, outliers=False, clip=False, gptq=False),
        "plain + outliers": dict(group=0, outliers=True, clip=False, gptq=False),
        "+ groups of 128": dict(group=128, outliers=True, clip=False, gptq=False),
        "+ clipping": dict(group=128, outliers=True, clip=True, gptq=False),
        "+ GPTQ": dict(group=128, outliers=True, clip=True, gptq=True),
        "all but outliers": dict(group=128, outliers=False, clip=True, gptq=True),
        "all but groups": dict(group=0, outliers=True, clip=True, gptq=True),
    }
    for name, options in variants.items():
        found[name] = bits(simulate(model, calibration, **options), validation)
    for name, config in {
        "Atom": W4A4(progress=False, keep_slower=True),
        "Atom, rotate, no outliers": W4A4(progress=False, keep_slower=True, rotate=True),
    }.items():
        atom = copy.deepcopy(model)
        report = quantize_(atom, config, calibration)
        found[name] = bits(atom, validation)
        if name == "Atom":
            found["Atom with 4-bit keys and values"] = with_kv4(atom, validation)
            print(report, flush=True)
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="30m")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder))
        results = []
        for seed in range(options.seeds):
            results.append(one_seed(SIZES[options.size], options.steps, seed, Path(folder)))
            print(json.dumps(results[-1], indent=1), flush=True)
            if options.out:
                options.out.write_text(json.dumps(results, indent=1))
    print(f"{'':32} bits a byte  perplexity over full precision's: mean, standard error, each")
    for name in results[0]:
        ratios = [2 ** (r[name] - r["full precision"]) for r in results]
        mean = sum(ratios) / len(ratios)
        error = math.sqrt(sum((x - mean) ** 2 for x in ratios) / max(len(ratios) - 1, 1) / len(ratios))
        average = sum(r[name] for r in results) / len(results)
        print(f"{name:32} {average:.4f}  {mean:.4f}  {error:.4f}  {' '.join(f'{x:.4f}' for x in ratios)}")


if __name__ == "__main__":
    main()
