"""4-bit keys and values: the formulas against NumPy's, the Triton twin against the formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_interpreter import interpreter

from trainkit.kernels._kv4 import KV4, kv4_bytes, kv4_decode, kv4_empty, kv4_encode


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 1 << 30), st.floats(1e-6, 1e4), st.floats(-1e4, 1e4))
def test_every_number_comes_back_within_half_a_step(rows, half, seed, spread, offset):
    x = np.random.default_rng(seed).normal(offset, spread, (rows, 2 * half)).astype(np.float32)
    kv = kv4_encode(torch.from_numpy(x))
    step, low = kv.affine.double().numpy()[..., 0], kv.affine.double().numpy()[..., 1]
    codes = np.concatenate([kv.codes.numpy() % 16, kv.codes.numpy() // 16], -1)
    back = codes * step[:, None] + low[:, None]
    # Half a step, and what rounding step and low to 11 bits may move the ends.
    bound = 0.5 * step[:, None] + 2.0**-11 * (15 * step[:, None] + abs(low)[:, None]) + 1e-6
    assert (abs(back - x) <= bound).all()
    assert np.allclose(kv4_decode(kv, torch.float32).numpy(), back, rtol=1e-6, atol=1e-30)


def test_sizes_and_refusals():
    kv = kv4_empty(3, 2, 128)
    assert kv.codes.shape == (3, 2, 64) and kv.affine.shape == (3, 2, 2)
    assert kv4_bytes(128) * 8 / 128 == 4.25
    with pytest.raises(ValueError, match="even head dimension, got 5"):
        kv4_encode(torch.ones(1, 5))
    with pytest.raises(ValueError, match="even head dimension, got 7"):
        kv4_empty(2, 7)
    broken = kv4_decode(kv4_encode(torch.tensor([[1.0, float("nan"), 2.0, 3.0]])))
    assert broken.isnan().any()
    assert kv4_decode(kv4_encode(torch.full((2, 4), 3.0)), torch.float32).eq(3).all()
    assert kv4_decode(kv4_encode(torch.tensor([[1e30, -1e30]])), torch.float32).isfinite().all()


@pytest.mark.parametrize(("half", "dtype"), [(64, torch.float16), (20, torch.float32), (8, torch.bfloat16)])
def test_triton_gives_the_same_codes(half, dtype):
    import triton

    from trainkit.kernels import _kv4_kernels as kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = (torch.randn(37, 2 * half, generator=torch.Generator().manual_seed(1)) * 3 + 1).to(device, dtype)
    want = kv4_encode(x)
    got = KV4(torch.empty_like(want.codes), torch.empty_like(want.affine))
    with interpreter():
        kernels.encode_rows[(-(-37 // 8),)](
            x, *got, 37, HALF=half, BLOCK=triton.next_power_of_2(half), R=8, enable_fp_fusion=False
        )
    assert torch.equal(got.codes, want.codes) and torch.equal(got.affine, want.affine)
