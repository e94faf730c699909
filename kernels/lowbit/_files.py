"""Quantised models on disk: safetensors beside a manifest that says what each layer is."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainkit.kernels.lowbit._linear import Form, LowBitLinear
from trainkit.kernels.lowbit._quantize import _replace, link
from trainkit.kernels.lowbit._walk import device_of

VERSION = 1
WEIGHTS, MANIFEST = "model.safetensors", "lowbit.json"


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("saving quantised models needs safetensors: pip install safetensors") from None
    return safetensors.torch


def quantised_layers(model: nn.Module) -> dict[str, LowBitLinear]:
    """The model's quantised layers by name.

    Raises:
        ValueError: there are none.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LowBitLinear)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantised layer: call quantize_ first")
    return layers


def save_quantized(model: nn.Module, folder: str | Path) -> None:
    """Write `model.safetensors` and `lowbit.json` into a folder.

    Args:
        model: after `quantize_`.
        folder: made where it is not.

    Raises:
        ValueError: a model without quantised layers.
        ImportError: no safetensors.
    """
    layers, folder = quantised_layers(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _safetensors().save_model(model, str(folder / WEIGHTS))
    forms = {name: dataclasses.asdict(layer.form) for name, layer in layers.items()}
    (folder / MANIFEST).write_text(json.dumps({"version": VERSION, "layers": forms}, indent=1) + "\n")


def load_quantized(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put what `save_quantized` wrote into an unquantised model of the same architecture, in place.

    Args:
        model: as its class makes it; its linear layers are replaced, its numbers overwritten.
        folder: what was written.

    Returns:
        The model.

    Raises:
        ValueError: no such folder, a manifest of another version, a layer that the model lacks or has in another shape.
        ImportError: no safetensors.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise ValueError(f"a quantised model is a folder with {MANIFEST}, {folder} has none: give its folder") from None
    version = manifest.get("version")
    if version != VERSION:
        raise ValueError(
            f"this Trainkit reads version {VERSION} of {MANIFEST}, {folder} has version {version}: "
            "quantise again, or use the Trainkit that wrote it"
        )
    made: dict[str, LowBitLinear] = {}
    orders: dict[str, Tensor] = {}
    for name, fields in manifest["layers"].items():
        form = Form(**fields)
        try:
            old = model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"the file has a layer {name}, {type(model).__name__} has none: build the same model"
            ) from None
        shape = (getattr(old, "out_features", None), getattr(old, "in_features", None))
        if shape != (form.rows, form.channels):
            raise ValueError(
                f"{name} must be {form.rows} x {form.channels} as in the file, got {shape}: build the same model"
            )
        like = next(old.parameters())
        made[name] = LowBitLinear(form, like.dtype, like.device).train(old.training)
        link(made[name], orders)
    for name, layer in made.items():
        _replace(model, name, layer)
    _safetensors().load_model(model, str(folder / WEIGHTS), device=str(device_of(model)))
    return model
