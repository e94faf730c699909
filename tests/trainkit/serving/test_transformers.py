"""transformers' encoders and classifiers, against transformers itself on each input alone."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("litserve", reason="needs the extra serve")
pytest.importorskip("transformers")

import transformers

from trainkit.serving.engine import InputError, ModelError, ModelSource

SMALL = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A random text classifier with a tokenizer of words."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, max_position_embeddings=8, id2label={0: "bad", 1: "good", 2: "so"})
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    return tmp_path


def test_texts_are_classified(bert: Path) -> None:
    predict = ModelSource.parse(f"hf:{bert}").load("cpu")
    texts = ["a b c", "d", "j a"]
    found = predict(texts)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    for text, one in zip(texts, found, strict=True):
        want = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        assert list(one["scores"].values()) == pytest.approx(want.tolist(), abs=1e-6)
        assert one["label"] == ["bad", "good", "so"][int(want.argmax())]
    (again,) = predict([tokenizer("a b c")["input_ids"]])
    assert again["scores"] == pytest.approx(found[0]["scores"], abs=1e-6)
    for wrong in ("a b c d e f g h i j", [], [99], {"x": 1}):
        with pytest.raises(InputError):
            predict([wrong])


def test_an_encoder_gives_the_mean_of_its_states(tmp_path: Path) -> None:
    model = transformers.BertModel(transformers.BertConfig(**SMALL)).eval()
    model.save_pretrained(tmp_path)
    found = ModelSource.parse(f"hf:{tmp_path}").load("cpu")([[5, 6, 7, 8], [9]])
    for tokens, one in zip(([5, 6, 7, 8], [9]), found, strict=True):
        want = model(torch.tensor([tokens])).last_hidden_state.mean(1)[0]
        assert one == pytest.approx(want.tolist(), abs=1e-5)
    with pytest.raises(InputError, match="without a tokenizer"):
        ModelSource.parse(f"hf:{tmp_path}").load("cpu")(["a"])


def test_images_are_classified(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = transformers.ResNetForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    predict = ModelSource.parse(f"hf:{tmp_path}").load("cpu")
    images = torch.rand(2, 3, 16, 16)
    found = predict(images.tolist())
    want = model(images).logits.softmax(-1)
    assert [list(one["scores"].values()) for one in found] == [pytest.approx(row.tolist(), abs=1e-5) for row in want]
    with pytest.raises(InputError, match="nested lists"):
        predict([[[["x"]]]])


def test_other_models_are_refused(tmp_path: Path) -> None:
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ModelError, match="encoders and classifiers are served, got GPT2LMHeadModel"):
        ModelSource.parse(f"hf:{tmp_path}").load("cpu")
    with pytest.raises(ModelError, match="does not load"):
        ModelSource.parse("hf:/no/such/folder").load("cpu")
