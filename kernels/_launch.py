"""What keeps a kernel's launch short: it is planned once for all calls of one signature, and each call brings its addresses."""

import operator
from collections.abc import Callable, Sequence
from functools import cache
from inspect import getclosurevars
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from trainkit.kernels import _gluon
from trainkit.kernels._cache import Cache, capturing


def signature(*tensors: Tensor) -> Any:
    """All that a launch depends on of its tensors but where they lie; None where one is not aligned to 16 bytes."""
    parts: list[Any] = []
    for x in tensors:
        if x.data_ptr() % 16:
            return None
        parts += (x.shape, x.stride(), x.dtype, x.get_device())
    return tuple(parts)


def stream() -> int:
    """The current stream of the current device, as CUDA names it."""
    return torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())


PLANS: Cache[Any] = Cache(768)
"""Plans kept: forward, delta and backward of 256 signatures of call."""


class Slot:
    """Among a launch's constants, in its place: the call's tensor of this number."""

    def __init__(self, number: int) -> None:
        self.number = number


def slotted(x: Any) -> bool:
    return isinstance(x, Slot) or (type(x) is tuple and any(map(slotted, x)))


def filled(x: Any, tensors: Sequence[Tensor]) -> Any:
    """Constants with the call's tensors in their places."""
    if isinstance(x, Slot):
        return tensors[x.number]
    return tuple(filled(y, tensors) for y in x) if type(x) is tuple else x


class Descriptor(NamedTuple):
    """A TMA descriptor to be: the call's tensor `slot` as a matrix with this stride between rows, read in blocks."""

    slot: int
    shape: tuple[int, int]
    stride: int
    block: tuple[int, int]

    def of(self, x: Tensor) -> Any:
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        layout = _swizzle(*self.block, x.dtype)
        return TensorDescriptor(x, list(self.shape), [self.stride, 1], list(self.block), layout)


@cache
def _swizzle(rows: int, width: int, dtype: torch.dtype) -> Any:
    import triton.experimental.gluon.language as gl

    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}[dtype]
    return gl.NVMMASharedLayout.get_default_for([rows, width], element)


class Launch:
    """A kernel's launch for every call of one signature.

    Args:
        grid: three numbers of programs.
        descriptors: the kernel's first parameters.
        pointers: its next ones: numbers of the call's tensors, None where the kernel has none, or a tensor of this
            launch's own (which no other call may be given).
        constants: all others, those known when compiling too; a `Slot` in place of a tensor.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, int, int], descriptors: tuple[Descriptor, ...],
        pointers: Sequence[int | Tensor | None], constants: tuple[Any, ...],
    ) -> None:  # fmt: skip
        self.kernel, self.grid, self.descriptors = kernel, grid, descriptors
        self.pointers, self.constants = pointers, constants
        self.slotted = slotted(constants)
        self._compiled: Any = None
        self._again: Callable[[Sequence[Tensor]], None] | None = None

    def __call__(self, tensors: Sequence[Tensor], launch: Any = None) -> None:
        """Run on the current stream.

        Args:
            launch: called with the kernel and grid instead of `kernel[grid]` (the tests have no GPU).
        """
        if launch is None and self._compiled is not None:
            if self._again is None:
                self._again = _again(self, self._compiled)
            if self._again is not None:
                return self._again(tensors)
        compiled = (launch or operator.getitem)(self.kernel, self.grid)(
            *(d.of(tensors[d.slot]) for d in self.descriptors),
            *(tensors[p] if isinstance(p, int) else p for p in self.pointers),
            *(filled(self.constants, tensors) if self.slotted else self.constants), num_warps=4,
        )  # fmt: skip
        if launch is None:
            self._compiled = compiled
        return None


def _again(first: Launch, compiled: Any) -> Callable[[Sequence[Tensor]], None] | None:
    """The launch past Triton's: what it asks of the arguments was answered, and is the same for every call of the signature.

    None where this Triton's launcher is not the known one, or the kernel wants memory of the launcher's.
    """
    runner = compiled.run
    if _gluon.triton_version() != _gluon.TRITON or type(runner).__name__ != "CudaLauncher":
        return None
    if runner.global_scratch_size or runner.profile_scratch_size:
        return None
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
    from triton.runtime import driver

    # Behind a function that expands descriptors, where the kernel has any.
    start = getclosurevars(runner.launch).nonlocals.get("launcher") if first.descriptors else runner.launch
    if start is None:
        return None
    encode = driver.active.utils.fill_tma_descriptor
    maps = []
    for d, meta in zip(first.descriptors, compiled.metadata.tensordesc_meta if first.descriptors else (), strict=True):
        kind = TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]]
        # Argument 8 of the encoding: what lies beyond the matrix reads as 0.
        how = (meta["swizzle"], meta["elem_size"], kind, meta["block_size"], list(d.shape), [d.stride, 1], 0)
        maps.append((d.slot, how, (*d.shape, d.stride, 1)))
    grid, function = first.grid, compiled.function
    options = (
        runner.launch_cooperative_grid,
        runner.launch_pdl,
        None,
        None,
        compiled.packed_metadata,
        None,
        None,
        None,
    )
    # What follows the addresses: None, and this launch's own tensors.
    own = [None, *(p for p in first.pointers if isinstance(p, Tensor))]
    beyond = iter(range(1 - len(own), 0))
    pointers = [
        next(beyond) if isinstance(p, Tensor) else -len(own) if p is None else operator.index(p) for p in first.pointers
    ]
    constants, slotted = first.constants, first.slotted

    def again(tensors: Sequence[Tensor]) -> None:
        at: list[Any] = [x.data_ptr() for x in tensors]
        at += own
        described: list[Any] = []
        for slot, how, sizes in maps:
            described += (encode(at[slot], *how), *sizes)
        others = filled(constants, tensors) if slotted else constants
        start(*grid, stream(), function, *options, *described, *[at[p] for p in pointers], *others)

    return again


_COUNTERS: dict[tuple[int, int], Tensor] = {}


def counter(device: torch.device) -> Tensor:
    """A number in device memory that is 0 and that the kernel which counts with it leaves at 0.

    Kernels of one stream run one after the other and share it; a captured graph, which may run beside anything, gets its
    own.
    """
    if device.type != "cuda" or capturing(device):
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (device.index, stream())
    known = _COUNTERS.get(key)
    if known is None:
        known = _COUNTERS[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return known


class Template:
    """What a kernel is compiled for: attributes that its code reads as constants. One object for equal constants."""

    _made: ClassVar[dict[Any, "Template"]] = {}
    _known: tuple[tuple[str, Any], ...]

    def __new__(cls, **constants: Any) -> "Template":
        known = tuple(constants.items())
        made = cls._made.get(known)
        if made is None:
            import triton
            import triton.language as tl

            made = super().__new__(cls)
            made._known = known
            for name, value in known:
                # Triton's interpreter runs the code as Python's.
                setattr(made, name, value if triton.knobs.runtime.interpret else tl.constexpr(value))
            if len(cls._made) >= 256:
                cls._made.pop(next(iter(cls._made)), None)
            cls._made[known] = made
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Template) and self._known == other._known

    def __hash__(self) -> int:
        return hash(self._known)

    def __repr__(self) -> str:
        # Part of the name under which Triton keeps the compiled kernel.
        return f"Template{self._known}"
