"""`attn_implementation="trainkit"` for Hugging Face transformers."""

from typing import Any

import torch
from torch import Tensor

from trainkit.kernels._attention._dispatch import attention

NAME = "trainkit"
HARMLESS = frozenset({
    "cache_position", "labels", "logits_to_keep", "max_length_k", "max_length_q", "num_items_in_batch",
    "output_hidden_states", "output_router_logits", "past_key_value", "past_key_values", "position_embeddings",
    "position_ids", "return_dict", "use_cache",
})  # fmt: skip
"""Keyword arguments of models that say nothing of which query sees which key: structure in positions is in the mask."""


def _documents(seq_idx: Tensor | None, cu: Tensor | None, tokens: int, device: torch.device) -> Tensor | None:
    """Which packed sequence each token belongs to, `[1 or B, tokens]`, or None: all are one."""
    if seq_idx is not None:
        return seq_idx.to(device)[:, -tokens:]
    if cu is None:
        return None
    if cu.dim() != 1 or int(cu[0]) != 0 or int(cu[-1]) != tokens:
        raise ValueError(f"cu_seq_lens must rise from 0 to the {tokens} tokens, got {cu.tolist()}")
    return torch.searchsorted(cu.to(device), torch.arange(tokens, device=device, dtype=cu.dtype), right=True)[None]


def forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    seq_idx: Tensor | None = None,
    deterministic: bool | None = None,
    trainkit_attend: Any = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: `[B, H, S, D]` tensors in, `[B, S, H, D]` out.

    A mask is read as "True (or 0) where a key is seen", `[B, 1 or H, Sq, Sk]`, as transformers builds it for SDPA; without
    one the module's causality holds. A window is in the mask when there is one. Packed sequences (`cu_seq_lens_q`,
    `cu_seq_lens_k`, `seq_idx`) do not see each other, whether the mask says so or not.

    With `trainkit_attend`, which `trainkit.serving.generate` passes through the model, that keeps keys and values and attends.

    Raises:
        ValueError: a keyword argument that is neither used here nor known to be harmless: it might change who sees whom.
    """
    unknown = sorted(n for n, x in others.items() if n not in HARMLESS and x is not None and x is not False)
    if unknown:
        raise ValueError(
            f"attn_implementation={NAME!r} knows no {', '.join(unknown)}, which may change what attention computes:"
            " do not pass it, or take attn_implementation='eager'"
        )
    if trainkit_attend is not None:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        said = {"scale": scaling, "window": sliding_window or None, "softcap": softcap, "sinks": s_aux}
        return trainkit_attend(module.layer_idx, q, k, v, **said), None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    shape = q.shape[0], q.shape[2], q.shape[1], k.shape[1]
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux, "dropout_p": dropout}
    if deterministic is not None:
        options["deterministic"] = deterministic
    cu = (cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k)
    if attention_mask is None:
        # One query at a time is decoding: every key is its past.
        options["causal"] = causal and q.shape[1] > 1
        if options["causal"] and sliding_window:
            options["window"] = sliding_window
    if attention_mask is None and position_bias is None and seq_idx is None and cu_seq_lens_q is not None:
        options["cu_seqlens"] = tuple(x.to(torch.int32) for x in cu if x is not None)
        return attention(q, k, v, **options), None
    first, second = (_documents(seq_idx, x, n, q.device) for x, n in zip(cu, (q.shape[1], k.shape[1]), strict=True))
    tables = [x.expand(shape) for x in (attention_mask, position_bias) if x is not None and x.dtype != torch.bool]
    if tables:
        options["score_mod"] = _added(*tables)
    seen = attention_mask.expand(shape) if attention_mask is not None and attention_mask.dtype == torch.bool else None
    if first is not None and second is not None:
        rows, columns = (x.expand(shape[0], n) for x, n in ((first, shape[2]), (second, shape[3])))
        options["mask_mod"] = _together(rows, columns, seen)
    elif seen is not None:
        options["mask_mod"] = lambda b, h, i, j: seen[b, h, i, j]
    return attention(q, k, v, **options), None


def _added(table: Tensor, other: Tensor | None = None) -> Any:
    if other is None:
        return lambda s, b, h, i, j: s + table[b, h, i, j]
    return lambda s, b, h, i, j: s + table[b, h, i, j] + other[b, h, i, j]


def _together(rows: Tensor, columns: Tensor, seen: Tensor | None) -> Any:
    if seen is None:
        return lambda b, h, i, j: rows[b, i] == columns[b, j]
    return lambda b, h, i, j: (rows[b, i] == columns[b, j]) & seen[b, h, i, j]


def register_transformers() -> str:
    """Make `attn_implementation="trainkit"` known to transformers.

    Returns:
        The name to pass to `from_pretrained` or to `model.set_attn_implementation`.

    Raises:
        ImportError: without transformers 4.53 or later.
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError as error:
        raise ImportError(f"needs transformers 5 (or 4.53 and later): pip install transformers ({error})") from error
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
