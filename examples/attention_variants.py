"""Attention variants in a few lines each: FlexAttention's functions, traced, differentiated and compiled on first use.

    python examples/attention_variants.py

On a CPU every call runs on the plain PyTorch path; on a GPU the same calls run fused.
"""

import torch
from torch import Tensor

from trainkit.kernels import attention

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
B, S, H, D = 2, 256, 4, 64
q, k, v = (torch.randn(B, S, H, D, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

# A learned bias by relative distance: captured tensors may require gradients, and get them.
bias = torch.zeros(H, 32, device=device, requires_grad=True)


def relative_bias(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score + bias[h, torch.clamp(q_idx - kv_idx, min=0, max=31)]


# Documents packed in one row: a mask is a function of positions; tiles it leaves empty are never visited.
document = (torch.arange(S, device=device) // 100).int()


def same_document(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (document[q_idx] == document[kv_idx]) & (q_idx >= kv_idx)


# A first token that everybody sees, and a window.
def sink_and_window(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx >= kv_idx) & ((q_idx - kv_idx < 64) | (kv_idx == 0))


# A query, key or output hook: any function of an element, its place, and the element half a head away.
def hotter_heads(x: Tensor, pair: Tensor, b: Tensor, h: Tensor, idx: Tensor, d: Tensor) -> Tensor:
    return x * (1.0 + 0.1 * h)


angles = torch.arange(S, device=device)[:, None] / 10000 ** (torch.arange(D // 2, device=device) / (D // 2))

if __name__ == "__main__":
    calls = {
        "causal, grouped heads": {"causal": True},
        "window of 64 and a soft cap": {"causal": True, "window": 64, "softcap": 30.0},
        "learned relative bias": {"score_mod": relative_bias, "causal": True},
        "packed documents": {"mask_mod": same_document},
        "first token and window": {"mask_mod": sink_and_window},
        "rotary positions": {"rope": (angles.cos(), angles.sin()), "causal": True},
        "a temperature by head": {"query_mod": hotter_heads, "causal": True},
        "sigmoid attention": {"softmax": "sigmoid", "causal": True},
    }
    for name, options in calls.items():
        out, why = attention(q, k, v, explain=True, **options)
        out.float().square().mean().backward()
        print(f"{name:28} {why.path:10} {why.reason}")
    print(f"gradient of the learned bias: {bias.grad.abs().sum().item():.4f}")
