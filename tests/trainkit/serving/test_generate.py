"""Generation: continuous batching gives what one request at a time gives, whatever the cache does meanwhile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainkit.demo._config import SIZES
from trainkit.demo._model import GPT
from trainkit.serving.generate import Engine, Sampling, generate
from trainkit.serving.kv_cache import OutOfPages, Pages


def model():
    torch.manual_seed(0)
    gpt = GPT(SIZES["tiny"], 256, 1e-3).eval()
    for weight in gpt.parameters():
        if weight.ndim == 2:
            nn.init.normal_(weight, std=0.15)  # far from uniform, so that tokens differ
    return gpt


@pytest.fixture(scope="module")
def gpt():
    return model()


@pytest.fixture(scope="module")
def prompts():
    g = torch.Generator().manual_seed(1)
    made = [torch.randint(256, (n,), generator=g).tolist() for n in (1, 16, 17, 5, 60, 33)]
    return [*made, [*made[4][:40], 1, 2, 3], [*made[4][:48], 7]]


@pytest.fixture(scope="module")
def wanted(gpt, prompts):
    return [greedy(gpt, p, 8) for p in prompts]


@torch.no_grad()
def greedy(gpt, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(gpt(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


GREEDY = Sampling(temperature=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch": 3, "max_step_tokens": 7},  # prompts in chunks beside decoding
        {"num_pages": 9, "page_size": 8, "max_batch": 4},  # requests go and come back
        {"page_size": 1},
    ],
)
def test_equals_greedy_one_by_one(gpt, prompts, wanted, options):
    assert generate(gpt, prompts, max_new_tokens=8, sampling=GREEDY, backend="reference", **options) == wanted


def test_transformers(prompts):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(config).eval()
    for weight in llama.parameters():
        if weight.ndim == 2:
            nn.init.normal_(weight, std=0.15)
    some = prompts[2:5]
    want = [
        llama.generate(torch.tensor([p]), max_new_tokens=6, do_sample=False, pad_token_id=0)[0, len(p) :].tolist()
        for p in some
    ]  # fmt: skip
    stop = llama.generation_config.eos_token_id
    got = generate(llama, some, max_new_tokens=6, sampling=GREEDY, backend="reference", eos=stop, page_size=8)
    assert got == want


def test_draws_do_not_depend_on_the_batch(gpt, prompts, monkeypatch):
    # By sorting: Triton's interpreter takes seconds a token, and is tested with the kernel.
    monkeypatch.setattr("trainkit.kernels.fused._sample.fusible", lambda *tensors: False)
    drawn = Sampling(temperature=0.8, top_p=0.9, top_k=50, seed=5)
    many = generate(gpt, prompts, max_new_tokens=8, sampling=drawn, backend="reference")
    few = generate(gpt, prompts, max_new_tokens=8, sampling=drawn, backend="reference", max_batch=2, num_pages=24)
    assert many == few
    other = Sampling(temperature=0.8, top_p=0.9, top_k=50, seed=6)
    assert many != generate(gpt, prompts, max_new_tokens=8, sampling=other, backend="reference")


def test_requests_come_stop_and_go(gpt, prompts, wanted):
    engine = Engine(gpt, num_pages=40, page_size=4, max_batch=4, max_step_tokens=32, backend="reference")
    stop = wanted[3][2]
    until = wanted[3][: wanted[3].index(stop) + 1]
    engine.add_request(3, prompts[3], max_new_tokens=8, sampling=GREEDY, stop=[stop])
    engine.add_request(4, prompts[4], max_new_tokens=8, sampling=GREEDY)
    crowd = [1] * 96
    assert Engine(gpt, num_pages=40, page_size=4, backend="reference").fits(crowd, 8)
    assert not engine.fits(crowd, 8)  # the pages of those that wait are theirs
    found = {3: [], 4: []}
    while engine.running > 1:
        for token in engine.step():
            found[token.id].append(token)
    assert [t.token for t in found[3]] == until
    assert [t.finished for t in found[3]] == [None] * (len(until) - 1) + ["stop"]
    assert engine.fits(prompts[1], 4)
    engine.cancel(4)
    engine.cancel(99)
    assert engine.running == 0 and engine.step() == [] and engine.free_pages == engine.num_pages
    engine.add_request(4, prompts[4], max_new_tokens=2, sampling=GREEDY)
    tokens = [t for _ in range(9) for t in engine.step()]
    assert [(t.token, t.finished) for t in tokens] == [(wanted[4][0], None), (wanted[4][1], "length")]


def test_a_prompt_seen_before_is_not_computed_again(gpt, prompts, wanted):
    engine = Engine(gpt, page_size=4, max_step_tokens=64, backend="reference")
    fed = []
    begin = engine._cache.begin
    engine._cache.begin = lambda parts: fed.append(sum(len(p.tokens) for p in parts)) or begin(parts)
    for i, p in ((4, prompts[4]), (7, prompts[7])):
        engine.add_request(i, p, max_new_tokens=1, sampling=GREEDY)
        assert [t.token for t in engine.step()] == wanted[i][:1]
    assert fed == [60, 1]  # 48 of the 49 tokens lie in full pages


def test_refusals(gpt):
    engine = Engine(gpt, num_pages=4, page_size=8, backend="reference")
    good = {"max_new_tokens": 4}
    engine.add_request(0, [1, 2], **good)
    for id, prompt, more, rule in (
        (0, [1], good, "id must not be in use"), (1, [], good, "must have a token"), (1, [256], good, "from 0 to 255, got 256"),
        (1, [1] * 30, good, "must be 32 at most"), (1, [1], {"max_new_tokens": 0}, "one of them new"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rule):
            engine.add_request(id, prompt, **more)
    with pytest.raises(ValueError, match="max_step_tokens at least max_batch"):
        Engine(gpt, max_batch=8, max_step_tokens=4)
    with pytest.raises(ValueError, match="causal language model"):
        Engine(nn.Linear(2, 2))
    for more, rule in (({"temperature": -1}, "temperature"), ({"top_k": 0}, "top_k"), ({"top_p": 0}, "top_p")):
        with pytest.raises(ValueError, match=rule):
            Sampling(**more)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_pages_are_neither_lost_nor_given_twice(data):
    """Random requests; a model of the cache says which tokens each page must hold."""
    pages = Pages(data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3)))
    size = pages.page_size
    inside, content = [], {}
    for _ in range(data.draw(st.integers(1, 25))):
        if inside and data.draw(st.booleans()):
            held, tokens = inside.pop(data.draw(st.integers(0, len(inside) - 1)))
            pages.close(held)
            continue
        tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=10))
        need, free = pages.need(tokens), pages.free
        held, cached = pages.open(tokens)
        assert cached < len(tokens) and cached % size == 0
        assert [content[p] for p in held.pages] == [tuple(tokens[i : i + size]) for i in range(0, cached, size)]
        try:
            pages.grow(held, len(tokens))
        except OutOfPages:
            assert need > free
            pages.close(held)
            continue
        assert need <= free and pages.free == free - need
        for i, page in enumerate(held.pages):
            if i * size >= cached:
                # A page that others read is not written.
                assert all(page not in other.pages for other, _ in inside)
                content[page] = tuple(tokens[i * size : (i + 1) * size])
        pages.keep(held, tokens)
        inside.append((held, tokens))
    for held, _ in inside:
        pages.close(held)
    assert pages.free == pages.num_pages
