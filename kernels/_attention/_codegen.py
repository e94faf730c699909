"""Prints a `Program` as Triton (and Gluon) functions in a file that stays on disk, and imports it."""

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType

from torch import Tensor

from trainkit.kernels._attention._program import SPELLING, Program, TableGradient, Value
from trainkit.kernels._cache import Cache

HEADER = {
    "triton": "import triton\nimport triton.language as tl\n\njit = triton.jit\n",
    "gluon": (
        "from triton.experimental import gluon\nimport triton.experimental.gluon.language as tl\n\njit = gluon.jit\n"
    ),
}
FUNCTIONS = ("score", "score_t", "score_grad", "score_grad_t", "mask", "mask_t", "hook", "by_x", "by_pair")
HELPERS = (
    "from trainkit.kernels._attention._elementwise_{dialect} import floor_divide, floor_mod, log1p, sigmoid, tanh\n\n"
)


def layout(program: Program) -> list[int]:
    """Where each captured tensor starts in the flat argument tuple: pointer, then size and stride a dimension."""
    starts, at = [], 0
    for table in program.tables:
        starts.append(at)
        at += 1 + 2 * len(table.shape)
    return starts


def arguments(tables: Sequence[Tensor]) -> tuple[object, ...]:
    """The captured tensors as the flat tuple that the printed functions read."""
    flat: list[object] = []
    for table in tables:
        flat.append(table)
        for size, stride in zip(table.shape, table.stride(), strict=True):
            flat += [size, stride]
    return tuple(flat)


def _address(start: int, wide: bool, indices: tuple[Value, ...], lines: list[str], tag: str) -> tuple[str, str]:
    """Append the lines that compute an element's offset; returns (offset, in-range condition).

    Args:
        wide: whether the table's elements need 64 bits to be numbered.
    """
    offsets, ranges = [], []
    for d, index in enumerate(indices):
        size, stride = f"args[{start + 1 + 2 * d}]", f"args[{start + 2 + 2 * d}]"
        if index.literal is not None:
            at = f"{int(index.literal)}" if index.literal >= 0 else f"({size} + {index.name})"
            # A number that the compiler cannot fold: as one it would have 32 bits.
            offsets.append(f"(b * 0 + {at}).to(tl.int64) * {stride}" if wide else f"{at} * {stride}")
            continue
        # Python's rule: a negative index counts from the end.
        lines.append(f"{tag}i{d} = tl.where({index.name} < 0, {index.name} + {size}, {index.name})")
        offsets.append(f"{tag}i{d}{'.to(tl.int64)' if wide else ''} * {stride}")
        ranges.append(f"({tag}i{d} >= 0) & ({tag}i{d} < {size})")
    return " + ".join(offsets) or "0", " & ".join(ranges)


@dataclass(frozen=True)
class _Form:
    """How values that vary with one index alone stand in a tile.

    Triton takes them as columns and rows of the tile. Gluon's loads want them as vectors,
    spread where they meet others:
    `axes` says along which axis q and k lie then.
    """

    vectors: bool = False
    axes: str = "qk"

    def spread(self, v: Value) -> str:
        alone = v.deps & {"q", "k", "s"}
        if not self.vectors or len(alone) != 1 or "s" in v.deps:
            return v.name
        return v.name + ("[:, None]" if self.axes[0] in alone else "[None, :]")

    def operands(self, args: tuple[Value, ...]) -> list[str]:
        mixed = len(frozenset().union(*(a.deps for a in args)) & {"q", "k", "s"}) > 1
        return [self.spread(a) if mixed else a.name for a in args]

    def result(self, v: Value) -> str:
        """A score or mask that varies with fewer indices than the tile has, over the tile."""
        return self.spread(v)


TILES, ROWS, COLUMNS = _Form(), _Form(True, "qk"), _Form(True, "kq")
"""Triton's form; Gluon's with queries along the rows of a tile; Gluon's with keys along them (names end in `_t`)."""


def _body(program: Program, form: _Form) -> list[str]:
    starts = layout(program)
    lines: list[str] = []
    for op in program.ops:
        args = form.operands(op.args)
        if op.name != "load":
            lines.append(f"{op.out.name} = {SPELLING[op.name].format(*args)}")
            continue
        start = starts[op.table]
        indices = tuple(replace(a, name=name) for a, name in zip(op.args, args, strict=True))
        offset, inside = _address(start, program.tables[op.table].wide, indices, lines, f"{op.out.name}_")
        # An index outside its table gives NaN (0 for integers), never a neighbour's number.
        other = 'float("nan")' if op.out.kind in "fd" else "0"
        guard = f", mask={inside}, other={other}" if inside else ""
        read = f"tl.load(args[{start}] + {offset}{guard})"
        convert = {"f": f"{read}.to(tl.float32)", "b": f"{read} != 0"}
        lines.append(f"{op.out.name} = {convert.get(op.out.kind, read)}")
    return lines


def _whole(out: Value, form: _Form) -> str:
    """The result, spread over the tile where it varies with fewer indices."""
    return out.name if "s" in out.deps else f"tl.where(s == s, {form.result(out)}, {form.result(out)})"


def _scatter(n: int, grad: TableGradient, program: Program) -> list[str]:
    """Lines that add a captured tensor's gradient; the tile is summed over what its index does not vary with."""
    deps = frozenset().union(*(i.deps for i in grad.indices))
    g = f"g{n}"
    start, wide = layout(program)[grad.table], program.tables[grad.table].wide
    lines = [f"{g} = tl.where(seen, {grad.value.name}, 0.0){'.to(tl.float32)' if grad.value.kind == 'd' else ''}"]
    varies = (("q" in deps) or ("s" in deps), ("k" in deps) or ("s" in deps))
    offset, inside = _address(start, wide, grad.indices, lines, f"{g}_")
    for d in range(len(grad.indices)):
        offset = offset.replace(f"args[{start + 2 + 2 * d}]", f"gargs[{start + 2 + 2 * d}]")
    mask = f", mask={inside}" if inside else ""
    match varies:
        case (True, True):
            mask = f", mask=seen & {inside}"
        case (True, False):
            lines.append(f"{g} = tl.sum({g}, 1)[:, None]")
        case (False, True):
            lines.append(f"{g} = tl.sum({g}, 0)[None, :]")
        case (False, False):
            lines.append(f"{g} = tl.sum(tl.sum({g}, 1), 0)")
    lines.append(f'tl.atomic_add(gargs[{start}] + {offset}, {g}{mask}, sem="relaxed")')
    return lines


def _function(name: str, parameters: str, body: list[str], result: str) -> str:
    indented = "".join(f"    {line}\n" for line in [*body, f"return {result}"])
    return f"\n\n@jit\ndef {name}({parameters}):\n{indented}"


def source(
    dialect: str,
    score: Program | None,
    gradient: tuple[Value, list[TableGradient]] | None,
    split: int,
    mask: Program | None,
) -> str:
    """The functions `score`, `score_grad` and `mask` of a variant, in one of the two dialects.

    Args:
        score: its operations up to `split` compute the score, the rest its derivative.
        gradient: what `differentiate` returned for it.
    """
    text = HEADER[dialect] + HELPERS.format(dialect=dialect)
    for suffix, form in (("", TILES),) if dialect == "triton" else (("", ROWS), ("_t", COLUMNS)):
        if score is not None and gradient is not None and score.result is not None:
            forward = Program(score.ops[:split], score.tables, score.result)
            text += _function(
                f"score{suffix}", "s, b, h, q, k, off, args", _body(forward, form), _whole(score.result, form)
            )
            ds, tables = gradient
            # Only the Triton kernels collect gradients of captured tensors.
            found = tables if dialect == "triton" else []
            scatters = [line for n, grad in enumerate(found) for line in _scatter(n, grad, score)]
            if scatters:
                scatters = ["if TABLES:", *("    " + line for line in scatters)]
            text += _function(
                f"score_grad{suffix}",
                "s, g, b, h, q, k, off, seen, args, gargs, TABLES: tl.constexpr",
                _body(score, form) + scatters,
                _whole(ds, form),
            )
        if mask is not None and mask.result is not None:
            text += _function(f"mask{suffix}", "b, h, q, k, off, args", _body(mask, form), form.result(mask.result))
    return text


def hook_source(programs: list[tuple[str, Program]]) -> str:
    """The functions `hook`, `by_x` and `by_pair` of a hook, in Triton."""
    text = HEADER["triton"] + HELPERS.format(dialect="triton")
    for name, program in programs:
        assert program.result is not None
        g = "" if name == "hook" else "g, "
        text += _function(
            name, f"x, pair, {g}b, h, q, k, args", _body(program, TILES), f"x * 0.0 + {program.result.name}"
        )
    return text


@cache
def _temporary() -> Path:
    return Path(tempfile.mkdtemp(prefix="trainkit-variants-"))


def _folder() -> Path:
    try:
        folder = Path.home() / ".cache" / "trainkit" / "variants"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        # No such folder can be made, or nobody knows where home is.
        pass
    return _temporary()


_MODULES: Cache[ModuleType] = Cache(512)


def load(text: str) -> ModuleType:
    """Import printed functions from a file named by their content (Triton reads sources back from disk)."""
    return _MODULES.get(text, lambda: _load(text))


def _load(text: str) -> ModuleType:
    name = "variant_" + hashlib.sha256(text.encode()).hexdigest()[:20]
    # Triton's own cache knows a function argument by its name alone: the name must say the content.
    for function in FUNCTIONS:
        text = text.replace(f"def {function}(", f"def {name}_{function}(")
    path = _folder() / f"{name}.py"
    if not path.exists() or path.read_text() != text:
        # A name that nobody else has: threads, and processes of other machines with the same number, share the folder.
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=name, suffix=".partial", delete=False) as partial:
            partial.write(text)
        Path(partial.name).replace(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for function in FUNCTIONS:
        setattr(module, function, getattr(module, f"{name}_{function}", None))
    return module
