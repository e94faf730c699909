"""Machines and the networks between them.

Vendor rates, per direction: NVLink 3 of an A100 300 GB/s and of an H100 450 GB/s; ConnectX-6 25 GB/s, ConnectX-7 50 GB/s;
Infinity Fabric 50 GB/s a link.
"""

import re

from trainkit.collectives._topology import Topology
from trainkit.collectives.fabrics._build import Links, Rate, at_least, both, build


def boxes(
    count: int, size: int, *, inside: Rate, uplink: Rate, unit: str | None = "GB/s", name: str = "boxes"
) -> Topology:
    """Boxes of devices on a switch each ("nv0" ..), every device with an uplink of its own to one switch "IB"."""
    at_least(1, count=count, size=size)
    compute = [f"g{b}_{i}" for b in range(count) for i in range(size)]
    links: Links = []
    for b in range(count):
        for i in range(size):
            links += both(f"g{b}_{i}", f"nv{b}", inside)
            if count > 1:
                links += both(f"g{b}_{i}", "IB", uplink)
    return build(f"{name} {count}x{size}", compute, links, unit)


def dgx_h100(count: int) -> Topology:
    """DGX H100 boxes of 8: NVSwitch at 450 GB/s, a 50 GB/s adapter per GPU on one non-blocking network."""
    return boxes(count, 8, inside=450, uplink=50, name="DGX H100")


def dgx_a100(count: int) -> Topology:
    """DGX A100 boxes of 8: NVSwitch at 300 GB/s, a 25 GB/s adapter per GPU, even and odd adapters on two networks."""
    at_least(1, count=count)
    compute = [f"{b}.GPU.{i}" for b in range(count) for i in range(8)]
    links: Links = []
    for b in range(count):
        for i in range(8):
            links += both(f"{b}.GPU.{i}", f"{b}.NVSwitch", 300)
            if count > 1:
                links += both(f"{b}.GPU.{i}", f"{b}.NIC.{i}", 25) + both(f"{b}.NIC.{i}", f"IB.{i % 2}", 25)
    return build(f"DGX A100 {count}x8", compute, links, "GB/s")


# An MI250 box: (die, die, Infinity Fabric links between them)
_MI250 = (
    "0-1:4 0-4:2 0-8:1 1-5:1 1-9:1 1-10:1 2-3:4 2-6:1 2-9:1 2-10:1 3-7:2 3-11:1 4-5:4 4-6:1 5-6:1 5-7:1 6-7:4 8-9:4 8-12:2 "
    "9-13:1 10-11:4 10-14:1 11-15:2 12-13:4 12-14:1 13-14:1 13-15:1 14-15:4"
)


def mi250(count: int) -> Topology:
    """MI250 boxes of 16 dies: Infinity Fabric of 50 GB/s a link, a 16 GB/s share of the adapters per die."""
    at_least(1, count=count)
    links: Links = []
    for b in range(count):
        for word in _MI250.split():
            u, v, times = map(int, re.split("[-:]", word))
            links += both(f"{b}.GPU.{u}", f"{b}.GPU.{v}", 50 * times)
        if count > 1:
            links += [link for i in range(16) for link in both(f"{b}.GPU.{i}", "IB", 16)]
    return build(f"MI250 {count}x16", [f"{b}.GPU.{i}" for b in range(count) for i in range(16)], links, "GB/s")


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
    at_least(1, pods=pods, boxes_per_pod=boxes_per_pod, size=size, oversubscription=oversubscription)
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
    return build(f"rail fat-tree {pods}x{boxes_per_pod}x{size} {oversubscription}:1", compute, links, "GB/s")


def fat_tree(leaves: int, hosts: int, *, uplink: int = 50, oversubscription: int = 1) -> Topology:
    """Two levels: hosts on leaves, leaves on one spine, `oversubscription` : 1 between them."""
    at_least(1, leaves=leaves, hosts=hosts, oversubscription=oversubscription)
    down = uplink * hosts
    if down % oversubscription:
        raise ValueError(f"a leaf's {down} down do not divide by oversubscription={oversubscription}")
    links = [link for n in range(leaves) for i in range(hosts) for link in both(f"h{n}_{i}", f"leaf{n}", uplink)]
    if leaves > 1:
        links += [link for n in range(leaves) for link in both(f"leaf{n}", "spine", down // oversubscription)]
    compute = [f"h{n}_{i}" for n in range(leaves) for i in range(hosts)]
    return build(f"fat-tree {leaves}x{hosts} {oversubscription}:1", compute, links, "GB/s")
