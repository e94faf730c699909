"""Runs the Hopper kernels' own source on the CPU, with all that they leave to the hardware's timing left to chance.

Warpgroups of several programs take turns at random; a copy lands any time before somebody must have waited for it, and
leaves its room unreadable until then; a product reads its operands only when it is waited for. So a missing wait, a buffer
given back too early, barriers that do not add up, or an index beyond a tensor is a wrong number, an error or a deadlock.
Layouts, registers and fences between the chip's two ways to memory are not modelled.
"""

import ast
import importlib.util
import math
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from kernels_chip import Barrier, Chip, Strand, pause
from threadpoolctl import threadpool_limits


class Tensor(np.ndarray):
    """A tile, or a number, that never changes: integers divide as the GPU's do, toward zero."""

    __iadd__, __isub__, __imul__ = np.ndarray.__add__, np.ndarray.__sub__, np.ndarray.__mul__

    def __floordiv__(self, other):
        return np.floor_divide(self - np.fmod(self, other), other)

    def __rfloordiv__(self, other):
        return tensor(other) // self

    def __mod__(self, other):
        return np.fmod(self, other)

    def to(self, kind, bitcast=False):
        return self.view(kind.name) if bitcast else kind.rounded(self)

    def permute(self, axes):
        return self.transpose(axes)

    def split(self):
        return self[..., 0], self[..., 1]

    type = SimpleNamespace(layout=None)


def tensor(x):
    """Wide integers stay wide, and so do wide floats; Python's own numbers are narrow."""
    narrow = not isinstance(x, np.ndarray | np.generic) or x.dtype.itemsize < 8
    x = np.asarray(x)
    return (
        x.astype({"f": np.float32, "i": np.int32, "b": bool}[x.dtype.kind]) if narrow or x.dtype == bool else x
    ).view(Tensor)


class Kind:
    """A type of numbers; 16-bit floats are kept in 32 bits, rounded."""

    def __init__(self, name, numbers):
        self.name, self.numbers = name, numbers

    @property
    def element_ty(self):
        return self

    def rounded(self, x):
        x = np.asarray(x)
        if self.numbers in (torch.bfloat16, torch.float16):
            return tensor(torch.from_numpy(x.astype(np.float32)).to(self.numbers).float().numpy())
        return x.astype(np.float32 if self.numbers.is_floating_point else np.int64).view(Tensor)


KINDS = {
    getattr(torch, n): Kind(n, getattr(torch, n)) for n in ("float32", "float16", "bfloat16", "int32", "int64", "bool")
}


class Pointer:
    """Addresses of single elements of a tensor, each checked when it is read or written."""

    def __init__(self, flat, at):
        self.flat, self.at = flat, at
        self.dtype = KINDS[flat.dtype]

    def __add__(self, offset):
        return Pointer(self.flat, self.at + offset)

    def __sub__(self, offset):
        return Pointer(self.flat, self.at - offset)

    def places(self, mask):
        at, inside = np.broadcast_arrays(self.at, True if mask is None else mask)
        used = at[inside]
        if used.size and (used.min() < 0 or used.max() >= self.flat.numel()):
            raise IndexError(f"element {used.min()} to {used.max()} of {self.flat.numel()}")
        return torch.from_numpy(np.where(inside, at, 0).astype(np.int64)), torch.from_numpy(np.array(inside))


class Shared:
    """Shared memory, or a part of it."""

    def __init__(self, data, dtype, bars=None, under=None):
        self.data, self.dtype, self.bars, self.under = data, dtype, bars, under

    def index(self, i):
        return Shared(self.data[int(i)], self.dtype, None if self.bars is None else self.bars[int(i)], self.under)

    def _reinterpret(self, dtype, shape, layout):
        """The same bytes under another type: what is written by one name cannot be read by the other."""
        other = Shared(np.full(shape, np.nan, np.float32), dtype, under=self.data)
        Chip.active.renamed.setdefault(self.address, []).append(other.data)
        return other

    @property
    def address(self):
        return self.data.__array_interface__["data"][0]

    def slice(self, start, size, dim):
        return Shared(self.data[(slice(None),) * dim + (slice(start, start + size),)], self.dtype)

    def permute(self, axes):
        return Shared(self.data.transpose(axes), self.dtype)

    def store(self, x):
        assert not isinstance(x, Product)
        for lost in [*Chip.active.renamed.get(self.address, ()), *([] if self.under is None else [self.under])]:
            lost[...] = np.nan
        self.data[...] = self.dtype.rounded(x)

    def load(self, layout):
        return tensor(self.data.copy())


class Plane:
    """A TMA descriptor: what lies beyond the matrix reads as 0 and is not written."""

    def __init__(self, d):
        (rows, columns), (stride, one) = d.shape, d.strides
        assert one == 1 and stride * d.base.element_size() % 16 == 0
        self.matrix = torch.as_strided(d.base, (rows, columns), (stride, 1))
        self.box, self.dtype, self.layout = tuple(d.block_shape), KINDS[d.base.dtype], None
        self.block_type = SimpleNamespace(shape=self.box, nbytes=math.prod(self.box) * d.base.element_size())

    def part(self, at):
        spans = [
            (max(int(a), 0), max(min(int(a) + n, end), 0))
            for a, n, end in zip(at, self.box, self.matrix.shape, strict=True)
        ]
        inside = tuple(slice(a, max(a, b)) for a, b in spans)
        box = tuple(slice(s.start - int(a), s.stop - int(a)) for s, a in zip(inside, at, strict=True))
        return inside, box

    def read(self, at):
        inside, box = self.part(at)
        x = np.zeros(self.box, np.float32)
        x[box] = self.matrix[inside].float().numpy()
        return x

    def write(self, at, x, add):
        inside, box = self.part(at)
        x = torch.from_numpy(np.ascontiguousarray(x[box])).to(self.matrix.dtype)
        self.matrix[inside] = self.matrix[inside] + x if add else x


class Product:
    """A product on its way; nobody can count with it before it was waited for."""

    def __init__(self, a, b, acc):
        self.a, self.b, self.acc, self.value = a, b, acc, None

    def finish(self):
        a, b = (x.data if isinstance(x, Shared) else x for x in (self.a, self.b))
        acc = self.acc.value if isinstance(self.acc, Product) else self.acc
        self.value = tensor(np.asarray(a, np.float32) @ np.asarray(b, np.float32) + (0.0 if acc is None else acc))


def warp_specialize(partitions, warps, registers):
    mine = Chip.active.current
    others = [
        Strand(Chip.active, mine.program, mine.programs, lambda f=f, args=args: f(*args)) for f, args in partitions[1:]
    ]
    Chip.active.strands += others
    first, args = partitions[0]
    first(*args)
    pause(lambda: all(s.done for s in others))


def load(at, mask=None, other=0, volatile=False, cache_modifier=None):
    if volatile:
        pause()
    places, inside = at.places(mask)
    x = at.flat[places]
    kept = torch.where(inside, x, torch.tensor(float("nan") if other is None else other).to(x.dtype))
    return tensor((kept.float() if kept.is_floating_point() else kept).numpy())


def store(at, x, mask=None):
    places, inside = at.places(mask)
    x = torch.from_numpy(np.array(np.broadcast_to(x, places.shape))).to(at.flat.dtype)
    at.flat[places[inside]] = x[inside]


def atomic_add(at, x, sem=None):
    pause()
    old = load(at)
    store(at, old + x)
    return old


def halves_of_words(words, kinds):
    bits = np.asarray(words).view(np.uint32)
    parts = (bits & 0xFFFF, bits >> 16)
    return tuple(
        tensor(torch.from_numpy(p.astype(np.int32)).to(torch.int16).view(k.numbers).float().numpy())
        for p, k in zip(parts, kinds, strict=True)
    )


def word_of_halves(low, high, numbers):
    low, high = (
        torch.from_numpy(np.array(x)).to(numbers).view(torch.int16).numpy().astype(np.int64) & 0xFFFF
        for x in (low, high)
    )
    return (high << 16 | low).astype(np.uint32).view(np.int32).view(Tensor)


def inline_asm(code, constraints, args, dtype, is_pure, pack):
    """The few instructions that the kernels spell out."""
    operands = [int(n) for n in re.findall(r"\$(\d)", code)]
    if "and.b32 t, $2, $3; setp.ne.b32 p, t, 0; selp.f32 $0, $1, 0fFF800000, p;" in code:
        x, word, bit = args
        return wrapped(np.where)((word & bit) != 0, x, -np.inf)
    if code.startswith("cvt.rn."):
        # The first source goes to the upper half.
        high, low = (args[n - 1] for n in operands[1:])
        return word_of_halves(low, high, torch.bfloat16 if "bf16x2" in code else torch.float16)
    if code.startswith("mov.b32 {$0, $1}, $2"):
        return halves_of_words(args[0], dtype)
    if code.startswith("tanh"):
        return np.tanh(args[0])
    if code.startswith("cp.async.bulk.wait_group 0"):
        tma.settle()
        return args[0]
    if code.startswith("fence"):
        return args[0]
    verb, which, threads = re.match(r"(bar\.\w+) (\d+), (\d+);", code).groups()
    bars = Chip.active.turn_barriers.setdefault(Chip.active.current.program, {})
    bar = bars.get(which)
    if bar is None:
        bar = bars[which] = Barrier()
        bar.init(int(threads))
    phase = bar.phase
    bar.settle(128, 0)
    if verb == "bar.sync":
        pause(lambda: bar.phase > phase)
    return args[0]


def wrapped(function):
    def run(*args, **named):
        with np.errstate(all="ignore"):
            return tensor(function(*args, **named))

    return run


def multiply_add(a, b, c):
    """Rounded once; NaN has the GPU's bits."""
    x = np.asarray(a, np.float64) * np.asarray(b, np.float64) + np.asarray(c, np.float64)
    return np.where(np.isnan(x), np.uint32(0x7FFFFFFF).view(np.float32), x.astype(np.float32))


def reduced(function):
    return lambda x, axis: tensor(function.reduce(x, axis=axis))


class Mbarrier:
    MBarrierLayout = staticmethod(lambda: "barrier")

    @staticmethod
    def init(bar, count):
        bar.bars.init(count)

    @staticmethod
    def expect(bar, nbytes):
        bar.bars.settle(1, int(nbytes))

    @staticmethod
    def arrive(bar, pred=True):
        if pred:
            bar.bars.settle(1, 0)
            pause()

    @staticmethod
    def wait(bar, phase, pred=True):
        if pred:
            pause(lambda: bar.bars.phase & 1 != int(phase))


class Tma:
    @staticmethod
    def async_copy_global_to_shared(desc, at, bar, to):
        assert to.data.shape == desc.box and to.dtype is desc.dtype
        to.data[...] = np.nan
        at = [int(x) for x in at]

        def land():
            to.data[...] = desc.read(at)
            bar.bars.settle(0, -desc.block_type.nbytes)

        Chip.active.landing.append(land)
        pause()

    @staticmethod
    def async_copy_shared_to_global(desc, at, source, add=False):
        assert source.data.shape == desc.box and source.dtype is desc.dtype
        Chip.active.current.stores.append((desc, [int(x) for x in at], source, add))

    @staticmethod
    def store_wait(n):
        """Shared memory has been read; when global memory is written is another matter."""
        strand = Chip.active.current
        while len(strand.stores) > n:
            desc, at, source, add = strand.stores.pop(0)
            x = source.data.copy()
            strand.written.append(lambda desc=desc, at=at, x=x, add=add: desc.write(at, x, add))
            Chip.active.landing.append(strand.written[-1])

    @staticmethod
    def settle():
        tma.store_wait(0)
        strand, landing = Chip.active.current, Chip.active.landing
        for land in [x for x in strand.written if x in landing]:
            landing.remove(land)
            land()
        strand.written.clear()


class AsyncCopy:
    """Copies that land as late as they may: when their group is waited for."""

    @staticmethod
    def async_copy_global_to_shared(to, at, mask):
        to.data[...] = np.nan
        Chip.active.current.copies[-1].append(lambda: to.store(load(at, mask)))

    @staticmethod
    def commit_group():
        Chip.active.current.copies.append([])

    @staticmethod
    def wait_group(n):
        copies = Chip.active.current.copies
        while len(copies) - 1 > n:
            for land in copies.pop(0):
                land()
        pause()


mbarrier, tma = Mbarrier, Tma


def warpgroup_mma(a, b, acc, use_acc=True, is_async=False):
    assert is_async
    a = a if isinstance(a, Shared) else np.array(a)
    product = Product(a, b, acc if use_acc else None)
    Chip.active.current.products.append(product)
    pause()
    return product


def warpgroup_mma_wait(n, deps):
    products = Chip.active.current.products
    while len(products) > n:
        products.pop(0).finish()
    results = tuple(x.value if isinstance(x, Product) and x.value is not None else x for x in deps)
    return results if len(results) > 1 else results[0]


def allocate(dtype, shape, layout):
    shape = [int(n) for n in shape]
    if layout == "barrier":
        return Shared(np.zeros(shape), dtype, [Barrier() for _ in range(shape[0])])
    # What nobody has written yet must not be counted with.
    blank = np.full(shape, np.nan, np.float32) if dtype.numbers.is_floating_point else np.full(shape, -1, np.int64)
    return Shared(blank, dtype)


def unmodelled(*args, **named): ...


def identity(x, *rest, **named):
    return x


language = SimpleNamespace(
    **{k.name: k for k in KINDS.values()}, allocate_shared_memory=allocate, warp_specialize=warp_specialize,
    **{n: wrapped(getattr(np, n)) for n in ("exp2", "exp", "log", "log2", "sqrt", "sin", "cos", "floor", "ceil", "abs", "where")},
    fma=wrapped(multiply_add), tensor=object, tuple=tuple, constexpr=identity, convert_layout=identity, static_range=range,
    **{f"{n}Layout": unmodelled for n in ("Blocked", "Slice", "DotOperand", "NVMMADistributed", "SwizzledShared")},
    thread_barrier=unmodelled, NVMMASharedLayout=SimpleNamespace(get_default_for=unmodelled),
    maximum=wrapped(np.fmax), minimum=wrapped(np.fmin), max=reduced(np.fmax), sum=reduced(np.add), load=load, store=store,
    cdiv=lambda a, b: tensor(a + b - 1) // b, arange=lambda a, b, layout: tensor(np.arange(a, b)), atomic_add=atomic_add,
    full=lambda shape, x, kind, layout: kind.rounded(np.full([*map(int, shape)], x)), inline_asm_elementwise=inline_asm,
    zeros=lambda shape, kind, layout: kind.rounded(np.zeros([*map(int, shape)])), join=lambda a, b: tensor(np.stack([a, b], -1)),
    program_id=lambda axis: tensor(Chip.active.current.program), num_programs=lambda axis: tensor(Chip.active.current.programs),
)  # fmt: skip


def jit(function=None, **options):
    return identity if function is None else function


OUTSIDE = {
    "triton.language": language,
    "triton.experimental.gluon.language": language,
    "gluon": SimpleNamespace(jit=jit), "NamedTuple": NamedTuple, "ir": None, "builtin": identity,
    "fence_async_shared": unmodelled, "mbarrier": Mbarrier, "tma": Tma, "async_copy": AsyncCopy,
    "warpgroup_mma": warpgroup_mma, "warpgroup_mma_wait": warpgroup_mma_wait,
}  # fmt: skip


def loaded(path, text):
    """A kernel module's names, its functions being plain Python over what stands above."""
    tree = ast.parse(text)
    names = {"__name__": Path(path).stem}
    for node in tree.body:
        if isinstance(node, ast.Import):
            names.update({alias.asname: OUTSIDE[alias.name] for alias in node.names})
        elif isinstance(node, ast.ImportFrom):
            ours = node.module.startswith("trainkit.")
            source = module(source_of(node.module)) if ours else OUTSIDE
            names.update({alias.asname or alias.name: source[alias.name] for alias in node.names})
    tree.body = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(tree, path, "exec"), names)
    if "reduce_add" in names:
        names["reduce_add"] = lambda desc, at, source: Tma.async_copy_shared_to_global(desc, at, source, add=True)
    return names


@cache
def module(path):
    return loaded(path, Path(path).read_text())


def changed(path, text):
    """In place of `module`: all of the kernels' modules anew, with another text of one file."""

    @cache
    def module(wanted):
        return loaded(wanted, text if wanted == path else Path(wanted).read_text())

    return module


def source_of(name):
    return importlib.util.find_spec(name).origin


def argument(x):
    """An argument of a launch as the kernel sees it."""
    if isinstance(x, torch.Tensor):
        length = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
        return Pointer(torch.as_strided(x, (length,), (1,)), tensor(0).astype(np.int64))
    if isinstance(x, tuple) and not hasattr(x, "_fields"):
        return tuple(argument(y) for y in x)
    if hasattr(x, "block_shape"):
        return Plane(x)
    if hasattr(x, "_known"):
        known = {n: function(v) if hasattr(v, "fn") else v for n, v in x._known}
        return SimpleNamespace(**known)
    return tensor(x)


def function(jitted):
    return module(jitted.fn.__code__.co_filename)[jitted.fn.__name__]


def launcher(seed, programs=None, resident=3):
    """What `_hopper.forward` and `backward` take in place of a launch.

    Args:
        programs: how many at most, where they take tiles from a counter.
        resident: how many run at a time.
    """

    def launch(kernel, grid):
        def run(*args, **options):
            counted = programs is not None and "COUNTER" in kernel.arg_names
            count = min(programs, grid[0]) if counted else grid[0]
            # Threads of a library would only be in the way of these.
            with threadpool_limits(1):
                Chip(seed).run(function(kernel), [argument(x) for x in args], count, resident)

        return run

    return launch
