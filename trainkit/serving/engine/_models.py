"""What is served: a function or a LightningModule, loaded inside each GPU process."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A batch of decoded JSON inputs to as many JSON-serialisable outputs.
Predict = Callable[[Sequence[Any]], Sequence[Any]]


# What begins the name of a folder that transformers' save_pretrained wrote.
_HUGGING_FACE = "hf:"


class ModelError(ValueError):
    """A model that cannot be loaded or was described wrongly."""


class InputError(ValueError):
    """One request's input does not suit the model."""


@dataclass(frozen=True)
class LanguageModel:
    """What a language model's function returns.

    Attributes:
        engine: a `trainkit.serving.generate.Engine`, or anything with its `fits`, `add_request`, `step`, `cancel`,
            `running`, `max_length`, `free_pages`, `num_pages`.
        encode: a text's tokens.
        decode: tokens' text; what is not yet a character ends in U+FFFD.
        sampling: what the engine takes, from temperature, top_k, top_p, min_p and seed; None: that module's `Sampling`.
    """

    engine: Any
    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    sampling: Callable[..., Any] | None = None


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        where: "module:attribute" or "file.py:attribute". The attribute is a LightningModule class, whose
            `predict_step` is served, or a function of the device that returns a function from a list of inputs to a
            list of outputs, or a `LanguageModel`. Or "hf:folder", a transformers encoder or classifier.
        checkpoint: of the LightningModule, loaded with `load_from_checkpoint`; a function gets it as second argument.
    """

    where: str
    checkpoint: Path | None = None

    @staticmethod
    def parse(text: str) -> "ModelSource":
        """Read "module:attribute" or "module:attribute@checkpoint".

        Raises:
            ModelError: it is neither.
        """
        if text.startswith(_HUGGING_FACE) and len(text) > len(_HUGGING_FACE):
            return ModelSource(text)
        where, _, checkpoint = text.partition("@")
        home, colon, attribute = where.rpartition(":")
        if not colon or not home or not attribute.isidentifier():
            raise ModelError(
                f"a model is module:attribute, file.py:attribute (and @checkpoint) or hf:folder, got {text!r}"
            )
        return ModelSource(where, Path(checkpoint) if checkpoint else None)

    def load(self, device: str) -> Predict:
        """Load it onto `device` ("cpu", "cuda:0").

        Raises:
            ModelError: there is no such module, attribute or checkpoint, or it fails to load.
        """
        predict = self._made(device, language=False)
        if not callable(predict):
            raise ModelError(f"{self.where} must return a function of a list of inputs, got {type(predict).__name__}")
        found: Predict = predict
        return found

    def load_language(self, device: str) -> LanguageModel:
        """Load a language model onto `device`.

        Raises:
            ModelError: as `load`; or it is none.
        """
        model = self._made(device, language=True)
        if not isinstance(model, LanguageModel):
            raise ModelError(f"{self.where} must return a LanguageModel, got {type(model).__name__}")
        return model

    def _made(self, device: str, language: bool) -> Any:
        try:
            if self.where.startswith(_HUGGING_FACE):
                from trainkit.serving.engine import _transformers

                load = _transformers.load_language if language else _transformers.load
                return load(self.where.removeprefix(_HUGGING_FACE), device)
            attribute = self._attribute()
            if isinstance(attribute, type):
                return _lightning(attribute, self.checkpoint, device)
            if self.checkpoint is not None:
                return attribute(device, self.checkpoint)
            return attribute(device)
        except ModelError as error:
            raise ModelError(f"{self.where}: {error}") from None
        except Exception as error:
            raise ModelError(f"{self.where} does not load: {type(error).__name__}: {error}") from error

    def _attribute(self) -> Any:
        home, _, name = self.where.rpartition(":")
        if home.endswith(".py"):
            path = Path(home).resolve()
            if not path.is_file():
                raise ModelError(f"there is no file {path}")
            spec = importlib.util.spec_from_file_location(f"_served_{path.stem}", path)
            if spec is None or spec.loader is None:
                raise ModelError(f"{path} is not a Python file")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(home)
        if not hasattr(module, name):
            raise ModelError(f"there is no {name!r} in {home}")
        return getattr(module, name)


def _lightning(module_type: type, checkpoint: Path | None, device: str) -> Predict:
    import torch
    from pytorch_lightning import LightningModule

    if not issubclass(module_type, LightningModule):
        raise ModelError(f"a served class is a LightningModule, got {module_type.__name__}")
    module = module_type() if checkpoint is None else module_type.load_from_checkpoint(checkpoint, map_location=device)
    module.to(device).eval()

    def predict(inputs: Sequence[Any]) -> Sequence[Any]:
        try:
            batch = _batched(inputs, device)
        except (ValueError, TypeError, RuntimeError, KeyError) as error:
            raise InputError(f"inputs are numbers in nested lists of one shape, or objects of those: {error}") from None
        with torch.inference_mode():
            return _rows(module.predict_step(batch, 0), len(inputs))

    return predict


def _batched(inputs: Sequence[Any], device: str) -> Any:
    """A tensor of all inputs, or a dictionary of tensors where they are objects."""
    import torch

    if isinstance(inputs[0], dict):
        return {key: _batched([one[key] for one in inputs], device) for key in inputs[0]}
    return torch.tensor(inputs).to(device)


def _rows(outputs: Any, count: int) -> list[Any]:
    """What each input got, of a tensor with a row for each, or a dictionary or sequence of such."""
    import torch

    if isinstance(outputs, torch.Tensor) and outputs.ndim > 0 and len(outputs) == count:
        rows: list[Any] = outputs.cpu().tolist()
        return rows
    if isinstance(outputs, dict):
        columns = {key: _rows(value, count) for key, value in outputs.items()}
        return [{key: column[row] for key, column in columns.items()} for row in range(count)]
    if isinstance(outputs, list | tuple):
        return [list(row) for row in zip(*(_rows(value, count) for value in outputs), strict=True)]
    raise ModelError("predict_step must return tensors with a row for each input, alone or in a dictionary or tuple")
