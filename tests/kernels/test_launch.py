"""A kept launch passes what a launch of its own would pass: every option and layout, in turns, up to the call into CUDA."""

import gc
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'triton>=3.6'")

from kernels_cases import LAYOUTS, filled
from kernels_recorder import Address, Recorder
from triton.runtime.jit import JITFunction

from trainkit.kernels import _launch
from trainkit.kernels._attention import _block_lists, _delta, _hopper, _triton_backward
from trainkit.kernels._attention._call import Call
from trainkit.kernels._attention._packed import make_packed
from trainkit.kernels._attention._spec import Spec
from trainkit.kernels._attention._variant import build
from trainkit.kernels._cache import Cache

SLOPES = torch.tensor([0.5, 0.1, 0.2, 0.3])
DOC = torch.arange(300) // 20
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "scale": {"scale": 0.3},
    "window": {"window": 50},
    "window of 1": {"window": 1},
    "causal window": {"causal": True, "window": 16},
    "soft cap": {"softcap": 20.0},
    "low soft cap": {"softcap": 9.0},
    "high soft cap": {"softcap": 90.0},
    "deterministic": {"deterministic": True},
    "deterministic causal": {"deterministic": True, "causal": True},
    "sinks": {"sinks": torch.float32},
    "16-bit sinks": {"sinks": torch.bfloat16},
    "sinks off by one": {"sinks": torch.float32, "off": True},
    "RoPE": {"rope": True},
    "RoPE and sinks": {"rope": True, "sinks": torch.float32, "causal": True},
    "gradient of lse": {"grad_lse": True},
}
TRACED = {
    "ALiBi": {"alibi_slopes": SLOPES, "causal": True},
    "ALiBi, full": {"alibi_slopes": SLOPES},
    "score": {"score_mod": lambda s, b, h, q, k: s + SLOPES[h] * (q - k)},
    "cap and score": {"softcap": 20.0, "score_mod": lambda s, b, h, q, k: s + (q - k)},
    "mask": {"mask_mod": lambda b, h, q, k: q - k < 30},
    "documents": {"mask_mod": lambda b, h, q, k: DOC[q] == DOC[k]},
}
"""Planned once for the same functions."""
FREE = {
    "packed": {"cu": [0, 16, 64]},
    "packed otherwise": {"cu": [0, 32, 32, 64], "causal": True},
}
"""Planned anew each time."""
SIZES = [  # B, Sq, Sk, Hq, Hkv, D, Dv
    (1, 64, 64, 4, 2, 128, 128), (2, 80, 300, 4, 1, 64, 64), (1, 64, 64, 4, 2, 256, 256), (2, 64, 64, 4, 4, 128, 128),
    (1, 64, 65, 4, 2, 128, 128), (1, 1, 1, 4, 4, 64, 64), (2, 64, 96, 4, 2, 128, 64), (1, 64, 64, 4, 2, 64, 256),
]  # fmt: skip


def arranged(options, size, dtype=torch.bfloat16, layouts=("dense",) * 4):
    """A call's tensors by name, and the call."""
    options, (B, Sq, Sk, Hq, Hkv, D, DV) = dict(options), size
    tensors = {
        "q": filled((B, Sq, Hq, D), 1, dtype, layouts[0]), "k": filled((B, Sk, Hkv, D), 2, dtype, layouts[1]),
        "v": filled((B, Sk, Hkv, DV), 3, dtype, layouts[2]), "grad": filled((B, Sq, Hq, DV), 4, dtype, layouts[3]),
        "out of forward": torch.full((B, Sq, Hq, DV), 5.0, dtype=dtype), "lse of forward": torch.full((B, Hq, Sq), 6.0),
    }  # fmt: skip
    sinks, off = options.pop("sinks", None), options.pop("off", False)
    if sinks is not None:
        tensors["sinks"] = torch.full((Hq + 1,), 7.0, dtype=sinks)[off : Hq + off]
    if options.pop("grad_lse", False):
        tensors["grad_lse"] = torch.full((B, Hq, Sq), 8.0)
    rope = None
    if options.pop("rope", False):
        rope = tensors["cos"], tensors["sin"] = torch.full((Sk, D // 2), 9.0), torch.full((Sk, D // 2), 10.0)
    cu = options.pop("cu", None)
    cu = None if cu is None else torch.tensor(cu, dtype=torch.int32)
    spec = Spec(**{"scale": D**-0.5, "sinks": tensors.get("sinks"), **options})
    packed = make_packed(cu, tensors["q"], tensors["k"])
    return tensors, Call(spec, packed, build(spec, torch.device("cpu")), True, rope)


def launched(recorder, case):
    """What a call's forward and backward ask of CUDA, tensors by name; those made on the way by what is in them."""
    tensors, call = case
    q, k, v, grad = (tensors[n] for n in ("q", "k", "v", "grad"))
    out_lse = _hopper.forward(q, k, v, tensors.get("sinks"), call)
    found = taken(recorder, tensors, dict(zip(("out", "lse"), out_lse, strict=True)))
    delta = _delta.row_delta(tensors["out of forward"], grad, tensors.get("grad_lse")).fill_(11)
    found += taken(recorder, tensors, {"delta": delta})
    grads = _hopper.backward(q, k, v, tensors["lse of forward"], grad, delta, call)
    return found + taken(recorder, tensors, dict(zip(("dq", "dk", "dv"), grads, strict=True)))


def taken(recorder, *tensors):
    """The launches since the last time."""
    names = {x.data_ptr(): name for some in tensors for name, x in some.items()}

    def named(x):
        if isinstance(x, Address):
            return names.get(x[0], x[1])
        if isinstance(x, tuple) and x[:1] == ("map",):
            return ("map", names.get(x[2], x[1]), *x[3:])
        return tuple(named(y) for y in x) if type(x) is tuple else x

    launches, recorder.launches = recorder.launches, []
    return [[named(x) for x in launch] for launch in launches]


def fresh(patch, most=768):
    """Nothing is kept yet."""
    plans = Cache(most)
    for module in (_hopper, _delta):
        patch.setattr(module, "PLANS", plans)
    patch.setattr(_block_lists, "KEPT", Cache(most))


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder(monkeypatch)
    monkeypatch.setattr(_triton_backward, "delta", JITFunction(_triton_backward.delta.fn))
    fresh(monkeypatch)
    lists = torch.full((2,), 12, dtype=torch.int32)
    monkeypatch.setattr(_block_lists, "lists", lambda *_: (lists, lists, lists, 0, 0, 1))
    monkeypatch.setattr(_block_lists, "bits", lambda *_: (lists, lists))
    monkeypatch.setattr(_hopper, "counter", lambda _: torch.full((2,), 13, dtype=torch.int32))
    monkeypatch.setattr(_hopper, "_pooled", lambda *_: True)
    workspace = _hopper.Pool.workspace

    def marked(pool, device):
        sums, marks = workspace(pool, device)
        assert sums.count_nonzero() == 0
        sums[0], marks[0] = 14.0, 15
        return sums, marks

    monkeypatch.setattr(_hopper.Pool, "workspace", marked)
    return recorder


def alone(recorder, monkeypatch, case):
    with monkeypatch.context() as patch:
        fresh(patch)
        return launched(recorder, case)


def cases():
    for options in (OPTIONS | TRACED | FREE).values():
        plain = set(options) <= {"causal"}
        for size in SIZES if plain else SIZES[:1] if "cu" in options else SIZES[:3]:
            yield arranged(options, size)
        for layout in LAYOUTS if plain else ():
            for dtype in (torch.bfloat16, torch.float16):
                yield arranged(options, SIZES[3], dtype, [layout] * 4)
            for side in range(4):
                yield arranged(options, SIZES[3], layouts=[layout if i == side else "dense" for i in range(4)])


def test_a_kept_launch_is_the_launch_of_its_own(recorder, monkeypatch):
    fresh(monkeypatch, 1 << 20)  # none is dropped: each meets all the others
    everything = list(cases())
    wants = [alone(recorder, monkeypatch, case) for case in everything]
    for _ in range(2):
        for case, want in zip(everything, wants, strict=True):
            assert launched(recorder, case) == want


@pytest.mark.parametrize("name", OPTIONS | TRACED | FREE)
def test_what_is_kept(recorder, name):
    """A second call like one before asks Triton for nothing, unless its sequences are its own."""
    options = (OPTIONS | TRACED | FREE)[name]
    first = launched(recorder, arranged(options, SIZES[0]))
    asked, recorder.by_triton = recorder.by_triton, 0
    assert asked == len(first)
    again = launched(recorder, arranged(options, SIZES[0]))
    assert again == first
    free = {"sinks off by one": 1}.get(name, len(first) - 1 if name in FREE else 0)
    assert recorder.by_triton == free


def test_a_mask_whose_table_changes_is_planned_anew(recorder, monkeypatch):
    options = TRACED["documents"]
    first = launched(recorder, arranged(options, SIZES[0]))
    DOC.add_(1)
    other = torch.full((2,), 16, dtype=torch.int32)
    monkeypatch.setattr(_block_lists, "lists", lambda *_: (other, other, other, 0, 0, 1))
    again = launched(recorder, arranged(options, SIZES[0]))
    assert again != first and again == alone(recorder, monkeypatch, arranged(options, SIZES[0]))


def test_what_is_kept_holds_no_tensor_and_is_bounded(recorder, monkeypatch):
    fresh(monkeypatch, 100)

    def tensors():
        gc.collect()
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    before = tensors()
    for S in range(1, 40):
        for _ in range(2):
            launched(recorder, arranged({"sinks": torch.float32, "rope": True}, (1, S, 300, 4, 2, 64, 64)))
    assert len(_hopper.PLANS) == 100
    # What earlier tests left may go meanwhile.
    assert tensors() <= before


@pytest.mark.parametrize("why", ["scratch", "version"])
def test_what_the_short_launch_does_not_know_is_left_to_triton(recorder, monkeypatch, why):
    """A kernel that wants scratch memory, or a Triton whose launcher is another."""
    if why == "scratch":
        recorder.scratch = 64
        allocator = SimpleNamespace(get=lambda: lambda size, align, stream: torch.zeros(size, dtype=torch.int8))
        monkeypatch.setattr("triton.runtime._allocation._allocator", allocator)
    else:
        monkeypatch.setattr(_launch._gluon, "triton_version", lambda: "3.7")
    case = arranged({}, SIZES[0])
    first = launched(recorder, case)
    assert launched(recorder, case) == first
    assert recorder.by_triton == 2 * len(first)
