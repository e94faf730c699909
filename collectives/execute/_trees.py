"""Trees as plain JSON, from rank 0 to the others; what arrives is checked like any stranger's."""

from fractions import Fraction
from typing import Any

import numpy as np

from trainkit.collectives._said import topology_of, topology_said
from trainkit.collectives._topology import Topology
from trainkit.collectives.trees import AllreduceForest, Forest
from trainkit.collectives.trees._flat import Flat

_COLUMNS = ("root", "multiplicity", "edge_start", "edge_tail", "edge_head", "path_start", "path")


def trees_said(trees: Forest | AllreduceForest) -> dict[str, Any]:
    """What rank 0 says."""
    said: dict[str, Any] = {"topology": topology_said(trees.topology)}
    if isinstance(trees, Forest):
        return said | {"forest": _forest_said(trees)}
    both = {"reduce": _forest_said(trees.reduce), "broadcast": _forest_said(trees.broadcast)}
    return said | {"time_per_byte": str(trees.time_per_byte), "bound": str(trees.bound), **both}


def trees_of(said: Any) -> Forest | AllreduceForest:
    """What another rank makes of it, verified on every physical link.

    Raises:
        ValueError: it makes no sense, or the trees break a rule.
    """
    try:
        topology = topology_of(said["topology"])
        if "forest" in said:
            return _forest_of(topology, said["forest"])
        reducing, broadcasting = (_forest_of(topology, said[key]) for key in ("reduce", "broadcast"))
        time_per_byte, bound = Fraction(said["time_per_byte"]), Fraction(said["bound"])
        made = AllreduceForest(topology, time_per_byte, bound, reducing, broadcasting)
        made.verify()
    except (KeyError, TypeError, IndexError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    return made


def _forest_said(forest: Forest) -> dict[str, Any]:
    return {
        "collective": forest.collective,
        "k": forest.k,
        "unit": str(forest.unit),
        "exact": forest.exact,
        "members": list(forest.members),
        "weight": forest.weight.tolist(),
        "flat": {column: getattr(forest.flat, column).tolist() for column in _COLUMNS},
    }


def _forest_of(topology: Topology, said: Any) -> Forest:
    size = len(topology.nodes)
    columns = {column: _whole(said["flat"][column]) for column in _COLUMNS}
    for column in ("root", "edge_tail", "edge_head", "path"):
        if ((columns[column] < 0) | (columns[column] >= size)).any():
            raise ValueError(f"{column} must be vertices below {size}")
    trees, edges = len(columns["root"]), len(columns["edge_tail"])
    for column, length in (("edge_start", trees), ("path_start", edges)):
        starts, end = columns[column], edges if column == "edge_start" else len(columns["path"])
        if len(starts) != length + 1 or starts[0] != 0 or starts[-1] != end or (np.diff(starts) < 0).any():
            raise ValueError(f"{column} must run from 0 to {end} in {length} steps")
    if len(columns["multiplicity"]) != trees or len(columns["edge_head"]) != edges:
        raise ValueError("columns of trees must be equally long")
    weight, members = _whole(said["weight"]), tuple(said["members"])
    if len(weight) != size or not set(members) <= set(topology.compute_nodes):
        raise ValueError("weight is a number a vertex, members are compute nodes")
    made = Forest(
        topology, said["collective"], int(said["k"]), Fraction(said["unit"]), bool(said["exact"]), members, weight,
        Flat(**columns),
    )  # fmt: skip
    made.verify()
    return made


def _whole(numbers: Any) -> Any:
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise ValueError(f"a column of trees is a list of whole numbers, got {str(numbers)[:40]}")
    return np.array(numbers, dtype=np.int64)
