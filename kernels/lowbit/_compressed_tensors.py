"""Export for vLLM and transformers: W4A16, W4A8 and W8A8 models in the compressed-tensors format."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.kernels.lowbit._files import WEIGHTS, _safetensors, quantised_layers
from trainkit.kernels.lowbit._linear import Form, LowBitLinear
from trainkit.kernels.lowbit._packing import unpack


def export_compressed_tensors(model: nn.Module, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors` as vLLM reads them.

    W4A16 becomes "pack-quantized" int4 weights, W4A8 the same with dynamic fp8 activations a token, W8A8 "int-quantized" or
    "float-quantized". A transformers model's own configuration is kept; its tokenizer is yours to save beside it.

    Args:
        model: after `quantize_` with one of those configurations.
        folder: made where it is not.

    Raises:
        ValueError: a model without quantised layers, of several methods, or of W4A4, which the format cannot express.
        ImportError: no safetensors.
    """
    layers, folder = quantised_layers(model), Path(folder)
    methods = {(f.method, f.weights, f.activations, f.group) for f in (layer.form for layer in layers.values())}
    if len(methods) > 1:
        raise ValueError(f"an export has one method, got {sorted(m[0] for m in methods)}: quantise alike")
    form = next(iter(layers.values())).form
    if form.method == "W4A4":
        raise ValueError("compressed-tensors has no outlier block, got W4A4: export W4A16, W4A8 or W8A8")
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    own = {f"{name}.{key}" for name, layer in layers.items() for key in layer.state_dict()}
    for key, value in model.state_dict().items():
        # A tied head is written by its own name too: what reads it ties it again, or not.
        if key not in own:
            tensors[key] = value.detach().clone().contiguous()
    for name, layer in layers.items():
        tensors |= {f"{name}.{key}": value for key, value in _layer(layer).items()}
    config = getattr(model, "config", None)
    described: dict[str, Any] = config.to_dict() if config is not None else {}
    ignore = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    described["quantization_config"] = quantization_config(form, ignore)
    _safetensors().save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(described, indent=1, default=str) + "\n")


def _layer(layer: LowBitLinear) -> dict[str, Tensor]:
    """A layer's tensors by the format's names."""
    f = layer.form
    groups = -(-f.channels // f.group) if f.group else 1
    found = {"weight_scale": layer.scales[:groups].t().to(layer.dtype).contiguous()}
    if layer.bias is not None:
        found["bias"] = layer.bias.clone()
    if f.weights == "int4":
        found["weight_packed"] = packed32(unpack(layer.codes)[:, : f.channels])
        found["weight_shape"] = torch.tensor([f.rows, f.channels])
    else:
        found["weight"] = layer.codes[:, : f.channels].contiguous()
    return found


def packed32(codes: Tensor) -> Tensor:
    """Codes `[N, K]` as the format packs them: eight to an int32, each plus 8, the first in the lowest bits."""
    offset = torch.nn.functional.pad(codes.int() + 8, (0, -codes.shape[1] % 8)).view(len(codes), -1, 8)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)
    return (offset << shifts).sum(-1, dtype=torch.int32)


def quantization_config(form: Form, ignore: list[str]) -> dict[str, Any]:
    """The format's description of one method."""

    def numbers(bits: int, kind: str, strategy: str, dynamic: bool, group: int | None = None) -> dict[str, Any]:
        return {
            "num_bits": bits,
            "type": kind,
            "symmetric": True,
            "strategy": strategy,
            "group_size": group,
            "dynamic": dynamic,
        }

    kind = {"int4": "int", "int8": "int", "fp8": "float"}
    four = form.weights == "int4"
    weights = (
        numbers(4, "int", "group", False, form.group) if four else numbers(8, kind[form.weights], "channel", False)
    )
    inputs = None if form.activations == "16" else numbers(8, kind[form.activations], "token", True)
    layout = {"int4": "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized"}[form.weights]
    scheme = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": layout,
    }
    return {
        "quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed",
        "config_groups": {"group_0": scheme}, "ignore": ignore, "kv_cache_scheme": None,
    }  # fmt: skip
