"""Networks read from `nvidia-smi topo -m`."""

import re

from trainkit.collectives._topology import Topology, TopologyError
from trainkit.collectives.fabrics._build import Links, both, build

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
    return build(name, [f"{b}.{gpu}" if count > 1 else gpu for b in range(count) for gpu in gpus], links, "GB/s")
