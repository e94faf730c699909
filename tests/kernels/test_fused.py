"""The fused kernels, on Triton's interpreter, against their formulas: outputs and every gradient."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed: pip install 'triton>=3.6'")

from kernels_interpreter import interpreter

from trainkit.kernels import linear_cross_entropy, rms_norm, rope, swiglu
from trainkit.kernels.fused import _loss, _rms_norm, _rope, _swiglu
from trainkit.kernels.fused._loss_chunks import Layer, Loss


@pytest.fixture(autouse=True)
def kernels():
    if torch.cuda.is_available():
        yield
    else:
        with interpreter():
            yield


def leaves(*shapes, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [torch.randn(s, generator=g).to(device, dtype).requires_grad_() for s in shapes]


def compare(fused, formula, inputs, bound):
    """Against the formula in fp64."""
    out = fused(*inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = formula(*exact)
    weights = torch.sin(torch.arange(out.numel(), device=out.device)).view(out.shape)
    grads = torch.autograd.grad((out.float() * weights).sum(), inputs)
    wants = torch.autograd.grad((want * weights).sum(), exact)
    for ours, theirs in zip((out, *grads), (want, *wants), strict=True):
        assert (ours.double() - theirs).abs().max() <= bound * theirs.abs().max().clamp(min=1)
    assert out.dtype == inputs[0].dtype or out.dim() == 0


BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_rms_norm(dtype):
    x, w = leaves((3, 5, 33), (33,), dtype=dtype)
    compare(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: _rms_norm.reference(x, w, 1e-5), [x, w], BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_swiglu(dtype):
    compare(swiglu, _swiglu.reference, leaves((3, 7, 11), (3, 7, 11), dtype=dtype), BOUNDS[dtype])
    a, b = leaves((5, 6, 8), (6, 5, 8), dtype=dtype)
    compare(
        lambda a, b: swiglu(a, b.transpose(0, 1)),
        lambda a, b: _swiglu.reference(a, b.transpose(0, 1)),
        [a, b],
        BOUNDS[dtype],
    )


def test_swiglu_of_one_tensor():
    (x,) = leaves((3, 7, 22))
    compare(swiglu, lambda x: _swiglu.reference(*x.chunk(2, -1)), [x], 1e-5)
    torch.library.opcheck(torch.ops.trainkit.swiglu, (x,))
    assert swiglu(torch.zeros(0, 4)).shape == (0, 2)


@pytest.mark.parametrize("batched", [False, True])
def test_rope(batched):
    angles = torch.rand(*((2,) if batched else ()), 5, 3) * 6
    (x,) = leaves((2, 5, 3, 6))
    cos, sin = angles.cos().to(x.device), angles.sin().to(x.device)
    compare(lambda x: rope(x, cos, sin), lambda x: _rope.reference(x, cos, sin), [x], 1e-5)
    (y,) = leaves((2, 3, 5, 6))
    compare(
        lambda y: rope(y.transpose(1, 2), cos, sin), lambda y: _rope.reference(y.transpose(1, 2), cos, sin), [y], 1e-5
    )


@pytest.mark.parametrize("chunk", [3, 100])
@pytest.mark.parametrize("vocabulary", [7, 130])
def test_linear_cross_entropy(vocabulary, chunk):
    x, w = leaves((2, 5, 9), (vocabulary, 9))
    target = torch.randint(vocabulary, (2, 5), device=x.device)
    target[0, 1] = target[1, 4] = -100
    formula = lambda x, w: F.cross_entropy(x.flatten(0, 1) @ w.T, target.flatten())  # noqa: E731
    compare(lambda x, w: linear_cross_entropy(x, w, target, chunk=chunk), formula, [x, w], 1e-5)


def test_loss_without_counted_targets_is_zero_and_wrong_ones_are_not_hidden():
    x, w = leaves((4, 8), (6, 8))
    nothing = torch.full((4,), -100, device=x.device)
    loss = linear_cross_entropy(x, w, nothing)
    assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, (x, w)))
    assert linear_cross_entropy(x, w, torch.full((4,), 6, device=x.device)).isnan()


def truth(x, w, b, target, reduction="mean", class_weights=None, label_smoothing=0.0, z_loss=0.0, softcap=None):
    """The loss in fp64, term by term."""
    logits = x @ w.T + (0 if b is None else b)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    lse = logits.logsumexp(-1)
    counted = target != -100
    weights = logits.new_ones(w.shape[0]) if class_weights is None else class_weights.to(logits.dtype)
    y = target.clamp(min=0)
    own = weights[y] * (lse - logits.gather(-1, y[..., None])[..., 0])
    spread = (weights * (lse[..., None] - logits)).mean(-1)
    loss = torch.where(counted, (1 - label_smoothing) * own + label_smoothing * spread, 0)
    z = torch.where(counted, z_loss * lse.square(), 0)
    if reduction == "mean":
        return loss.sum() / weights[y][counted].sum() + z.sum() / counted.sum()
    return loss + z if reduction == "none" else (loss + z).sum()


LOSSES = {
    "none": {"reduction": "none"},
    "sum, bias": {"reduction": "sum", "bias": True},
    "smoothing": {"label_smoothing": 0.2},
    "z-loss": {"z_loss": 0.1},
    "soft cap": {"softcap": 1.5},
    "class weights": {"class_weights": True},
    "everything": {
        "bias": True, "class_weights": True, "label_smoothing": 0.1, "z_loss": 0.05, "softcap": 2.0,
    },
    "everything, none": {
        "bias": True, "class_weights": True, "label_smoothing": 0.1, "z_loss": 0.05, "softcap": 2.0, "reduction": "none",
    },
}  # fmt: skip


@pytest.mark.parametrize("vocabulary", [7, 130])
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_as_others_define_it(name, vocabulary):
    options = dict(LOSSES[name])
    x, w, b = leaves((2, 5, 9), (vocabulary, 9), (vocabulary,))
    b = b if options.pop("bias", False) else None
    if "class_weights" in options:
        options["class_weights"] = torch.rand(vocabulary, device=x.device) + 0.1
    target = torch.randint(vocabulary, (2, 5), device=x.device)
    target[0, 1] = target[1, 4] = -100
    given = [t for t in (x, w, b) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in given]
    got = linear_cross_entropy(x, w, target, bias=b, chunk=3, **options)
    want = truth(*exact, *([None] if b is None else []), target, **options)
    assert got.shape == want.shape and got.dtype == torch.float32
    # A GPU's exponential is right to 2**-22.
    loose = 1e-5 if x.is_cuda else 2e-6
    torch.testing.assert_close(got.double(), want, rtol=loose, atol=loose)
    g = torch.rand(got.shape, device=x.device)
    grads = zip(torch.autograd.grad(got, given, g), torch.autograd.grad(want, exact, g.double()), strict=True)
    for mine, right in grads:
        torch.testing.assert_close(mine.double(), right, rtol=5 * loose, atol=loose)
    plain = _loss.reference(
        Layer(exact[0].flatten(0, 1), exact[1], exact[2] if b is not None else None),
        Loss(
            target.flatten(), options.get("class_weights"), -100, options.get("label_smoothing", 0.0),
            options.get("z_loss", 0.0), options.get("softcap"), "reduction" not in options, 3,
        ),
        options.get("reduction", "mean"),
    )  # fmt: skip
    torch.testing.assert_close(plain.view(want.shape), want, rtol=1e-6, atol=1e-6)


def test_the_loss_as_an_operator():
    x, w = leaves((10, 9), (130, 9))
    target = torch.randint(130, (10,), device=x.device)
    formula = lambda x, w: F.cross_entropy(x @ w.T, target)  # noqa: E731
    given = (None, target, None, -100, 0.0, 0.0, None)
    operator = torch.ops.trainkit.linear_cross_entropy
    compare(lambda x, w: operator(x, w, *given, True, 4, [True, True, False])[0], formula, [x, w], 1e-5)
    torch.library.opcheck(operator, (x.detach(), w.detach(), *given, True, 4, [True, False, False]))
    rows = torch.ops.trainkit.linear_cross_entropy_rows
    compare(lambda x, w: rows(x, w, *given, 4, None, [False] * 3)[0].mean(), formula, [x, w], 1e-5)
    torch.library.opcheck(rows, (x, w, *given, 4, None, [False] * 3))


def test_a_weight_that_changed_before_backward_is_noticed():
    x, w = leaves((4, 8), (6, 8))
    loss = linear_cross_entropy(x, w, torch.zeros(4, dtype=torch.int64, device=x.device))
    with torch.no_grad():
        w.mul_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_keeps_the_loss_in_fp32():
    x, w = leaves((4, 8), (6, 8))
    target = torch.tensor([0, 5, 2, -100], device=x.device)
    for given in (x, x.detach().bfloat16().requires_grad_()):
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = linear_cross_entropy(given, w, target)
        assert loss.dtype == torch.float32
        grads = torch.autograd.grad(loss, (given, w))
        assert [g.dtype for g in grads] == [given.dtype, w.dtype]
        torch.testing.assert_close(loss, F.cross_entropy(x @ w.T, target), rtol=2e-2, atol=2e-2)


def test_bad_input():
    x = torch.zeros(4, 8)
    with pytest.raises(ValueError, match=r"weight must be \[8\].*\[4\]"):
        rms_norm(x, torch.ones(4))
    with pytest.raises(ValueError, match=r"share shape and dtype.*\[4, 8\].*\[8\]"):
        swiglu(x, torch.ones(8))
    with pytest.raises(ValueError, match=r"even last dimension.*\[4, 7\]"):
        swiglu(torch.ones(4, 7))
    with pytest.raises(ValueError, match="even head_dim"):
        rope(torch.zeros(1, 2, 3, 5), x, x)
    with pytest.raises(ValueError, match=r"cos and sin must be \[2, 2\]"):
        rope(torch.zeros(1, 2, 3, 4), x, x)
    with pytest.raises(ValueError, match=r"\[\.\.\., N\].*\[4, 8\], \[6, 7\]"):
        linear_cross_entropy(x, torch.ones(6, 7), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"target must be int64.*int32"):
        linear_cross_entropy(x, torch.ones(6, 8), torch.zeros(4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"chunk.*got 0"):
        linear_cross_entropy(x, torch.ones(6, 8), torch.zeros(4, dtype=torch.int64), chunk=0)
