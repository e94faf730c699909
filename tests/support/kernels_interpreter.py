"""Triton's CPU interpreter made right for bf16: tests only.

It multiplies bf16 as raw 16-bit patterns, and truncates where the GPU rounds to nearest even. Here every bf16 operand
is widened to fp32 before arithmetic, and every bf16 result rounded.
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install 'triton>=3.6'")


def _widen(bits):
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def _round(x):
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    rounded = ((bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _patches():
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder as Builder
    from triton.runtime.interpreter import TensorHandle

    def is_bf16(x):
        return x.dtype.scalar == tl.bfloat16

    def wide(x):
        return TensorHandle(_widen(x.data), tl.float32) if is_bf16(x) else x

    def narrow(x):
        return TensorHandle(_round(x), tl.bfloat16)

    dot, binary, unary, cast = Builder.create_dot, Builder.binary_op, Builder.unary_op, Builder.cast_impl
    bitwise = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)

    def create_dot(self, a, b, d, *rest, **named):
        return dot(self, wide(a), wide(b), d, *rest, **named)

    def binary_op(self, a, b, op):
        if not is_bf16(a) or op in bitwise:
            return binary(self, a, b, op)
        out = op(_widen(a.data), _widen(b.data))
        return TensorHandle(out, tl.int1) if out.dtype == bool else narrow(out)

    def unary_op(self, a, op):
        return narrow(op(_widen(a.data))) if is_bf16(a) else unary(self, a, op)

    def cast_impl(self, x, to):
        source, target = x.dtype.scalar, to.scalar
        if source == target or tl.bfloat16 not in (source, target):
            return cast(self, x, to)
        if target == tl.bfloat16:
            return narrow(x.data.astype(np.float32))
        return wide(x) if target == tl.float32 else cast(self, wide(x), to)

    between_floats = Builder.create_fp_to_fp

    def create_fp_to_fp(self, x, to, rounding):
        if to.scalar != tl.float8e4nv or x.dtype.scalar not in (tl.float32, tl.float16):
            return between_floats(self, x, to, rounding)
        # It truncates here too.
        rounded = torch.from_numpy(x.data.astype(np.float32)).to(torch.float8_e4m3fn)
        return TensorHandle(rounded.view(torch.uint8).numpy(), to.scalar)

    changed = {
        "create_fp_to_fp": create_fp_to_fp,
        "create_dot": create_dot,
        "binary_op": binary_op,
        "unary_op": unary_op,
        "cast_impl": cast_impl,
        "get_bf16": lambda self, x: narrow(np.array([x], dtype=np.float32)),
    }
    for name in ("create_fp_ext", "create_fp_trunc", "create_si_to_fp", "create_ui_to_fp", "create_fp_to_si",
                 "create_fp_to_ui", "create_int_cast"):  # fmt: skip
        if hasattr(Builder, name):
            changed[name] = lambda self, x, to, *rest: self.cast_impl(x, to)
    return Builder, changed


@contextmanager
def interpreter():
    """Within: kernels decorated here run on the CPU, and bf16 is what it is on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        builder, changed = _patches()
        for name, function in changed.items():
            patch.setattr(builder, name, function, raising=False)
        yield
