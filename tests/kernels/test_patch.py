"""patch(model): found by what modules hold, undone without a trace."""

import ast
import copy
import importlib
import itertools
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from trainkit.kernels import patch
from trainkit.kernels.fused import _rms_norm, _swiglu


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


class Left:
    """What only looks like the formula."""

    class OneMoreNorm(TinyRMSNorm):
        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon) * (1 + self.weight)

    class CenteredNorm(TinyRMSNorm):
        def forward(self, x):
            return super().forward(x - x.mean(-1, keepdim=True))

    class GroupedNorm(TinyRMSNorm):
        def forward(self, x):
            y = x.unflatten(-1, (2, -1))
            return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).flatten(-2) * self.weight

    class BiasedNorm(TinyRMSNorm):
        def __init__(self, width):
            super().__init__(width)
            self.bias = nn.Parameter(torch.ones(width))

        def forward(self, x):
            return super().forward(x) + self.bias

    class ResidualNorm(TinyRMSNorm):
        def forward(self, x, residual=None):
            return super().forward(x if residual is None else x + residual), x

    class Scaled(TinyMLP):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x) * 2.0) * self.up_proj(x)) * 0.5

    class Clamped(TinyMLP):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x))

    class Swapped(TinyMLP):
        def forward(self, x):
            return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))

    class Dropping(TinyMLP):
        def forward(self, x):
            hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
            return self.down_proj(nn.functional.dropout(hidden, 0.1, self.training))


REASONS = {
    "OneMoreNorm": "output differs", "CenteredNorm": "output differs", "GroupedNorm": "output differs",
    "BiasedNorm": "parameters bias",
    "ResidualNorm": r"takes \(x, residual\)", "Scaled": "output differs", "Clamped": "output differs",
    "Swapped": "output differs",
    "Dropping": "in training",
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_what_computes_something_else_is_left_and_listed(name):
    kind = getattr(Left, name)
    module = kind(nn.SiLU()) if issubclass(kind, TinyMLP) else kind(8)
    model = nn.Sequential(module, TinyRMSNorm(8)).eval()
    done = patch(model)
    assert done.changed == ["1"] and "forward" not in module.__dict__
    assert re.search(REASONS[name], done.left["0"])
    assert re.search(rf"^0 +{name} +left: .*{REASONS[name]}", str(done), re.M)
    assert re.search(r"^1 +TinyRMSNorm as RMSNorm +fused$", str(done), re.M)
    with pytest.raises(ValueError, match=f"nothing to patch in {name}.*{REASONS[name]}"):
        patch(module)


@pytest.mark.parametrize("eps", [None, 1e-6, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_epsilon_is_the_modules_own(eps, dtype):
    norm = nn.RMSNorm(8, eps=eps, dtype=dtype)
    x = (torch.randn(3, 8) * 1e-3).to(dtype)
    want = norm(x)
    with patch(norm):
        torch.testing.assert_close(norm(x), want)


def test_patched_models_are_copied_pickled_and_undone_in_any_order():
    model = nn.Sequential(TinyRMSNorm(8), nn.Sequential(TinyMLP(nn.SiLU()), TinyRMSNorm(8)))
    x = torch.randn(3, 8)
    inner = patch(model[1])
    outer = patch(model)
    assert inner.changed == ["0", "1"] and outer.changed == ["0"]
    assert outer.left == {"1.0": "patched already", "1.1": "patched already"}
    want = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), want, rtol=0, atol=0)
        with torch.no_grad():
            other[0].weight.mul_(3)
        assert not torch.equal(other(x), want)
    torch.testing.assert_close(model(x), want, rtol=0, atol=0)
    inner.undo()
    assert "forward" in model[0].__dict__ and "forward" not in model[1][0].__dict__
    outer.undo()
    inner.undo()
    assert all("forward" not in m.__dict__ for m in model.modules())


def classes(*suffixes):
    """Classes of the installed transformers by the ends of their names."""
    root = Path(transformers().__file__).parent / "models"
    for path in sorted(root.glob("*/modeling_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name.lower().endswith(suffixes):
                yield f"transformers.models.{path.parent.name}.{path.stem}", node.name


def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def formulas(monkeypatch):
    """What is computed counts here, and not by which kernel: the interpreter would take an hour."""
    for module in (_rms_norm, _swiglu):
        monkeypatch.setattr(module, "fusible", lambda *_: False)


@pytest.mark.slow
@pytest.mark.usefixtures("formulas")
def test_every_norm_of_transformers_is_the_same_or_left():
    """By values that this test makes: parameters, inputs, and the comparison."""
    same, left, untried = 0, [], []
    for module, name in classes("rmsnorm"):
        kind = getattr(importlib.import_module(module), name)
        norm = next((x for x in (built(kind, *a) for a in ((16,), (16, 1e-6))) if x is not None), None)
        if norm is None:
            untried.append(name)
            continue
        with torch.no_grad():
            for p in norm.parameters():
                p.copy_(torch.randn(p.shape) * 0.3 + 0.8)
        x = torch.randn(2, 5, 16)
        try:
            want = norm(x)
        except TypeError:
            want = None
        try:
            done = patch(norm)
        except ValueError:
            left.append(name)
            continue
        got = norm(x)
        assert want is not None and (got - want).abs().max() <= 1e-6 * max(1, want.abs().max()), name
        assert len(done.changed) == 1
        same += 1
    assert same >= 160 and len(left) >= 13 and len(untried) <= 5, (same, left, untried)


def built(kind, *args):
    try:
        return kind(*args)
    except Exception:
        return None


@pytest.mark.slow
@pytest.mark.usefixtures("formulas")
def test_every_gated_mlp_of_transformers_is_the_same_or_left():
    same, left = 0, []
    for module, name in classes("mlp"):
        kind = getattr(importlib.import_module(module), name)
        mlp = built(kind, Config())
        if mlp is None or not all(
            isinstance(getattr(mlp, p, None), nn.Linear) for p in ("gate_proj", "up_proj", "down_proj")
        ):
            continue
        mlp = mlp.float()
        for training in (False, True):
            mlp.train(training)
            x = torch.randn(2, 5, mlp.gate_proj.in_features) * 20
            torch.manual_seed(0)
            want = mlp(x)
            try:
                done = patch(mlp)
            except ValueError:
                left.append(name)
                continue
            torch.manual_seed(0)
            got = mlp(x)
            assert (got - want).abs().max() <= 2e-6 * max(1, want.abs().max()), name
            done.undo()
            same += 1
    assert same >= 200 and {"FalconH1MLP", "DeepseekV4MLP", "SeedOssMLP"} <= set(left), (same, left)


class Config:
    """Answers what a class asks of its configuration, so that what it might skip would be seen."""

    hidden_act = hidden_activation = act_fn = "silu"
    hidden_size = intermediate_size = moe_intermediate_size = 32
    mlp_multipliers, activation_sparsity_pattern, rms_norm_eps = (1.7, 0.6), [0.0] * 9, 1e-6
    mlp_bias = attention_bias = use_bias = bias = False
    swiglu_limit, limit, hidden_dropout_prob = 7.0, 7.0, 0.0

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return 0.3 if "dropout" in name or "scale" in name else 32 if "size" in name or "dim" in name else None


@pytest.mark.parametrize("window", [None, 4])
def test_transformers(window):
    config = transformers().MistralConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=window, attn_implementation="eager",
    )  # fmt: skip
    model = transformers().MistralForCausalLM(config).eval()
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


@pytest.mark.parametrize("how", ["lengths", "lengths and a mask", "indices", "indices by row", "two lengths"])
def test_packed_sequences_of_transformers_do_not_mix(how):
    """What a model passes to its attention of packed sequences, against attention of each sequence alone in fp64."""
    from trainkit.kernels._transformers import forward

    rows = 2 if how == "indices by row" else 1
    ends = [[0, 3, 3, 8, 12], [0, 5, 12]]
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows, h, 12, 8, generator=g) for h in (4, 2, 2))
    lengths = torch.tensor(ends[0], dtype=torch.int32)
    which = torch.stack([
        torch.bucketize(torch.arange(12), torch.tensor(x[1:]), right=True) for x in ends[:rows]
    ])  # fmt: skip
    causal = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    options = {
        "lengths": {"cu_seq_lens_q": lengths},
        "lengths and a mask": {
            "cu_seq_lens_q": lengths,
            "cu_seq_lens_k": lengths,
            "max_length_q": 5,
            "max_length_k": 5,
        },
        "two lengths": {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths.long()},
    }.get(how, {"seq_idx": which.int()})
    mask = causal.expand(rows, 1, 12, 12) if how != "lengths" and how != "two lengths" else None
    out, _ = forward(torch.nn.Module(), q, k, v, mask, scaling=0.4, **options)
    for b in range(rows):
        for first, last in itertools.pairwise(ends[b]):
            x, y, z = (t[b, :, first:last].double() for t in (q, k, v))
            y, z = (t.repeat_interleave(2, 0) for t in (y, z))
            scores = (x @ y.mT * 0.4).masked_fill(~causal[0, 0, : last - first, : last - first], -torch.inf)
            want = torch.softmax(scores, -1) @ z
            torch.testing.assert_close(out[b, first:last].transpose(0, 1).double(), want, atol=1e-5, rtol=0)


def test_lengths_that_do_not_fit_are_refused():
    from trainkit.kernels._transformers import forward

    q, k, v = (torch.randn(1, 2, 12, 8) for _ in range(3))
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    with pytest.raises(ValueError, match="rise from 0 to the 12 tokens"):
        forward(torch.nn.Module(), q, k, v, mask, cu_seq_lens_q=torch.tensor([0, 5, 11]))
