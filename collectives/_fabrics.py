"""Named fabrics.

Compute nodes are numbered level by level (pod, box, device), which is where the search for symmetry looks. Rates are per
direction. Vendor rates: NVLink 3 of an A100 300 GB/s and of an H100 450 GB/s; ConnectX-6 25 GB/s, ConnectX-7 50 GB/s;
Infinity Fabric 50 GB/s a link.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise, product

from trainkit.collectives._topology import Topology, TopologyError

Rate = int | str
Links = list[tuple[str, str, Rate]]


def both(u: str, v: str, rate: Rate) -> Links:
    """A link in each direction."""
    return [(u, v, rate), (v, u, rate)]


def _build(name: str, compute: Sequence[str], links: Iterable[tuple[str, str, Rate]], unit: str | None) -> Topology:
    rows = list(links)
    nodes = list(dict.fromkeys([*compute, *(end for u, v, _ in rows for end in (u, v))]))
    return Topology(name, nodes, compute, rows, unit=unit)


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def ring(size: int, rate: Rate = 1, *, both_ways: bool = True, unit: str | None = None) -> Topology:
    """Compute nodes 0 .. size-1 in a circle."""
    _at_least(2, size=size)
    pairs = {(i, (i + 1) % size) for i in range(size)}
    if both_ways:
        pairs |= {(v, u) for u, v in pairs}
    links: Links = [(str(u), str(v), rate) for u, v in sorted(pairs)]
    return _build(f"ring {size}", [str(i) for i in range(size)], links, unit)


def star(rates: Sequence[Rate], *, unit: str | None = None) -> Topology:
    """Hosts on one switch "switch", each at its own rate."""
    links = [link for i, rate in enumerate(rates) for link in both(str(i), "switch", rate)]
    return _build(f"star {len(rates)}", [str(i) for i in range(len(rates))], links, unit)


def mesh(sides: Sequence[int], rate: Rate = 1, *, wrap: bool = False, unit: str | None = None) -> Topology:
    """A grid of compute nodes; `wrap` closes every side to a torus."""
    _at_least(1, **{f"side_{i}": side for i, side in enumerate(sides)})
    names = {at: "_".join(map(str, at)) for at in product(*(range(side) for side in sides))}
    pairs = set()
    for at in names:
        for axis, side in enumerate(sides):
            if at[axis] + 1 < side or (wrap and side > 1):
                to = (*at[:axis], (at[axis] + 1) % side, *at[axis + 1 :])
                pairs |= {(at, to), (to, at)}
    links: Links = [(names[u], names[v], rate) for u, v in sorted(pairs)]
    kind = "torus" if wrap else "mesh"
    return _build(f"{kind} {'x'.join(map(str, sides))}", list(names.values()), links, unit)


def torus(sides: Sequence[int], rate: Rate = 1, *, unit: str | None = None) -> Topology:
    """A grid closed in every direction."""
    return mesh(sides, rate, wrap=True, unit=unit)


def hypercube(dimension: int, rate: Rate = 1, *, unit: str | None = None) -> Topology:
    """2^dimension compute nodes, linked where their numbers differ in one bit."""
    _at_least(1, dimension=dimension)
    size = 2**dimension
    links: Links = [(str(u), str(u ^ 1 << bit), rate) for u in range(size) for bit in range(dimension)]
    return _build(f"hypercube {dimension}", [str(u) for u in range(size)], links, unit)


def kautz(degree: int, length: int, rate: Rate = 1, *, unit: str | None = None) -> Topology:
    """Kautz digraph: words of `length` + 1 letters out of `degree` + 1, no letter twice in a row; one-way links."""
    _at_least(1, degree=degree, length=length)
    letters = range(degree + 1)
    words = [w for w in product(letters, repeat=length + 1) if all(a != b for a, b in pairwise(w))]
    links: Links = [
        ("".join(map(str, w)), "".join(map(str, (*w[1:], x))), rate) for w in words for x in letters if x != w[-1]
    ]
    return _build(f"kautz {degree} {length}", ["".join(map(str, w)) for w in words], links, unit)


def dragonfly(groups: int, routers: int, hosts: int, *, host: Rate = 1, local: Rate = 1, across: Rate = 1) -> Topology:
    """Groups of fully meshed routers with hosts; one link between any two groups, dealt over the routers."""
    _at_least(1, routers=routers, hosts=hosts)
    _at_least(2, groups=groups)
    compute = [f"h{g}_{r}_{i}" for g in range(groups) for r in range(routers) for i in range(hosts)]
    links: Links = []
    for g in range(groups):
        for r in range(routers):
            for i in range(hosts):
                links += both(f"h{g}_{r}_{i}", f"r{g}_{r}", host)
            for other in range(r + 1, routers):
                links += both(f"r{g}_{r}", f"r{g}_{other}", local)
        for far in range(g + 1, groups):
            links += both(f"r{g}_{(far - g - 1) % routers}", f"r{far}_{(groups - 1 - far + g) % routers}", across)
    return _build(f"dragonfly {groups}x{routers}x{hosts}", compute, links, None)


def boxes(
    count: int, size: int, *, inside: Rate, uplink: Rate, unit: str | None = "GB/s", name: str = "boxes"
) -> Topology:
    """Boxes of devices on a switch each ("nv0" ..), every device with an uplink of its own to one switch "IB"."""
    _at_least(1, count=count, size=size)
    compute = [f"g{b}_{i}" for b in range(count) for i in range(size)]
    links: Links = []
    for b in range(count):
        for i in range(size):
            links += both(f"g{b}_{i}", f"nv{b}", inside)
            if count > 1:
                links += both(f"g{b}_{i}", "IB", uplink)
    return _build(f"{name} {count}x{size}", compute, links, unit)


def dgx_h100(count: int) -> Topology:
    """DGX H100 boxes of 8: NVSwitch at 450 GB/s, a 50 GB/s adapter per GPU on one non-blocking network."""
    return boxes(count, 8, inside=450, uplink=50, name="DGX H100")


def dgx_a100(count: int) -> Topology:
    """DGX A100 boxes of 8: NVSwitch at 300 GB/s, a 25 GB/s adapter per GPU, even and odd adapters on two networks."""
    _at_least(1, count=count)
    compute = [f"{b}.GPU.{i}" for b in range(count) for i in range(8)]
    links: Links = []
    for b in range(count):
        for i in range(8):
            links += both(f"{b}.GPU.{i}", f"{b}.NVSwitch", 300)
            if count > 1:
                links += both(f"{b}.GPU.{i}", f"{b}.NIC.{i}", 25) + both(f"{b}.NIC.{i}", f"IB.{i % 2}", 25)
    return _build(f"DGX A100 {count}x8", compute, links, "GB/s")


# An MI250 box: (die, die, Infinity Fabric links between them)
_MI250 = (
    "0-1:4 0-4:2 0-8:1 1-5:1 1-9:1 1-10:1 2-3:4 2-6:1 2-9:1 2-10:1 3-7:2 3-11:1 4-5:4 4-6:1 5-6:1 5-7:1 6-7:4 8-9:4 8-12:2 "
    "9-13:1 10-11:4 10-14:1 11-15:2 12-13:4 12-14:1 13-14:1 13-15:1 14-15:4"
)


def mi250(count: int) -> Topology:
    """MI250 boxes of 16 dies: Infinity Fabric of 50 GB/s a link, a 16 GB/s share of the adapters per die."""
    _at_least(1, count=count)
    links: Links = []
    for b in range(count):
        for word in _MI250.split():
            u, v, times = map(int, re.split("[-:]", word))
            links += both(f"{b}.GPU.{u}", f"{b}.GPU.{v}", 50 * times)
        if count > 1:
            links += [link for i in range(16) for link in both(f"{b}.GPU.{i}", "IB", 16)]
    return _build(f"MI250 {count}x16", [f"{b}.GPU.{i}" for b in range(count) for i in range(16)], links, "GB/s")


def rail_fat_tree(
    pods: int,
    boxes_per_pod: int,
    size: int = 8,
    *,
    inside: Rate = 450,
    uplink: int = 50,
    oversubscription: int = 1,
) -> Topology:
    """Rail-optimised fat-tree: device i of every box of a pod on leaf i of the pod, all leaves on a spine per rail.

    Args:
        pods: groups of boxes that share leaves.
        boxes_per_pod: boxes in each.
        size: devices in a box, and rails.
        inside: rate of a device into its box's switch.
        uplink: rate of a device into its leaf.
        oversubscription: a leaf's rate down over its rate up.

    Raises:
        ValueError: the leaf's rate up would not be whole.
    """
    _at_least(1, pods=pods, boxes_per_pod=boxes_per_pod, size=size, oversubscription=oversubscription)
    down = uplink * boxes_per_pod
    if down % oversubscription:
        raise ValueError(f"a leaf's {down} down do not divide by oversubscription={oversubscription}")
    compute = [f"g{p}_{b}_{i}" for p in range(pods) for b in range(boxes_per_pod) for i in range(size)]
    links: Links = []
    for p in range(pods):
        for b in range(boxes_per_pod):
            for i in range(size):
                links += both(f"g{p}_{b}_{i}", f"nv{p}_{b}", inside) + both(f"g{p}_{b}_{i}", f"leaf{p}_{i}", uplink)
        if pods > 1:
            links += [link for i in range(size) for link in both(f"leaf{p}_{i}", f"spine{i}", down // oversubscription)]
    return _build(f"rail fat-tree {pods}x{boxes_per_pod}x{size} {oversubscription}:1", compute, links, "GB/s")


def fat_tree(leaves: int, hosts: int, *, uplink: int = 50, oversubscription: int = 1) -> Topology:
    """Two levels: hosts on leaves, leaves on one spine, `oversubscription` : 1 between them."""
    _at_least(1, leaves=leaves, hosts=hosts, oversubscription=oversubscription)
    down = uplink * hosts
    if down % oversubscription:
        raise ValueError(f"a leaf's {down} down do not divide by oversubscription={oversubscription}")
    links = [link for n in range(leaves) for i in range(hosts) for link in both(f"h{n}_{i}", f"leaf{n}", uplink)]
    if leaves > 1:
        links += [link for n in range(leaves) for link in both(f"leaf{n}", "spine", down // oversubscription)]
    compute = [f"h{n}_{i}" for n in range(leaves) for i in range(hosts)]
    return _build(f"fat-tree {leaves}x{hosts} {oversubscription}:1", compute, links, "GB/s")


_NEARNESS = {"PIX": 0, "PXB": 1, "PHB": 2, "NODE": 3, "SYS": 4}


def from_nvidia_smi(text: str, *, count: int = 1, nvlink: int = 25, nic: int = 50, pcie: int = 25) -> Topology:
    """The network of `count` equal machines from the output of `nvidia-smi topo -m` on one of them.

    GPUs that all see each other over equally many NVLinks hang on an NVSwitch; other NVLinks are links of their own;
    without any, the GPUs share the PCIe root. Each GPU uses the adapters nearest to it, which share one network.

    Args:
        text: the whole output.
        count: machines.
        nvlink: GB/s of one NVLink.
        nic: GB/s of an adapter.
        pcie: GB/s of a GPU's PCIe slot.

    Raises:
        TopologyError: the text has no matrix of GPUs.
    """
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in text.splitlines()]
    header = next((row for row in rows if row[:1] == ["GPU0"] and "GPU0" not in row[1:]), None)
    if header is None:
        raise TopologyError("this is not the output of `nvidia-smi topo -m`: no row of GPU names was found")
    columns = [name for name in header if re.fullmatch(r"(GPU|NIC|mlx5_)\d+", name)]
    seen = {row[0]: row[1 : len(columns) + 1] for row in rows if row and row[0] in columns and row is not header}
    gpus = [name for name in columns if name.startswith("GPU")]
    adapters = [name for name in columns if name not in gpus]
    for name in gpus:
        if len(seen.get(name, ())) < len(columns):
            raise TopologyError(f"the row of {name} must have {len(columns)} entries, got {len(seen.get(name, ()))}")
    bonds = {(u, v): seen[u][columns.index(v)] for u in gpus for v in gpus if u != v}
    widths = {int(kind[2:]) if kind.startswith("NV") else 0 for kind in bonds.values()}
    links: Links = []
    for box in range(count):
        here = f"{box}." if count > 1 else ""
        if widths == {0} or (len(widths) == 1 and len(gpus) > 2):
            hub, rate = ("PCIe", pcie) if widths == {0} else ("NVSwitch", nvlink * max(widths))
            links += [link for gpu in gpus for link in both(here + gpu, here + hub, rate)]
        else:
            links += [
                (here + u, here + v, nvlink * int(kind[2:])) for (u, v), kind in bonds.items() if kind.startswith("NV")
            ]
        for gpu in gpus if count > 1 else ():
            far = {name: _NEARNESS.get(seen[gpu][columns.index(name)], 9) for name in adapters}
            for name in (name for name in adapters if far[name] == min(far.values())):
                links += both(here + gpu, here + name, pcie if pcie > nic else nic)
        for name in adapters if count > 1 else ():
            if any(end == here + name for _, end, _ in links):
                links += both(here + name, "network", nic)
    if count > 1 and not adapters:
        raise TopologyError(f"{count} machines need network adapters, the matrix shows none")
    name = f"{count} x {len(gpus)} GPUs"
    return _build(name, [f"{b}.{gpu}" if count > 1 else gpu for b in range(count) for gpu in gpus], links, "GB/s")
