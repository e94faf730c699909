"""Sampling: the kernel against sorting, draw for draw; and both against the distribution."""

import pytest
import torch
from kernels_interpreter import interpreter

from trainkit.kernels import sample
from trainkit.kernels.fused._sample import reference


def test_the_kernel_draws_what_sorting_draws():
    if torch.cuda.is_available():
        pytest.skip("on Triton's interpreter")
    g = torch.Generator().manual_seed(0)
    rows, vocab = 12, 150
    logits = torch.randn(rows, vocab, generator=g) * 3
    logits[3, :100] = -torch.inf
    numbers = {
        "temperature": torch.tensor([0.0, 1.0, 0.7, 2.0] * 3), "top_k": torch.tensor([0, 0, 5, 40, 1, 400] * 2).int(),
        "top_p": torch.tensor([1.0, 0.9, 0.3, 0.99, 1e-3, 0.5] * 2), "min_p": torch.tensor([0, 0, 0.1, 0.02, 0, 0.5] * 2),
        "seed": torch.arange(rows), "step": torch.arange(rows) * 7,
    }  # fmt: skip
    with interpreter():
        drawn = sample(logits, **numbers)
    assert torch.equal(drawn, reference(logits, *numbers.values()))
    assert drawn[0] == logits[0].argmax()


def test_the_distribution():
    n = 20_000
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5]]).double()
    steps = torch.arange(n)
    p = logits[0].div(0.8).softmax(0)
    for top_k, top_p, min_p, kept in (
        (None, 1.0, 0.0, range(5)), (3, 1.0, 0.0, (0, 1, 4)), (None, 0.8, 0.0, (0, 1)), (None, 1.0, 0.1, (0, 1, 4)),
    ):  # fmt: skip
        drawn = sample(logits.expand(n, 5), temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p, step=steps, seed=3)
        share = torch.bincount(drawn, minlength=5) / n
        want = torch.zeros(5).double()
        want[list(kept)] = p[list(kept)] / p[list(kept)].sum()
        # Five standard deviations of 20,000 draws at most.
        assert (share - want).abs().max() < 5 * (0.25 / n) ** 0.5


def test_refusals():
    for more, rule in (({"top_p": 0.0}, "top_p"), ({"temperature": -1.0}, "temperature"), ({"min_p": 2.0}, "min_p")):
        with pytest.raises(ValueError, match=rule):
            sample(torch.zeros(2, 3), **more)
    with pytest.raises(ValueError, match="rows, vocab"):
        sample(torch.zeros(3))
