"""The PCIe tree of a machine, from how near its devices are to each other."""

from collections.abc import Mapping, Sequence
from itertools import combinations

from trainkit.collectives.fabrics._build import Links, both

NEARNESS = {"PIX": 0, "PXB": 1, "PHB": 2, "NODE": 3, "SYS": 4, "SOC": 4}
_KINDS = ("PCIe switch", "PCIe switches", "host bridge", "NUMA node", "machine")
_MACHINE = len(_KINDS) - 1
_PROCESSOR = _KINDS[2:]


def pcie_tree(
    gpus: Sequence[str],
    adapters: Sequence[str],
    near: Mapping[tuple[str, str], int],
    used: Mapping[str, Sequence[str]],
    pcie: int,
    nic: int,
    socket: int,
    *,
    whole: bool,
) -> Links:
    """Links from devices to what they share, and on to the root.

    Each GPU has one slot: whatever it does over PCIe passes there. A switch has one slot upwards, a NUMA node one link.

    Args:
        gpus, adapters: the devices.
        near: pair of devices -> level at which they meet, as in `NEARNESS`; pairs joined by NVLink are not in it.
        used: GPU -> the adapters that it uses; others are left out.
        pcie, nic, socket: GB/s of a slot, an adapter, a link between NUMA nodes.
        whole: join all GPUs; else only each GPU and its adapters.
    """
    wanted = {name for mine in used.values() for name in mine}
    devices = [*gpus, *(name for name in adapters if name in wanted)]
    if not whole and not wanted:
        return []
    group = {name: name for name in devices}  # device -> the vertex that it is below
    slots = dict.fromkeys(devices, 1)  # vertex -> slots right below it
    links: Links = []
    for level, kind in enumerate(_KINDS):
        parts = _parts(devices, near, level) if level < _MACHINE else [devices]
        parts = [part for part in parts if len({group[name] for name in part}) > 1]
        if not whole:
            parts = [part for part in parts if _needed(part, group, used)]
        for number, part in enumerate(parts):
            here = f"{kind} {number}" if len(parts) > 1 else kind
            below = list(dict.fromkeys(group[name] for name in part))
            for child in below:
                if child in wanted:
                    rate = nic
                elif not child.startswith(_PROCESSOR):
                    rate = pcie
                else:
                    # Within a NUMA node nothing is narrower than the slots; between two there is one link.
                    rate = socket if level == _MACHINE else pcie * slots[child]
                links += both(child, here, rate)
            group |= dict.fromkeys(part, here)
            slots[here] = sum(slots[child] if child.startswith(_PROCESSOR) else 1 for child in below)
    return links


def _parts(devices: Sequence[str], near: Mapping[tuple[str, str], int], level: int) -> list[list[str]]:
    """Devices that meet at this level or below."""
    part = {name: {name} for name in devices}
    for u, v in combinations(devices, 2):
        if near.get((u, v), _MACHINE) <= level and part[u] is not part[v]:
            part[u] |= part[v]
            for name in part[v]:
                part[name] = part[u]
    return [sorted(members, key=devices.index) for members in {id(p): p for p in part.values()}.values()]


def _needed(part: Sequence[str], group: Mapping[str, str], used: Mapping[str, Sequence[str]]) -> bool:
    """Whether a GPU meets an adapter of its own here."""
    return any(group[gpu] != group[name] for gpu in part if gpu in used for name in used[gpu] if name in part)
