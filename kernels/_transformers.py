"""`attn_implementation="trainkit"` for Hugging Face transformers."""

from typing import Any

from torch import Tensor

from trainkit.kernels._attention._dispatch import attention

NAME = "trainkit"


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: `[B, H, S, D]` tensors in, `[B, S, H, D]` out.

    A mask is read as "True (or 0) where a key is seen", `[B, 1 or H, Sq, Sk]`,
    as transformers builds it for SDPA; without
    one the module's causality holds. A window is in the mask when there is one.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux, "dropout_p": dropout}
    if attention_mask is None:
        # One query at a time is decoding: every key is its past.
        options["causal"] = causal and q.shape[1] > 1
        if options["causal"] and sliding_window:
            options["window"] = sliding_window
    elif attention_mask.is_floating_point():
        table = attention_mask.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        options["score_mod"] = lambda s, b, h, i, j: s + table[b, h, i, j]
    else:
        seen = attention_mask.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        options["mask_mod"] = lambda b, h, i, j: seen[b, h, i, j]
    return attention(q, k, v, **options), None


def register_transformers() -> str:
    """Make `attn_implementation="trainkit"` known to transformers.

    Returns:
        The name to pass to `from_pretrained` or to `model.set_attn_implementation`.

    Raises:
        ImportError: without transformers 4.48 or later.
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError as error:
        raise ImportError(f"needs transformers 5 (or 4.53 and later): pip install transformers ({error})") from error
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
