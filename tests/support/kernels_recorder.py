"""Launches recorded instead of run: Triton's own argument checks, specialization and launcher, up to the call into CUDA."""

import ctypes
import itertools
import re
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver
from triton.runtime.jit import JITFunction

DEVICES = itertools.count(77)
"""One for each recorder: Triton keeps what it compiled by device."""


class Recorder:
    """While it is active every launch ends in `launches`, as what CUDA would have been asked for."""

    def __init__(self, patch):
        device = next(DEVICES)
        self.launches, self.by_triton, self.functions, self.scratch = [], 0, {}, 0
        run = JITFunction.run

        def counted(*arguments, **named):
            self.by_triton += 1
            return run(*arguments, **named)

        patch.setattr(JITFunction, "run", counted)
        patch.setattr(JITFunction, "_do_compile", lambda kernel, *how: self.compiled(kernel, *how))
        patch.setattr(nvidia, "compile_module_from_src", lambda **_: SimpleNamespace(launch=self.record))
        patch.setattr(nvidia, "library_dirs", lambda: [])
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 5, raising=False)
        patch.setattr(torch.cuda, "current_device", lambda: device)
        active = SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: device,
            get_current_stream=lambda device: 5, utils=SimpleNamespace(fill_tma_descriptor=self.encoded),
        )  # fmt: skip
        patch.setattr(driver, "_active", active)

    def compiled(self, kernel, key, signature, device, constexprs, options, attrs, warmup):
        """What Triton keeps of a compiled kernel, as far as launching goes; its `function` numbers the specialization."""
        boxes = [x for x in signature.values() if isinstance(x, str) and x.startswith("tensordesc")]
        metadata = SimpleNamespace(
            num_ctas=1, launch_cooperative_grid=False, launch_pdl=False, global_scratch_size=self.scratch,
            global_scratch_align=1, profile_scratch_size=0, profile_scratch_align=1,
            tensordesc_meta=[box_metadata(x) for x in boxes] or None,
        )  # fmt: skip
        compiled = kernel.device_caches[device][0][key] = SimpleNamespace(
            run=nvidia.CudaLauncher(kernel.ASTSource(kernel, signature, constexprs, attrs), metadata),
            function=self.functions.setdefault((kernel.__name__, key), len(self.functions)),
            packed_metadata=(4, 1, 0), metadata=metadata, launch_metadata=lambda *_: None,
        )  # fmt: skip
        return compiled

    def encoded(self, address, *how):
        return ("map", word(address), address, *(tuple(x) if isinstance(x, list) else x for x in how))

    def record(self, *arguments):
        # What Triton tells profilers aside, which kept launches do not call.
        self.launches.append([word_of(x) for x in (*arguments[:10], *arguments[13:])])


def box_metadata(signature):
    """What the compiler says of a descriptor, as far as its type tells."""
    kind, sizes = re.match(r"tensordesc<(\w+)\[([\d, ]+)\]", signature).groups()
    return {
        "swizzle": hash(signature) % 1000, "elem_size": 4 if kind == "fp32" else 2, "elem_type": len(kind),
        "block_size": [int(n) for n in sizes.split(",")], "fp4_padded": False,
    }  # fmt: skip


def word(address):
    """The first four bytes there: who lies at an address that was made up during the call."""
    return ctypes.string_at(address, 4).hex() if address else None


class Address(tuple):
    """(where, what is there): an argument that was a tensor or a number in its place."""


def word_of(x):
    if isinstance(x, torch.Tensor):
        x = x.data_ptr()
    if isinstance(x, int) and not isinstance(x, bool) and x > 1 << 32:
        return Address((x, word(x)))
    return tuple(word_of(y) for y in x) if type(x) is tuple and x[:1] != ("map",) else x
