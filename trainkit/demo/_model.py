"""The demo's model: a byte-level GPT (pre-norm, RoPE, grouped-query attention, SwiGLU) as a LightningModule.

Shapes: B batch, S sequence, W width, H query heads, D head dimension.
"""

import math
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainkit.demo._config import Size
from trainkit.kernels import attention


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on [B, S, H, D] with cos and sin [S, 1, D/2] (Su et al., RoFormer, section 3.4.2)."""
    left, right = x.chunk(2, dim=-1)
    rotated = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    return rotated.type_as(x)


Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Attention of a layer, by its number: `[B, S, H, D]` queries, keys and values to `[B, S, H, D]`."""


def _causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, causal=True)


class Block(nn.Module):
    """Attention and SwiGLU, each behind its own norm."""

    def __init__(self, size: Size, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = size.heads, size.kv_heads, size.width // size.heads
        self.attention_norm = nn.RMSNorm(size.width, eps=1e-6)
        self.qkv = nn.Linear(size.width, (size.heads + 2 * size.kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)
        self.mlp_norm = nn.RMSNorm(size.width, eps=1e-6)
        self.gate_up = nn.Linear(size.width, 2 * size.hidden, bias=False)
        self.down = nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x_BSW: Tensor, cos: Tensor, sin: Tensor, attend: Attend = _causal) -> Tensor:
        """[B, S, W] to [B, S, W]."""
        batch, length, _ = x_BSW.shape
        heads = self.qkv(self.attention_norm(x_BSW)).view(batch, length, -1, self.head_dim)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        mixed = attend(self.layer, _rotate(q, cos, sin), _rotate(k, cos, sin), v)
        x_BSW = x_BSW + self.out(mixed.reshape(batch, length, -1))
        gate, up = self.gate_up(self.mlp_norm(x_BSW)).chunk(2, dim=-1)
        x_BSW = x_BSW + self.down(functional.silu(gate) * up)
        return x_BSW


class GPT(pl.LightningModule):
    """A byte-level language model; its loss is in nats a byte, what it logs in bits a byte.

    Args:
        size: the shape.
        vocab: rows of the embedding; bytes use the first 256.
        rate: of AdamW: what the script carries before anybody tuned it.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, size: Size, vocab: int, rate: float) -> None:
        super().__init__()
        self._rate = rate
        self.embedding = nn.Embedding(vocab, size.width)
        self.blocks = nn.ModuleList(Block(size, i) for i in range(size.layers))
        self.norm = nn.RMSNorm(size.width, eps=1e-6)
        self.head = nn.Linear(size.width, vocab, bias=False)
        self.head.weight = self.embedding.weight
        half = size.width // size.heads // 2
        angles = torch.arange(size.context)[:, None, None] / 10000 ** (torch.arange(half) / half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                # residual branches start smaller by the root of their number, so that depth does not grow the sum
                deep = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * size.layers) if deep else 0.02)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Logits [B, S, vocab] of tokens [B, S]."""
        length = tokens_BS.shape[1]
        x_BSW = self.embedding(tokens_BS)
        for block in self.blocks:
            x_BSW = block(x_BSW, self.cos[:length], self.sin[:length])
        logits: Tensor = self.head(self.norm(x_BSW))
        return logits

    def next_logits(self, tokens: Tensor, positions: Tensor, rows: Tensor, attend: Attend) -> Tensor:
        """Logits of the rows' next tokens `[rows, vocab]`, of tokens `[n]` at these positions of whatever `attend` keeps apart.

        What `trainkit.serving.generate` asks of a model, with `cache_shape`.
        """
        x_BSW = self.embedding(tokens)[None]
        for block in self.blocks:
            x_BSW = block(x_BSW, self.cos[positions], self.sin[positions], attend)
        logits: Tensor = self.head(self.norm(x_BSW[0, rows]))
        return logits

    @property
    def cache_shape(self) -> dict[str, int]:
        """What a cache of keys and values must hold of a token, and how many of them the model knows."""
        block = self.blocks[0]
        return {
            "layers": len(self.blocks), "heads": block.heads, "kv_heads": block.kv_heads, "head_dim": block.head_dim,
            "max_length": self.cos.shape[0], "vocab": self.embedding.num_embeddings,
        }  # fmt: skip

    def _loss(self, batch: Tensor) -> Tensor:
        logits = self(batch[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean loss of `batch` [B, S + 1], nats a byte."""
        loss = self._loss(batch)
        self.log("train_bits", loss.detach() / math.log(2), prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean loss of `batch` [B, S + 1], nats a byte; logs it over all ranks in bits."""
        loss = self._loss(batch)
        self.log("val_bits", loss / math.log(2), prog_bar=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; norms and vectors are not decayed."""
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters() if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in self.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self._rate, betas=(0.9, 0.95), fused=self.device.type == "cuda")
