"""Packed products on Triton's interpreter (or a GPU) against whole numbers, and packing against NumPy's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed: pip install 'triton>=3.6'")

from kernels_interpreter import interpreter

from trainkit.kernels.lowbit._activation import Norm, Recipe, quantise, reference
from trainkit.kernels.lowbit._packing import pack, unpack
from trainkit.kernels.lowbit._product import Weight4, by_reference, product4, product8
from trainkit.kernels.lowbit._reference import Quantised
from trainkit.kernels.lowbit._tuned import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def kernels():
    if torch.cuda.is_available():
        yield
    else:
        with interpreter():
            yield


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def whole(low, high, *shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=g).to(DEVICE, torch.int8)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 1 << 30))
def test_packing_round_trip(rows, blocks, seed):
    codes = np.random.default_rng(seed).integers(-7, 8, (rows, 128 * blocks)).astype(np.int8)
    packed = pack(torch.from_numpy(codes)).numpy()
    assert packed.shape == (blocks, rows, 64) and packed.dtype == np.uint8
    assert np.array_equal(unpack(torch.from_numpy(packed)).numpy(), codes)
    # A nibble's bits in a byte's places are the e4m3 number: code / 512.
    low = torch.from_numpy((packed & 7) | (packed & 8) << 4).view(torch.float8_e4m3fn).float()
    assert np.array_equal(low.numpy() * 512, codes.reshape(rows, blocks, 2, 64)[:, :, 0].transpose(1, 0, 2))


def test_packing_refuses():
    with pytest.raises(ValueError, match="multiple of 128 channels, got 100"):
        pack(torch.zeros(2, 100, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"-7..7, got 8"):
        pack(torch.full((2, 128), 8, dtype=torch.int8))


def powers(*shape, seed):
    """Scales 1 and 2: all totals stay whole numbers below 2^24."""
    return 2.0 ** whole(0, 1, *shape, seed=seed).float()


TILES = [Tile(16, 64, 1, 2, 4, 8), Tile(16, 64, 2, 2, 4, 8, 2)]


@pytest.mark.parametrize("tile", TILES, ids=["whole", "split"])
@pytest.mark.parametrize(("group", "outliers"), [(128, 0), (128, 80), (64, 16), (32, 16)])
@pytest.mark.parametrize("worst", [False, True])
def test_integer_path_is_exact(group, outliers, tile, worst):
    """Codes given: every group's sum, the outliers', and their scaled total are whole numbers that fp32 holds."""
    m, n, k = 19, 70, 384
    if worst:
        x, w, xo, wo = (
            whole(-8, -8, m, k),
            whole(7, 7, n, k),
            whole(127, 127, m, outliers),
            whole(-127, -127, n, outliers),
        )
        x[:, ::2], w[::3] = 7, -7
    else:
        x, w = whole(-8, 7, m, k), whole(-7, 7, n, k, seed=1)
        xo, wo = whole(-127, 127, m, outliers, seed=2), whole(-127, 127, n, outliers, seed=3)
    sx, sw, sxo, swo = (powers(*s, seed=4) for s in ((k // group, m), (k // group, n), (m,), (n,)))
    weight = Weight4(pack(w), sw.bfloat16(), wo if outliers else None, swo.bfloat16() if outliers else None)
    quantised = Quantised(x.float().to(torch.float8_e4m3fn), sx, xo if outliers else None, sxo if outliers else None)
    recipe = Recipe("int4", k + outliers, group, outliers)
    got = product4(quantised, weight, recipe=recipe, group=group, channels=k + outliers, dtype=torch.float32, tile=tile)
    grouped = [a.cpu().double().unflatten(1, (-1, group)) for a in (x, w)]
    want = torch.einsum("mgk,ngk,gm,gn->mn", *grouped, sx.cpu().double(), sw.cpu().double())
    want += (xo.cpu().double() @ wo.cpu().double().t()) * sxo.cpu()[:, None] * swo.cpu()
    assert torch.equal(got.cpu().double(), want)


ORDERS = ["own", "shuffled"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("front", ["", "norm", "gate"])
def test_activation_codes_are_the_formulas(kind, front, order):
    channels, m = 208, 5
    recipe = Recipe(
        kind, channels, 64, 16 if kind == "int4" and order == "shuffled" else 0, 0.9 if kind == "int4" else 1.0
    )
    places = None
    if order == "shuffled":
        places = torch.full((recipe.main + recipe.outliers,), -1, dtype=torch.int32, device=DEVICE)
        shuffled = torch.randperm(channels, generator=torch.Generator().manual_seed(3)).int()
        places[: channels - recipe.outliers] = shuffled[recipe.outliers :].to(DEVICE)
        if recipe.outliers:
            places[recipe.main :] = shuffled[: recipe.outliers].to(DEVICE)
    x, up = random(2, m, channels, dtype=torch.bfloat16)
    norm = Norm(random(channels, seed=1, dtype=torch.bfloat16), 1e-5) if front == "norm" else None
    got, kept = quantise(x, recipe, places, norm=norm, up=up if front == "gate" else None, keep=True)
    # What the codes are of is what the kernel itself kept: sums of squares differ in their last bit by their order.
    want = reference(kept, recipe, places)
    if front == "gate":
        assert (got.codes.float() - want.codes.float()).abs().max() <= (1 if kind != "fp8" else 32)
    else:
        assert torch.equal(got.codes.float(), want.codes.float())
        assert torch.equal(got.scales, want.scales)
    if recipe.outliers:
        assert (got.outliers.int() - want.outliers.int()).abs().max() <= (front == "gate")


@pytest.mark.parametrize("outliers", [0, 80])
def test_a_layer_from_its_16_bit_input(outliers):
    """Reordering, quantising, both blocks and the bias, against the reference in whole numbers."""
    m, n, channels, group = 3, 66, 336, 128
    recipe = Recipe("int4", channels, group, outliers)
    order = None
    if outliers:
        order = torch.full((recipe.main + outliers,), -1, dtype=torch.int32, device=DEVICE)
        shuffled = torch.randperm(channels, generator=torch.Generator().manual_seed(3)).int().to(DEVICE)
        order[: channels - outliers], order[recipe.main :] = shuffled[outliers:], shuffled[:outliers]
    weight = Weight4(
        pack(whole(-7, 7, n, recipe.main)), powers(recipe.main // group, n, seed=5).bfloat16(),
        *((whole(-127, 127, n, outliers, seed=6), powers(n, seed=7).bfloat16()) if outliers else ()),
    )  # fmt: skip
    x, bias = random(m, channels, dtype=torch.float16), random(n, seed=9)
    on_cpu = Weight4(*(None if t is None else t.cpu() for t in weight))
    codes = reference(x.cpu(), recipe, None if order is None else order.cpu())
    want = by_reference(codes, on_cpu, bias.cpu(), torch.float32)
    for split, unroll in ((1, 1), (2, 1), (1, 2), (2, 2)):
        got = product4(quantise(x, recipe, order)[0], weight, recipe=recipe, group=group, channels=channels, bias=bias,
                       dtype=torch.float32, tile=Tile(16, 64, split, 2, 4, 8, unroll))  # fmt: skip
        torch.testing.assert_close(got.cpu(), want, rtol=2e-6, atol=2e-4)


@pytest.mark.parametrize("group", [128, 32])
@pytest.mark.parametrize("kind", ["16", "fp8"])
def test_wider_activations(kind, group):
    m, n, channels = 5, 40, 200
    w = whole(-7, 7, n, 256)
    w[:, channels:] = 0
    weight = Weight4(pack(w), powers(256 // group, n, seed=5).bfloat16())
    x = random(m, channels, dtype=torch.float16)
    recipe = None if kind == "16" else Recipe("fp8", channels, 0)
    given = x if recipe is None else quantise(x, recipe, None)[0]
    got = product4(given, weight, recipe=recipe, group=group, channels=channels, dtype=torch.float16)
    dense = (w.double().unflatten(1, (-1, group)) * weight.scales.double().t()[:, :, None]).flatten(1)[:, :channels]
    if recipe is not None:
        q = reference(x, recipe, None)
        x = (q.codes.double() * q.scales[0, :, None].double())[:, :channels]
    want = x.double() @ dense.t()
    assert (got.double() - want).abs().max() <= 2e-3 * want.abs().max()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_eight_bits(kind):
    m, n, k = 18, 70, 256
    x, w = whole(-127, 127, m, k), whole(-127, 127, n, k, seed=1)
    if kind == "fp8":
        x, w = (a.float().div(16).round().to(torch.float8_e4m3fn) for a in (x, w))
    sx, sw = powers(1, m, seed=2), powers(n, seed=3)
    got = product8(Quantised(x, sx), w, sw, dtype=torch.float32)
    want = (x.cpu().double() @ w.cpu().double().t()) * sx.cpu().double().t() * sw.cpu().double()
    assert torch.equal(got.cpu().double(), want)


def test_not_a_number_stays_one():
    weight = Weight4(pack(whole(-7, 7, 8, 128)), powers(1, 8, seed=1).bfloat16())
    x = random(3, 128)
    x[1, 5] = float("nan")
    recipe = Recipe("int4", 128, 128)
    y = product4(quantise(x, recipe, None)[0], weight, recipe=recipe, group=128, channels=128, dtype=x.dtype)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
