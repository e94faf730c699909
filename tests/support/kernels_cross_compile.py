"""Compiles a Hopper attention kernel for sm_90 without a GPU and prints what the machine code holds, as JSON.

Run as a program, since Triton must be imported without its interpreter:
    python kernels_cross_compile.py forward|backward HEAD_DIM [causal] [deterministic] [long] [rope] [documents [bits]] [capped]
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path


def spills(sass):
    return len(re.findall(r"\b(?:LDL|STL)\b", sass))


def innermost(sass):
    """The machine code of each loop with products that has none within it; what jumps back unasked is no loop."""
    lines = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    jumps = [(int(m[1], 16), at) for at, text in lines if (m := re.match(r"@.*\bBRA\b.*0x([0-9a-f]+)", text))]
    loops = {
        (first, last): body
        for first, last in jumps
        if "HGMMA" in (body := "\n".join(text for at, text in lines if first <= at <= last))
    }
    return [b for (f, t), b in loops.items() if not any((f, t) != x and f <= x[0] and x[1] <= t for x in loops)]


def inspect(compiled):
    """Registers' overflow and matrix instructions of a compiled kernel."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    return {
        "in loops": max(map(spills, innermost(sass)), default=0),
        "wgmma": len(re.findall(r"\bHGMMA", sass)),
        "waits": len(re.findall(r"\bWARPGROUP\.DEPBAR", sass)),
        "spills": spills(sass),
        "shared": compiled.metadata.shared,
        "tma": "cp.async.bulk.tensor" in compiled.asm["ptx"],
    }


def main():
    os.environ["TRITON_INTERPRET"] = "0"
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from trainkit.kernels._attention import _block_lists, _hopper
    from trainkit.kernels._attention._call import Call
    from trainkit.kernels._attention._spec import Spec
    from trainkit.kernels._attention._variant import build

    class Hopper:
        """As much of a driver as compiling asks for."""

        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    driver.set_active(Hopper())
    found = {}

    def launch(kernel, grid):
        def run(*args, **named):
            found[f"{kernel.__name__}{len(found)}"] = inspect(kernel.warmup(*args, grid=grid, **named))

        return run

    which, width, *flags = sys.argv[1:]
    document = torch.zeros(8192, dtype=torch.int64)
    mask = (lambda b, h, q, k: (document[q] == document[k]) & (q >= k)) if "documents" in flags else None
    cap = 30.0 if "capped" in flags else None
    # The lists of blocks are made by a kernel; to compile, their types are enough.
    _block_lists.lists = lambda _: _block_lists.Lists(*(torch.zeros(1, dtype=torch.int32),) * 3, 0, 0, 1)
    _block_lists.bits = lambda _: (
        _block_lists.Bits(*(torch.zeros(1, dtype=torch.int32),) * 2) if "bits" in flags else None
    )
    _hopper._pooled = lambda *_: True
    spec = Spec(scale=0.1, causal="causal" in flags, deterministic="deterministic" in flags, mask_mod=mask, softcap=cap)
    tokens = 8192 if "long" in flags else 256
    rope = torch.empty(2, tokens, int(width) // 2).unbind() if "rope" in flags else None
    call = Call(spec, None, build(spec, torch.device("cpu")), rope=rope)
    q, k, v = (torch.empty(1, tokens, h, int(width), dtype=torch.bfloat16) for h in (8, 4, 4))
    if which == "forward":
        _hopper.forward(q, k, v, None, call, launch)
    else:
        stats = torch.empty(1, 8, tokens)
        _hopper.backward(q, k, v, stats, q, stats, call, launch)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
