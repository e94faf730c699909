"""Networks read from `nvidia-smi topo -m`.

The matrix says how two devices reach each other: NV4, over four NVLinks; PIX, below one PCIe switch; PXB, over several;
PHB, over a host bridge; NODE, between host bridges of a NUMA node; SYS (once SOC), between NUMA nodes.
"""

import re
from collections.abc import Mapping, Sequence

from trainkit.collectives._topology import Topology, TopologyError
from trainkit.collectives.fabrics._build import Links, both, build
from trainkit.collectives.fabrics._pcie import NEARNESS, pcie_tree

_CELL = re.compile(r"X|NV\d+|NV#|PIX|PXB|PHB|NODE|SYS|SOC")
_CELLS = re.compile(rf"(?:{_CELL.pattern})+")
_ESCAPE = re.compile(r"\x1b?\[\d*(?:;\d+)*m")  # terminals and logs lose the escape character
_MOST_NVLINKS = 18
"""NVLinks of a GPU at most: Hopper's. More in a row of the matrix are a switch's."""
_HOPPER = 18
"""A GPU with so many has a PCIe slot of the fifth generation."""

Matrix = Mapping[tuple[str, str], str]


def from_nvidia_smi(
    text: str, *, count: int = 1, nvlink: int = 25, nic: int = 50, pcie: int | None = None, socket: int = 20
) -> Topology:
    """The network of `count` equal machines from the output of `nvidia-smi topo -m` on one of them.

    NVLinks are links between two GPUs, unless a row of the matrix has more of them than a GPU has: then GPUs that all see
    each other over equally many hang on an NVSwitch. Where NVLinks do not join all GPUs the PCIe tree does, and each GPU
    reaches everything else through its one slot. Each GPU uses the adapters nearest to it, which share one network.

    Args:
        text: the whole output.
        count: machines.
        nvlink: GB/s of one NVLink.
        nic: GB/s of an adapter.
        pcie: GB/s of a PCIe slot; 50 beside 18 NVLinks (fifth generation), 25 else (fourth).
        socket: GB/s between two NUMA nodes.

    Raises:
        TopologyError: the text has no matrix of GPUs, or a cell that says no distance; the message names the cell.
    """
    names, cells = _matrix(text)
    gpus = [name for name in names if re.fullmatch(r"GPU\d+", name)]
    adapters = [name for name in names if name not in gpus]
    if count > 1 and not adapters:
        raise TopologyError(f"{count} machines need network adapters, the matrix shows none")
    wide = {(u, v): int(cells[u, v][2:]) for u in gpus for v in gpus if u != v and cells[u, v].startswith("NV")}
    pcie = pcie or (50 if _HOPPER in wide.values() else 25)
    near = {pair: NEARNESS[cell] for pair, cell in cells.items() if cell in NEARNESS}
    used = {gpu: _nearest(gpu, adapters, near) for gpu in gpus} if count > 1 else {}
    inside = _nvlinks(gpus, wide, nvlink)
    joined = _joined(gpus, inside)
    inside += pcie_tree(
        gpus, [] if joined and count == 1 else adapters, near, used, pcie, nic, socket, whole=not joined
    )
    links: Links = []
    for box in range(count):
        here = f"{box}." if count > 1 else ""
        links += [(here + u, here + v, rate) for u, v, rate in inside]
        for name in sorted({name for mine in used.values() for name in mine}):
            links += both(here + name, "network", nic)
    compute = [f"{box}.{gpu}" if count > 1 else gpu for box in range(count) for gpu in gpus]
    return build(f"{count} x {len(gpus)} GPUs", compute, links, "GB/s")


def _matrix(text: str) -> tuple[list[str], Matrix]:
    """(devices in the order of the columns, (row, column) -> cell)."""
    rows = [_ESCAPE.sub("", line).split() for line in text.splitlines()]
    at = next((i for i, row in enumerate(rows) if row[:1] == ["GPU0"] and "X" not in row), None)
    if at is None:
        raise TopologyError("this is not the output of `nvidia-smi topo -m`: no row of GPU names was found")
    header = rows[at]
    labels = {row[0] for row in rows[at + 1 :] if row}
    # The names end where the affinities begin.
    end = next(
        (i for i, name in enumerate(header) if name in ("CPU", "NUMA", "GPU") and name not in labels), len(header)
    )
    names = header[:end]
    cells: dict[tuple[str, str], str] = {}
    for row in rows[at + 1 :]:
        if row and row[0] in names and not any(pair[0] == row[0] for pair in cells):
            found = _row(row[1:], len(names))
            if len(found) < len(names):
                seen = row[1 + len(found)] if len(row) > 1 + len(found) else "nothing"
                raise TopologyError(
                    f"row {row[0]}, column {names[len(found)]} must be X, NV4, PIX, PXB, PHB, NODE or SYS, got {seen!r}"
                )
            cells |= {(row[0], name): cell for name, cell in zip(names, found, strict=True)}
    for u in names:
        for v in names:
            cell = cells.get((u, v), cells.get((v, u)))
            if cell is None:
                if u.startswith("GPU") or v.startswith("GPU"):
                    raise TopologyError(f"row {u} has no cell for {v}: give the whole output")
                cell = "SYS"
            if cell == "NV#":
                raise TopologyError(
                    f"row {u}, column {v} says 'NV#': the driver counted no NVLinks, bring them up first"
                )
            if (cell == "X") != (u == v):
                raise TopologyError(f"row {u}, column {v} says {cell!r}: only a device and itself are X")
            if cells.get((v, u), cell) != cell:
                raise TopologyError(f"row {u}, column {v} says {cell!r}, row {v}, column {u} {cells[v, u]!r}")
            cells[u, v] = cell
    return names, cells


def _row(words: Sequence[str], columns: int) -> list[str]:
    """The row's cells; long ones run into each other."""
    found: list[str] = []
    for word in words:
        if len(found) >= columns or not _CELLS.fullmatch(word):
            break
        found += _CELL.findall(word)
    return found[:columns]


def _nvlinks(gpus: Sequence[str], wide: Mapping[tuple[str, str], int], nvlink: int) -> Links:
    links: Links = []
    switched: set[str] = set()
    for gpu in gpus:
        peers = [v for v in gpus if (gpu, v) in wide]
        total = sum(wide[gpu, v] for v in peers)
        if total <= _MOST_NVLINKS:
            continue
        group = {gpu, *peers}
        widths = {wide.get((u, v), 0) for u in group for v in group if u != v}
        if len(widths) > 1:
            odd = next(
                (u, v) for u in sorted(group) for v in sorted(group) if u != v and wide.get((u, v)) != max(widths)
            )
            raise TopologyError(
                f"row {gpu} counts {total} NVLinks, a GPU has at most {_MOST_NVLINKS}: behind a switch all are equal, but "
                f"row {odd[0]}, column {odd[1]} differs from NV{max(widths)}"
            )
        if gpu not in switched:
            hub = f"NVSwitch{len(switched)}" if switched else "NVSwitch"
            links += [link for one in sorted(group, key=gpus.index) for link in both(one, hub, nvlink * max(widths))]
            switched |= group
    links += [(u, v, nvlink * w) for (u, v), w in wide.items() if u not in switched and v not in switched]
    return links


def _joined(gpus: Sequence[str], links: Links) -> bool:
    reached, stack = {gpus[0]}, [gpus[0]]
    while stack:
        at = stack.pop()
        for u, v, _ in links:
            if u == at and v not in reached:
                reached.add(v)
                stack.append(v)
    return reached.issuperset(gpus)


def _nearest(gpu: str, adapters: Sequence[str], near: Mapping[tuple[str, str], int]) -> list[str]:
    least = min(near[gpu, name] for name in adapters)
    return [name for name in adapters if near[gpu, name] == least]
