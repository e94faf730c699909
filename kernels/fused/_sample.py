"""`sample`: a token of each row of logits, temperature, top-k, top-p and min-p fused, the same for the same seed."""

from typing import Any

import torch
from torch import Tensor

from trainkit.kernels._attention._dropout import HEAD, LOW, ROW, mix
from trainkit.kernels.fused._launch import fusible, on

BLOCK = 4096
"""Logits that a program holds at a time: 8 a thread of 16 warps."""
CPU_BLOCK = 64


def _each(name: str, x: Any, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number for each row, from one or from a tensor."""
    if isinstance(x, Tensor):
        if x.shape != (rows,):
            raise ValueError(f"{name} must be a number or one for each of the {rows} rows, got {list(x.shape)}")
        return x.to(device=device, dtype=dtype)
    return torch.full((rows,), x, dtype=dtype, device=device)


def _noise(seed: Tensor, step: Tensor, vocab: int) -> Tensor:
    """Gumbel noise `[rows, vocab]`, as the kernel draws it."""
    key = mix(mix(seed.long() & LOW) ^ ((step.long() * ROW) & LOW))
    token = (torch.arange(vocab, device=seed.device) * HEAD) & LOW
    u = ((mix(key[:, None] ^ token[None, :]) >> 8).float() + 0.5) / (1 << 24)
    return -torch.log(-torch.log(u))


def reference(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, step: Tensor
) -> Tensor:
    """The definition, by sorting."""
    x = logits.float()
    greedy = temperature == 0.0
    scaled = x / torch.where(greedy, 1.0, temperature)[:, None]
    ordered = scaled.sort(-1, descending=True).values
    line = torch.full_like(ordered[:, 0], -torch.inf)
    limited = (top_k > 0) & (top_k < x.shape[1])
    kth = ordered.gather(1, (top_k.clamp(1, x.shape[1]).long() - 1)[:, None])[:, 0]
    line = torch.where(limited, kth, line)
    kept = torch.where(ordered >= line[:, None], torch.exp(ordered - ordered[:, :1]), 0.0)
    before = kept.cumsum(-1) - kept
    inside = (before < top_p[:, None] * kept.sum(-1, keepdim=True)) & (ordered >= line[:, None])
    smallest = ordered.masked_fill(~inside, torch.inf).amin(-1)
    line = torch.where(top_p < 1.0, torch.maximum(line, smallest), line)
    line = torch.maximum(line, ordered[:, 0] + torch.log(min_p))
    noisy = torch.where(greedy[:, None], x, scaled + _noise(seed, step, x.shape[1]))
    keep = torch.where(greedy[:, None], x == x.amax(-1, keepdim=True), scaled >= line[:, None])
    return noisy.masked_fill(~keep, -torch.inf).argmax(-1)


def sample(
    logits: Tensor, *, temperature: float | Tensor = 1.0, top_k: int | Tensor | None = None, top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0, seed: int | Tensor = 0, step: int | Tensor = 0,
) -> Tensor:  # fmt: skip
    """Draw a token of each row: from softmax(logits / temperature), cut to the top k, of these to the smallest set with mass
    top_p, and to what is at least min_p times as likely as the likeliest.

    Args:
        logits: `[rows, vocab]`, fp32, bf16 or fp16.
        temperature: a number, or one for each row, like the others; 0 takes the largest (of equals the first).
        top_k: None or 0 for no limit; what equals the k-th is kept.
        top_p: in (0, 1].
        min_p: in [0, 1].
        seed: 32 bits.
        step: how many tokens the row drew before: the same seed and step draw alike, whatever else is in the batch.

    Returns:
        int64 `[rows]`.

    Raises:
        ValueError: shapes or numbers that break a rule (tensors' numbers are not read).
    """
    if logits.dim() != 2 or logits.shape[1] < 1 or not logits.is_floating_point():
        raise ValueError(f"logits must be a floating-point [rows, vocab], got {logits.dtype} {list(logits.shape)}")
    limits = ((temperature, 0.0, float("inf")), (0 if top_k is None else top_k, 0, 1 << 30), (top_p, 1e-9, 1.0), (min_p, 0.0, 1.0))
    for name, (x, least, most) in zip(("temperature", "top_k", "top_p", "min_p"), limits, strict=True):
        if not isinstance(x, Tensor) and not least <= x <= most:
            raise ValueError(f"{name} must be from {least} to {most}, got {x}")
    rows, device = logits.shape[0], logits.device
    numbers = [
        _each(name, x, rows, dtype, device)
        for name, x, dtype in (
            ("temperature", temperature, torch.float32), ("top_k", 0 if top_k is None else top_k, torch.int32),
            ("top_p", top_p, torch.float32), ("min_p", min_p, torch.float32), ("seed", seed, torch.int64),
            ("step", step, torch.int64),
        )
    ]  # fmt: skip
    if rows == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    if not fusible(logits):
        return reference(logits, *numbers)
    from trainkit.kernels.fused import _sample_kernels

    logits = logits.detach()
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    out = torch.empty(rows, dtype=torch.int64, device=device)
    block = BLOCK if logits.is_cuda else CPU_BLOCK
    with on(logits):
        _sample_kernels.sample[(rows,)](
            logits, out, *numbers, logits.stride(0), logits.shape[1], block, num_warps=16
        )  # fmt: skip
    return out
