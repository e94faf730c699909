"""The catalogue: base families by size, and topologies by name.

A name is an expression that can be typed and stored: `torus(16, 16)`, `line(optimal_circulant(16), 3)`,
`product(uniring(1, 4), uniring(1, 8))`, `cayley(metacyclic(64, 16, 43), 806, 372, 475, 133)`.
"""

import ast
from collections.abc import Callable, Iterator
from typing import Any

from trainkit.collectives.direct._digraph import MOST_NODES, Digraph
from trainkit.collectives.direct._expansions import degree_expansion, line, power, product
from trainkit.collectives.direct._family import Facts
from trainkit.collectives.direct._geometry import GEOMETRY, flags
from trainkit.collectives.direct._groups import Metacyclic, cayley
from trainkit.collectives.direct._rings import RINGS, circulant, dicirculant

FAMILIES = {family.name: family for family in (*RINGS, *GEOMETRY)}

_MAKERS: dict[str, Callable[..., Any]] = {
    **{name: family.build for name, family in FAMILIES.items()},
    "circulant": circulant,
    "dicirculant": dicirculant,
    "line": line,
    "degree_expansion": degree_expansion,
    "product": product,
    "power": power,
    "flags": flags,
    "metacyclic": Metacyclic,
    "cayley": cayley,
}


def members(nodes: int, degree: int, *, directed: bool = True) -> Iterator[tuple[str, Facts]]:
    """Names and figures of the catalogue's topologies of N hosts and degree d.

    Args:
        nodes: N.
        degree: d.
        directed: also those whose links carry one way only.
    """
    for family in FAMILIES.values():
        if directed or family.symmetric:
            for setting in family.settings(nodes, degree):
                yield f"{family.name}({', '.join(map(str, setting))})", family.facts(*setting)


def build(name: str) -> Digraph:
    """The topology of a name.

    Raises:
        ValueError: the name is no such expression, a family is unknown, or its parameters do not fit.
    """
    try:
        tree = ast.parse(name, mode="eval").body
    except (SyntaxError, ValueError, RecursionError):
        raise ValueError(f"a topology is named like torus(4, 8) or line(kautz(4, 20)), got {name!r}") from None
    made = _value(tree)
    if not isinstance(made, Digraph):
        raise ValueError(f"{name!r} names no topology: a group goes into cayley(group, generator, ...)")
    if not 2 <= made.nodes <= MOST_NODES:
        raise ValueError(f"a topology has 2 to {MOST_NODES} hosts, {name!r} has {made.nodes}")
    return made


def cayley_parts(name: str) -> tuple[Metacyclic, list[int]] | None:
    """The group and the generators in the name of a Cayley digraph; None for other topologies."""
    match ast.parse(name, mode="eval").body:
        case ast.Call(func=ast.Name(id="cayley"), args=[group, *generators]):
            made = _value(group)
            elements = [g for g in map(_value, generators) if isinstance(g, int)]
            return (made, elements) if isinstance(made, Metacyclic) else None
        case _:
            return None


def _value(tree: ast.expr) -> "Digraph | Metacyclic | int":
    match tree:
        case ast.Constant(value=int() as number):
            return number
        case ast.Call(func=ast.Name(id=maker), args=arguments, keywords=[]):
            if maker not in _MAKERS:
                raise ValueError(f"no topology {maker!r}: choose from {', '.join(sorted(_MAKERS))}")
            values = [_value(argument) for argument in arguments]
            try:
                made: Digraph | Metacyclic = _MAKERS[maker](*values)
            except (
                TypeError,
                AttributeError,
                ZeroDivisionError,
                IndexError,
                StopIteration,
                OverflowError,
                MemoryError,
            ):
                raise ValueError(f"{ast.unparse(tree)}: the parameters do not fit {maker}") from None
            return made
        case _:
            raise ValueError(f"a topology's name is made of families and whole numbers, got {ast.unparse(tree)!r}")
