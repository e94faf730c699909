"""`quantize_` on the demo's GPT and two transformers families: what it replaces, refuses, saves, exports and trains."""

import copy
import json

import pytest
import torch
from torch import nn

from trainkit.demo._config import Size
from trainkit.demo._model import GPT
from trainkit.kernels import (
    W4A4,
    W4A8,
    W4A16,
    W8A8,
    LowBitLinear,
    export_compressed_tensors,
    load_quantized,
    prepare_qat_,
    quantize_,
    save_quantized,
)
from trainkit.kernels.lowbit._rotation import rotate
from trainkit.kernels.lowbit._rounding import Blocks, quantised

SIZE = Size(width=128, layers=2, heads=4, kv_heads=2, hidden=144, context=64, batch=2, steps=20)


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    """On a CPU what its users have: the reference. The kernels, interpreted, have their own tests."""
    triton = pytest.importorskip("triton")
    if not torch.cuda.is_available():
        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)


def gpt(seed=0):
    torch.manual_seed(seed)
    return GPT(SIZE, 256, 1e-3).eval()


def tokens(count=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (2, 16), generator=g) for _ in range(count)]


def family(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    common = dict(vocab_size=128, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4)
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, num_key_value_heads=2)).eval()
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**common)).eval()


def error(got, want):
    return float((got - want).norm() / want.norm())


QUIET = dict(progress=False)


@pytest.mark.parametrize(
    ("config", "bound"),
    [
        (W4A4(group_size=32, **QUIET), 0.3), (W4A4(rotate=True, **QUIET), 0.3), (W4A8(gptq=False), 0.2), (W4A16(gptq=False), 0.2),
        (W8A8(), 0.08), (W8A8(kind="int8", gptq=True, **QUIET), 0.03),
    ],
    ids=lambda x: getattr(x, "name", None),
)  # fmt: skip
def test_a_quantised_model_is_close_and_its_gradient_is_the_dequantised_one(config, bound):
    model, batches = gpt(), tokens()
    with torch.no_grad():
        want = model(batches[0])
    report = quantize_(model, config, batches)
    assert len(report.quantised) == 8 and set(report.left) == {"embedding", "head"}
    with torch.no_grad():
        assert error(model(batches[0]), want) < bound
    layer = model.blocks[1].out
    assert isinstance(layer, LowBitLinear)
    x = torch.randn(5, 128, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(dx, layer.dequantise().sum(0).expand(5, -1))
    assert "8 of 10 quantised" in str(report) and "the reference in PyTorch" in str(report)


@pytest.mark.parametrize("name", ["llama", "neox"])
def test_transformers_families(name):
    model = family(name)
    batches = [{"input_ids": t % 128} for t in tokens()]
    with torch.no_grad():
        want = model(**batches[0]).logits
    report = quantize_(model, W4A4(gptq=False, **QUIET), batches)
    linears = 7 if name == "llama" else 4
    assert len(report.quantised) == 2 * linears
    assert all("outside" in reason for reason in report.left.values())
    with torch.no_grad():
        assert error(model(**batches[0]).logits, want) < 0.35
    if name == "llama":
        block = model.model.layers[0]
        first, second = block.self_attn.q_proj, block.self_attn.v_proj
        assert first.order is second.order and first.first and not second.first
        assert block.self_attn.o_proj.order is not first.order
        # The norm and the gated product leave codes behind.
        assert "CodingNorm" in repr(block.input_layernorm.forward) and "CodingMLP" in repr(block.mlp.forward)


def test_outliers_are_the_loudest_channels_and_bits_are_exact():
    model, batches = gpt(), tokens()
    loud = torch.tensor([3, 77, 120])
    with torch.no_grad():
        for block in model.blocks:
            block.attention_norm.weight[loud] *= 50
            block.qkv.weight[:, loud] /= 50
    report = quantize_(model, W4A4(gptq=False, **QUIET), batches)
    qkv = model.blocks[0].qkv
    assert set(loud.tolist()) <= set(qkv.order[qkv.form.main :].tolist())
    row = report.rows[[r.name for r in report.rows].index("blocks.0.qkv")]
    n, main, outliers = 256, 128, 16  # 112 channels, padded to one group
    assert row.nbytes == n * (main // 2 + outliers + 2 + 2) + 4 * (main + outliers)
    assert row.bits == 8 * row.nbytes / (n * 128)


def test_bytes_at_4096_channels():
    block = nn.ModuleList([nn.Sequential(nn.Linear(4096, 64, bias=False))]).bfloat16()
    model = nn.Module()
    model.blocks = block
    model.forward = lambda x: block[0](x)
    report = quantize_(model, W4A4(gptq=False, clip=1.0, keep_slower=True, **QUIET), [torch.randn(2, 4096).bfloat16()])
    # The order of the channels weighs on 64 rows here as it would not on 4096.
    (row,) = report.quantised
    assert (row.nbytes - 4 * 4096) / row.dense_nbytes <= 0.27


def test_rounding_with_errors_passed_on_is_better_where_channels_agree():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=g) @ torch.randn(8, 64, generator=g) + 0.1 * torch.randn(400, 64, generator=g)
    w = torch.randn(24, 64, generator=g)
    blocks = Blocks(64, 32, 7, 16)
    assert blocks.ranges == [(0, 32, 7), (32, 48, 7), (48, 64, 127)]

    def wrong(hessian):
        codes, scales = quantised(w, blocks, hessian, None, 1.0)
        back = torch.cat([codes[:, a:b] * s[:, None] for (a, b, _), s in zip(blocks.ranges, scales, strict=True)], 1)
        return float((x @ (back - w).t()).square().mean())

    assert wrong(x.t() @ x) < 0.5 * wrong(None)


def test_a_rotation_is_its_own_inverse():
    for k in (64, 96, 1408, 4096):
        x = torch.randn(3, k, dtype=torch.float64)
        torch.testing.assert_close(rotate(rotate(x)), x)
        torch.testing.assert_close(rotate(x).norm(), x.norm())


def test_what_is_left_and_what_is_refused():
    with pytest.raises(ValueError, match="needs a loader for gptq, got None"):
        quantize_(gpt(), W4A16())
    with pytest.raises(ValueError, match="needs a loader for outliers"):
        quantize_(gpt(), W4A4(gptq=False))
    with pytest.raises(ValueError, match="the loader gave none"):
        quantize_(gpt(), W4A4(**QUIET), [])
    with pytest.raises(TypeError, match="config must be one of"):
        quantize_(gpt(), object())
    with pytest.raises(ValueError, match="nothing to quantise in Linear"):
        quantize_(nn.Linear(64, 64), W8A8())
    broken = gpt()
    with torch.no_grad():
        broken.embedding.weight[65] = float("nan")
    clean = torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(ValueError, match=r"batch 2 gave blocks\.0\.qkv one that is not"):
        quantize_(broken, W4A16(**QUIET), [clean, clean + 65])
    for wrong, said in (
        (dict(group_size=48), "32, 64, 128, got 48"), (dict(outliers=5), "multiple of 16, got 5"), (dict(clip=1.5), "got 1.5"),
        (dict(rotate=True, outliers=16), "rotate=True takes"), (dict(kv_bits=8), "4 or 16, got 8"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            W4A4(**wrong)
    model = gpt()
    model.blocks[0].odd = nn.Conv1d(4, 4, 1)
    model.blocks[0].small = nn.Linear(16, 8)
    model.blocks[0].unreached = nn.Linear(128, 8)
    model.blocks[0].tied = nn.Linear(128, 8)
    model.blocks[1].tied = nn.Linear(128, 8)
    model.blocks[1].tied.weight = model.blocks[0].tied.weight
    left = quantize_(model, W4A4(gptq=False, **QUIET), tokens(), lambda module, name: not name.endswith("down")).left
    assert left["blocks.0.odd"] == "Conv1d is no nn.Linear"
    assert left["blocks.0.small"] == "0 channels that are no outliers are fewer than 32"
    assert left["blocks.0.unreached"] == "no batch of the loader reached it"
    assert left["blocks.1.tied"] == "shares its weight with blocks.0.tied"
    assert left["blocks.1.down"] == "filter_fn said no"
    with pytest.raises(ValueError, match="takes 128 channels"):
        model.blocks[0].qkv(torch.ones(2, 5))


def test_files_round_trip_and_refuse(tmp_path):
    pytest.importorskip("safetensors")
    model, batches = gpt(), tokens()
    with pytest.raises(ValueError, match="no quantised layer"):
        save_quantized(model, tmp_path)
    quantize_(model, W4A4(gptq=False, **QUIET), batches)
    save_quantized(model, tmp_path)
    back = load_quantized(gpt(seed=5), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(back(batches[0]), model(batches[0]))
    manifest = json.loads((tmp_path / "lowbit.json").read_text())
    (tmp_path / "lowbit.json").write_text(json.dumps({**manifest, "version": 9}))
    with pytest.raises(ValueError, match=r"reads version 1.*has version 9"):
        load_quantized(gpt(), tmp_path)
    manifest["layers"]["blocks.0.qkv"]["rows"] = 12
    (tmp_path / "lowbit.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="must be 12 x 128"):
        load_quantized(gpt(), tmp_path)
    with pytest.raises(ValueError, match=r"folder with lowbit\.json"):
        load_quantized(gpt(), tmp_path / "none")


PLAIN = [W4A16(gptq=False), W4A8(gptq=False), W8A8(), W8A8(kind="int8")]


@pytest.mark.parametrize("config", PLAIN, ids=["W4A16", "W4A8", "W8A8-fp8", "W8A8-int8"])
def test_export_is_read_by_compressed_tensors(tmp_path, config):
    pytest.importorskip(
        "compressed_tensors", reason="compressed-tensors is not installed: pip install compressed-tensors"
    )
    from compressed_tensors.compressors import unpack_from_int32
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    model = family("llama")
    quantize_(model, config)
    export_compressed_tensors(model, tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    parsed = QuantizationConfig.model_validate(described["quantization_config"])
    scheme = parsed.config_groups["group_0"]
    assert scheme.weights.num_bits == (4 if "W4" in config.name else 8) and parsed.ignore == ["lm_head"]
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    layer = model.get_submodule(name)
    if "W4" in config.name:
        shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
        codes = unpack_from_int32(tensors[f"{name}.weight_packed"], 4, shape)
    else:
        codes = tensors[f"{name}.weight"]
    scales = tensors[f"{name}.weight_scale"]
    back = (
        codes.float() * scales.repeat_interleave(128, 1)[:, : codes.shape[1]]
        if "W4" in config.name
        else codes.float() * scales
    )
    torch.testing.assert_close(back, layer.dequantise())


def test_export_refuses_what_the_format_cannot_say(tmp_path):
    model = gpt()
    quantize_(model, W4A4(gptq=False, **QUIET), tokens())
    with pytest.raises(ValueError, match="no outlier block, got W4A4"):
        export_compressed_tensors(model, tmp_path)


@pytest.mark.parametrize("config", [W4A4(outliers=0, gptq=False, clip=1.0), *PLAIN], ids=lambda c: c.name)
def test_what_was_trained_is_what_is_quantised(config):
    model, batches = gpt(), tokens()
    prepare_qat_(model, config)
    want = model(batches[0])
    want.square().mean().backward()
    assert model.blocks[0].qkv.weight.grad.abs().sum() > 0
    before = copy.deepcopy(model)
    quantize_(model, config)
    for name in ("qkv", "down"):
        trained, made = getattr(before.blocks[1], name), getattr(model.blocks[1], name)
        x = torch.randn(7, made.in_features, generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            assert error(made(x), trained(x)) < 1e-5
    with pytest.raises(ValueError, match="training needs gptq=False and no outliers"):
        prepare_qat_(gpt(), W4A4())
