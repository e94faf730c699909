"""The Triton path, on Triton's CPU interpreter, against the reference: outputs, lse and every gradient."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'triton>=3.6'")

from kernels_interpreter import interpreter

from trainkit.kernels import attention


@pytest.fixture(autouse=True)
def interpreted():
    if torch.cuda.is_available():
        pytest.skip("with a GPU the kernels are tested on it: tests/kernels/test_gpu.py")
    with interpreter():
        yield


def compare(sizes, *, B=1, Hq=2, Hkv=1, D=16, Dv=16, dtype=torch.float32, bound=1e-5, lse=True, learned=(), **options):
    """Run both paths; every result and gradient must agree relative to the reference's largest value."""
    g = torch.Generator().manual_seed(0)
    shapes = (B, sizes[0], Hq, D), (B, sizes[1], Hkv, D), (B, sizes[1], Hkv, Dv)
    leaves = [torch.randn(s, generator=g).to(dtype).requires_grad_() for s in shapes]
    wanted = [*leaves, *learned]
    results = []
    for backend in ("triton", "reference"):
        got = attention(*leaves, backend=backend, return_lse=lse, **options)
        out, stats = got if lse else (got, None)
        loss = (out.float() * torch.sin(torch.arange(out.numel())).view(out.shape)).sum()
        if lse:
            loss = loss + torch.where(stats.isfinite(), stats, 0).cos().sum()
            out = torch.cat([out.flatten(), stats.flatten()])
        results.append((out, *torch.autograd.grad(loss, wanted)))
    for got, want in zip(*results, strict=True):
        finite = want.isfinite()
        assert torch.equal(finite, got.isfinite())
        assert (got - want)[finite].abs().max() <= bound * max(1.0, want[finite].abs().max().item())


TABLE = torch.linspace(-1, 1, 4 * 64).view(4, 64).requires_grad_()
SCALE = torch.tensor(0.7, requires_grad=True)
DOC = torch.arange(64) // 20


def cumulative(*lengths):
    # Of two columns, one: the kernels must not read it as if it were dense.
    return torch.tensor([0, *lengths]).cumsum(0).int()[:, None].expand(-1, 2).contiguous()[:, 0]


CASES = {
    "plain": ((33, 50), {"Hq": 4, "Hkv": 2}),
    "causal": ((70, 70), {"causal": True}),
    "causal, MQA, odd heads": ((17, 75), {"causal": True, "Hq": 4, "D": 24, "Dv": 40, "B": 2}),
    "rows without keys": ((75, 20), {"causal": True}),
    "one": ((1, 1), {"Hq": 1, "Hkv": 1}),
    "window": ((70, 90), {"window": 20}),
    "causal window": ((100, 90), {"window": 20, "causal": True}),
    "soft cap": ((40, 35), {"softcap": 1.5}),
    "alibi and sinks": ((20, 40), {"alibi_slopes": torch.rand(2), "sinks": torch.randn(2, 2, requires_grad=True)[:, 0]}),
    "sigmoid": ((40, 33), {"softmax": "sigmoid", "lse": False, "causal": True}),
    "dropout": ((33, 20), {"dropout_p": 0.3, "seed": 2**31 + 5}),
    "packed": ((60, 70), {"cu_seqlens": (cumulative(33, 0, 27), cumulative(20, 10, 40)), "causal": True,
                          "score_mod": lambda s, b, h, q, k: s * (b + 1) + h}),
    "document mask": ((64, 64), {"mask_mod": lambda b, h, q, k: (DOC[q] == DOC[k]) & (q >= k)}),
    "mask by head": ((40, 64), {"mask_mod": lambda b, h, q, k: (DOC[q] == DOC[k]) | (h == 1), "window": 50}),
    "learned tables": ((33, 40), {"score_mod": lambda s, b, h, q, k: s * SCALE + TABLE[h, q - k] + TABLE[h][k // 2] - TABLE[0, 3],
                                  "learned": (TABLE, SCALE)}),
    "bf16": ((40, 50), {"dtype": torch.bfloat16, "bound": 1.2e-2, "causal": True, "softcap": 5.0}),
    "fp16": ((40, 50), {"dtype": torch.float16, "bound": 2e-3, "window": 7}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name):
    sizes, options = CASES[name]
    options = dict(options)
    learned = [x for x in (options.get("sinks"), *options.pop("learned", ())) if x is not None]
    compare(sizes, learned=learned, **options)


SCORES = {
    "arithmetic": lambda s: (s + 2) * 3 / (s * s + 1) - 0.5,
    "powers": lambda s: s**3 + (s * s + 1) ** -0.5 + (s * s + 1).sqrt() + (s.abs() + 1).reciprocal() + s.square(),
    "exponentials": lambda s: torch.exp(s / 4) + torch.log(s * s + 1) + torch.exp2(s / 8) + torch.log2(s * s + 2),
    "squashing": lambda s: torch.tanh(s) + torch.sigmoid(s) + torch.erf(s) + torch.nn.functional.gelu(s),
    "waves": lambda s: s.sin() * s.cos(),
    "corners": lambda s: s.clamp(-1, 0.5) + torch.relu(s) + s.abs() + torch.maximum(s, -s / 2) + s.floor() + s.sign(),
    "choices": lambda s: torch.where((s > 0) & ~(s > 1), s * 2, -s),
}


@pytest.mark.parametrize("name", SCORES)
def test_operations_and_their_derivatives(name):
    compare((17, 20), score_mod=lambda s, b, h, q, k: SCORES[name](s), Hq=1, bound=2e-5)


def test_index_arithmetic_follows_python():
    def mod(s, b, h, q, k):
        gap = q - k
        return s + gap // 3 + gap % 4 * 0.5 + torch.where((gap % 2 == 0) ^ (k > 5), h, b) + (gap.float() / 7) // 2

    compare((20, 33), score_mod=mod, B=2)


REFUSED = {
    "branch": (lambda s, b, h, q, k: s if s > 0 else -s, "score_mod cannot be traced.*torch.where"),
    "no kernel": (lambda s, b, h, q, k: torch.lgamma(s), "aten.lgamma has no kernel.*reference"),
    "whole table": (lambda s, b, h, q, k: s + TABLE[h], r"by element, got \[4, 64\]"),
    "integer power": (lambda s, b, h, q, k: s + 3**h, r"power may be up to 8, or of 2, got 3"),
    "narrow type": (lambda s, b, h, q, k: s.to(torch.bfloat16).float(), "conversion to torch.bfloat16 has no kernel"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_lowered_is_named(name):
    mod, message = REFUSED[name]
    q = torch.randn(1, 4, 4, 16)
    with pytest.raises(ValueError, match=message):
        attention(q, q, q, score_mod=mod, backend="triton")


def test_a_changed_capture_is_seen():
    """Traces are kept by function and captures: what changes must not be served stale."""
    q = torch.randn(1, 8, 2, 16)
    factor, table = 1.0, torch.ones(8)
    for _ in range(3):
        mod = lambda s, b, h, i, j: s * factor + table[i]  # noqa: E731, B023
        got = attention(q, q, q, score_mod=mod, backend="triton")
        torch.testing.assert_close(got, attention(q, q, q, score_mod=mod, backend="reference"))
        factor *= -2.0
        table[3] += 5.0
    mask = lambda b, h, i, j: table[j] > table[3] - 1  # noqa: E731
    for _ in range(2):
        got = attention(q, q, q, mask_mod=mask, backend="triton")
        torch.testing.assert_close(got, attention(q, q, q, mask_mod=mask, backend="reference"))
        table[5] += 100.0


def test_an_index_beyond_its_table_gives_nan_not_a_neighbour():
    q = torch.randn(1, 8, 1, 16)
    narrow = torch.ones(16)[:4]
    out = attention(q, q, q, score_mod=lambda s, b, h, i, j: s + narrow[i], backend="triton")
    assert out[0, :4].isfinite().all() and out[0, 4:].isnan().all()


def test_deterministic_refuses_gradients_by_atomics():
    q = torch.randn(1, 8, 4, 16)
    options = {"score_mod": lambda s, b, h, i, j: s + TABLE[h, i], "deterministic": True}
    with pytest.raises(ValueError, match=r"captured tensors.*atomics.*deterministic=True"):
        attention(q, q, q, backend="triton", **options)
    assert attention(q, q, q, explain=True, **options)[1].path == "reference"


def test_masks_skip_blocks():
    """A block-diagonal mask visits the diagonal's tiles alone, whole ones first."""
    from trainkit.kernels._attention._block_lists import Blocks, lists
    from trainkit.kernels._attention._spec import Spec
    from trainkit.kernels._attention._variant import build

    spec = Spec(scale=1.0, mask_mod=lambda b, h, q, k: q // 64 == k // 64)
    variant = build(spec, torch.device("cpu"))
    wanted = Blocks(variant, spec, 3, 4, 128, 128, 32, 32, torch.device("cpu"), False)
    blocks, counts, full, sb, sh, width = lists(wanted)
    assert (counts.tolist(), full.tolist(), sb, sh, width) == ([[2] * 4], [[2] * 4], 0, 0, 4)
    assert [sorted(row[:2]) for row in blocks[0].tolist()] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert lists(wanted).blocks is blocks
