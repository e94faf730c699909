"""What the driver says of a host's GPUs, and the links inside a host that follow from it."""

import logging
import re
import shutil
import subprocess
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from trainkit.collectives._topology import TopologyError
from trainkit.collectives.fabrics import from_nvidia_smi

_log = logging.getLogger(__name__)
Links = list[tuple[str, str, Fraction]]

_PCIE_MBYTES = {1: 250, 2: 500, 3: 985, 4: 1969, 5: 3938, 6: 7563}
"""MB/s of a lane by generation."""
_NVLINK_GOODPUT = Fraction(62, 100)
"""Of what the driver says: NCCL's all-reduce of 256 MB moves 298 to 304 GB/s over 18 links of 26.6 (two H100 or H200)."""
_TIMEOUT_S = 30.0


def read_devices() -> dict[str, Any]:
    """The driver's view of this host's GPUs.

    Returns:
        "topology" (`nvidia-smi topo -m`), "nvlink" and "pcie" (MB/s of one NVLink and of a slot); empty without GPUs.
    """
    if shutil.which("nvidia-smi") is None:
        return {}
    matrix = _asked("topo", "-m")
    if "GPU0" not in matrix:
        return {}
    found: dict[str, Any] = {"topology": matrix}
    links = re.findall(r"Link \d+: ([\d.]+) GB/s", _asked("nvlink", "--status"))
    if links:
        found["nvlink"] = round(1000 * max(map(float, links)))
    slot = re.match(
        r"(\d+), (\d+)", _asked("--query-gpu=pcie.link.gen.max,pcie.link.width.max", "--format=csv,noheader")
    )
    if slot and int(slot[1]) in _PCIE_MBYTES:
        found["pcie"] = _PCIE_MBYTES[int(slot[1])] * int(slot[2])
    return found


def _asked(*arguments: str) -> str:
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def inside(host: str, ranks: int, devices: Mapping[str, Any], loopback: float | None) -> tuple[list[str], Links]:
    """The ranks of one host and the links between them and the host's own vertex, Mbit/s.

    Args:
        host: its name; with one rank it is the rank.
        ranks: processes on it.
        devices: of `read_devices`.
        loopback: bits/s between two of its processes, where there are no GPUs.
    """
    if ranks == 1:
        return [host], []
    text = devices.get("topology")
    pcie, nvlink = (_rate(devices, key, usual) for key, usual in (("pcie", 25_000), ("nvlink", 25_000)))
    if isinstance(text, str):
        try:
            box = from_nvidia_smi(text, nvlink=int(nvlink * _NVLINK_GOODPUT), pcie=pcie)
        except TopologyError as error:
            _log.warning("%s: what nvidia-smi says of its GPUs cannot be used, the loopback is: %s", host, error)
            box = None
        if box is not None and len(box.compute_nodes) >= ranks:
            names = [f"{host}.{gpu}" for gpu in box.compute_nodes]
            unused = set(box.compute_nodes[ranks:])
            links = [(f"{host}.{u}", f"{host}.{v}", 8 * rate) for u, v, rate in box.links if not {u, v} & unused]
            hubs = [name for name in box.switches if not name.startswith("NVSwitch")]
            # A PCIe tree has the GPUs' slots already: the host is where it ends.
            ends = [f"{host}.{hubs[-1]}"] if hubs else names[:ranks]
            rate = Fraction(8 * pcie * (ranks if hubs else 1))
            return names[:ranks], links + [(u, v, rate) for end in ends for u, v in ((end, host), (host, end))]
    names = [f"{host}.{local}" for local in range(ranks)]
    rate = Fraction(max(1, round((loopback or 0.0) / 1e6)))
    return names, [(u, v, rate) for name in names for u, v in ((name, host), (host, name))]


def _rate(devices: Mapping[str, Any], key: str, usual: int) -> int:
    value = devices.get(key)
    return value if isinstance(value, int) and 0 < value < 10**8 else usual
