"""Networks read from `rocm-smi --showtopo`."""

import re

from trainkit.collectives._topology import Topology, TopologyError
from trainkit.collectives.fabrics._build import Links, build
from trainkit.collectives.fabrics._pcie import NEARNESS, pcie_tree

_TABLES = {"hops": "Hops between two GPUs", "kind": "Link Type between two GPUs", "rate": "Bandwidth between two GPUs"}


def from_rocm_smi(text: str, *, xgmi: int = 50, pcie: int = 25, socket: int = 20) -> Topology:
    """The network of a machine from the output of `rocm-smi --showtopo`, with that of `--shownodesbw` appended or not.

    Two GPUs one hop apart over XGMI have a link of their own; farther ones reach each other over these. Where XGMI does
    not join all GPUs the slots of their NUMA nodes do.

    Args:
        text: the output.
        xgmi: GB/s of an XGMI link per direction, where the output has no table of bandwidths.
        pcie: GB/s of a PCIe slot.
        socket: GB/s between two NUMA nodes.

    Raises:
        TopologyError: a table is missing or a cell says nothing; the message names it.
    """
    table = {key: _table(text, title) for key, title in _TABLES.items()}
    if not table["hops"] or not table["kind"]:
        raise TopologyError("this is not the output of `rocm-smi --showtopo`: it has tables of hops and of link types")
    gpus = sorted({name for name, _ in table["kind"]}, key=lambda name: int(name[3:]))
    links: Links = []
    for u in gpus:
        for v in gpus:
            kind, hops = (table[key].get((u, v)) for key in ("kind", "hops"))
            if u != v and (kind not in ("XGMI", "PCIE") or hops is None or not hops.isdigit()):
                raise TopologyError(
                    f"row {u}, column {v}: a link is XGMI or PCIE and some hops long, got {kind!r}, {hops!r}"
                )
            if u != v and kind == "XGMI" and hops == "1":
                links.append((u, v, _rate(table["rate"].get((u, v)), xgmi)))
    node = dict(re.findall(r"GPU\[(\d+)\]\s*:\s*\(Topology\) Numa Node:\s*(-?\d+)", text))
    near = {
        (u, v): NEARNESS["NODE" if node.get(u[3:], "0") == node.get(v[3:], "0") else "SYS"] for u in gpus for v in gpus
    }
    joined = {gpus[0]}
    while more := {v for u, v, _ in links if u in joined} - joined:
        joined |= more
    if len(joined) < len(gpus):
        links += pcie_tree(gpus, [], near, {}, pcie, pcie, socket, whole=True)
    return build(f"{len(gpus)} GPUs", gpus, links, "GB/s")


def _table(text: str, title: str) -> dict[tuple[str, str], str]:
    found: dict[tuple[str, str], str] = {}
    _, _, after = text.partition(title)
    header: list[str] = []
    for line in after.splitlines()[1:]:
        words = line.split()
        if line.startswith("==") or (header and not words):
            break
        if not header:
            header = words
        elif words[0] in header:
            if len(words) != len(header) + 1:
                raise TopologyError(f"{title}: row {words[0]} must have {len(header)} cells, got {len(words) - 1}")
            found |= {(words[0], name): cell for name, cell in zip(header, words[1:], strict=True)}
    return found


def _rate(cell: str | None, usual: int) -> int:
    """Of "50000-200000", MB/s from one link to all between two GPUs, all."""
    match = re.fullmatch(r"(?:\d+-)?(\d+)", cell or "")
    return int(match[1]) // 1000 if match and int(match[1]) >= 1000 else usual
