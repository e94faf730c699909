"""transformers' encoders and classifiers as models to serve."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainkit.serving.engine._models import InputError, LanguageModel, ModelError, Predict


def load(where: str, device: str) -> Predict:
    """A classifier (of texts or images) or an encoder from a folder that `save_pretrained` wrote.

    Text models take a text, where the folder holds a tokenizer, or a list of token numbers; longer ones than the
    model's positions are refused. Image models take pixels [height][width][channel] from 0 to 255, where the folder
    holds an image processor, else its input [channel][height][width] as it is.

    Returns:
        {"label": ..., "scores": {label: probability}} of a classifier; the mean of the last hidden states of an encoder.

    Raises:
        ModelError: another kind of model.
    """
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(where)
    kind = (config.architectures or [""])[0]
    classifies = kind.endswith("Classification")
    if kind.endswith("ForImageClassification"):
        model, encode = transformers.AutoModelForImageClassification.from_pretrained(where), _images(where)
    elif kind.endswith("ForSequenceClassification"):
        model, encode = transformers.AutoModelForSequenceClassification.from_pretrained(where), _texts(where, config)
    elif kind.endswith(("Model", "ForMaskedLM")) and "LMHead" not in kind and not config.is_decoder:
        model, encode = transformers.AutoModel.from_pretrained(where), _texts(where, config)
    else:
        raise ModelError(
            f"of transformers' models, encoders and classifiers are served, got {kind or 'no architecture'}"
        )
    model.to(device).eval()

    def predict(inputs: Sequence[Any]) -> Sequence[Any]:
        batch = {name: tensor.to(device) for name, tensor in encode(inputs).items()}
        with torch.inference_mode():
            found = model(**batch)
        if classifies:
            return [
                {"label": config.id2label[max(range(len(row)), key=row.__getitem__)], "scores": _named(row, config)}
                for row in found.logits.float().softmax(-1).tolist()
            ]
        mask = batch["attention_mask"][..., None].to(found.last_hidden_state.dtype)
        rows: Sequence[Any] = ((found.last_hidden_state * mask).sum(1) / mask.sum(1)).tolist()
        return rows

    return predict


def load_language(where: str, device: str) -> LanguageModel:
    """A decoder with its tokenizer, over the paged engine.

    Raises:
        ModelError: the folder holds no tokenizer.
    """
    import transformers

    from trainkit.serving.generate import Engine

    tokenizer = _tokenizer(where)
    if tokenizer is None:
        raise ModelError("a language model needs its tokenizer in the same folder")
    model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype="auto")
    engine = Engine(model, device=device, eos=tokenizer.eos_token_id)
    return LanguageModel(engine, lambda text: tokenizer(text)["input_ids"], tokenizer.decode)


def _tokenizer(where: str) -> Any:
    """None where a folder holds none: transformers would make up an empty one."""
    import transformers

    if Path(where).is_dir() and not (Path(where) / "tokenizer_config.json").is_file():
        return None
    return transformers.AutoTokenizer.from_pretrained(where)


def _named(row: list[float], config: Any) -> dict[str, float]:
    return {config.id2label[number]: score for number, score in enumerate(row)}


def _texts(where: str, config: Any) -> Any:
    import torch

    tokenizer = _tokenizer(where)
    longest = getattr(config, "max_position_embeddings", None) or 10**9
    padding = config.pad_token_id or 0

    def tokens(value: Any) -> list[int]:
        if isinstance(value, str):
            if tokenizer is None:
                raise InputError("this model came without a tokenizer: an input is a list of token numbers")
            value = tokenizer(value)["input_ids"]
        if not isinstance(value, list) or not value or not all(type(t) is int for t in value):
            raise InputError("an input is a text or a list of token numbers")
        if len(value) > longest or not 0 <= min(value) <= max(value) < config.vocab_size:
            raise InputError(f"at most {longest} tokens from 0 to {config.vocab_size - 1}, got {len(value)}")
        return value

    def encode(inputs: Sequence[Any]) -> dict[str, Any]:
        rows = [tokens(value) for value in inputs]
        width = max(map(len, rows))
        return {
            "input_ids": torch.tensor([row + [padding] * (width - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        }

    return encode


def _images(where: str) -> Any:
    import numpy as np
    import torch
    import transformers

    bare = Path(where).is_dir() and not (Path(where) / "preprocessor_config.json").is_file()
    processor = None if bare else transformers.AutoImageProcessor.from_pretrained(where)

    def encode(inputs: Sequence[Any]) -> dict[str, Any]:
        try:
            images = [np.asarray(value, dtype=np.float32 if processor is None else np.uint8) for value in inputs]
            if processor is None:
                return {"pixel_values": torch.from_numpy(np.stack(images))}
            return {"pixel_values": processor(images=images, return_tensors="pt")["pixel_values"]}
        except (ValueError, TypeError, OverflowError) as error:
            raise InputError(f"an image is numbers in nested lists: {error}") from None

    return encode
