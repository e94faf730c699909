"""patch(model): found by what modules hold, undone without a trace."""

import pytest
import torch
from torch import nn

from trainkit.kernels import patch


class TinyRMSNorm(nn.Module):
    def __init__(self, width, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))
        self.variance_epsilon = eps

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon) * self.weight


class TinyMLP(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn = act

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_patch_keeps_numbers_and_undoes():
    model = nn.Sequential(TinyRMSNorm(8), TinyMLP(nn.SiLU()), TinyMLP(nn.GELU()), nn.LayerNorm(8))
    x = torch.randn(3, 8)
    want, keys = model(x), list(model.state_dict())
    with patch(model) as done:
        assert done.changed == ["0", "1"]
        torch.testing.assert_close(model(x), want)
        assert list(model.state_dict()) == keys
        with pytest.raises(ValueError, match="nothing to patch in Sequential"):
            patch(model)
    assert not done.changed and all("forward" not in m.__dict__ for m in model.modules())
    torch.testing.assert_close(model(x), want, rtol=0, atol=0)


def test_gemma_scales_by_one_plus_weight_and_is_left_alone():
    class GemmaRMSNorm(TinyRMSNorm):
        pass

    with pytest.raises(ValueError, match="nothing to patch"):
        patch(nn.Sequential(GemmaRMSNorm(8)))


@pytest.mark.parametrize("window", [None, 4])
def test_transformers(window):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.MistralConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=window, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval()
    tokens = torch.randint(32, (2, 10))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    want = [model(tokens).logits, model(tokens, attention_mask=mask).logits[:, 3:]]
    with patch(model) as done:
        assert "attention" in done.changed
        got = [model(tokens).logits, model(tokens, attention_mask=mask).logits[:, 3:]]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == "eager"
