"""What generation asks of a model: the demo's GPT, transformers' decoders, or anything with the same two members."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Attend = Callable[..., Tensor]
"""`attend(layer, q, k, v, *, scale, window, softcap, sinks)`: `[1, n, H, D]` tensors to `[1, n, Hq, D]`."""


@dataclass(frozen=True)
class CacheShape:
    """What a token takes of a cache, and a model's limits."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_length: int
    """Positions."""
    vocab: int


class Decoder(Protocol):
    """A decoder-only language model."""

    shape: CacheShape

    def __call__(self, tokens: Tensor, positions: Tensor, rows: Tensor, attend: Attend) -> Tensor:
        """Logits `[rows, vocab]` of these rows of tokens `[n]`."""
        ...


class _Own:
    """A model that has `next_logits` and `cache_shape`, as the demo's GPT."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.shape = CacheShape(**model.cache_shape)

    def __call__(self, tokens: Tensor, positions: Tensor, rows: Tensor, attend: Attend) -> Tensor:
        return self._model.next_logits(tokens, positions, rows, attend)  # type: ignore[no-any-return]


class _Transformers:
    """A causal language model of transformers, through `attn_implementation="trainkit"`."""

    def __init__(self, model: Any) -> None:
        from trainkit.kernels import register_transformers

        model.set_attn_implementation(register_transformers())
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        self._model = model
        self.shape = CacheShape(
            layers=config.num_hidden_layers, heads=heads, kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            max_length=config.max_position_embeddings, vocab=config.vocab_size,
        )  # fmt: skip

    def __call__(self, tokens: Tensor, positions: Tensor, rows: Tensor, attend: Attend) -> Tensor:
        found = self._model(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, logits_to_keep=rows,
            trainkit_attend=attend,
        )  # fmt: skip
        return found.logits[0]  # type: ignore[no-any-return]


def decoder_of(model: nn.Module) -> tuple[Decoder, torch.dtype]:
    """The model as a decoder, and its dtype.

    Raises:
        ValueError: a model of no known kind.
    """
    parameter = next(model.parameters(), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    if hasattr(model, "next_logits") and hasattr(model, "cache_shape"):
        return _Own(model), dtype
    if hasattr(model, "set_attn_implementation") and hasattr(model, "config"):
        return _Transformers(model), dtype
    raise ValueError(
        f"{type(model).__name__} must be a causal language model of transformers, or have next_logits and cache_shape as the"
        " demo's GPT has: see trainkit.serving.generate"
    )
