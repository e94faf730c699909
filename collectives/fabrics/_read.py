"""A network from whatever file somebody has of it."""

from pathlib import Path

from trainkit.collectives._topology import Topology, TopologyError
from trainkit.collectives.fabrics._infiniband import from_ibnetdiscover
from trainkit.collectives.fabrics._rocm import from_rocm_smi
from trainkit.collectives.fabrics._slurm import from_slurm, is_slurm
from trainkit.collectives.fabrics._smi import from_nvidia_smi


def read_network(path: str | Path, *, machines: int = 1) -> Topology:
    """The network in a file: JSON (`Topology.load`), or a tool's own output, told apart by what is in it.

    Args:
        path: JSON, or the output of `nvidia-smi topo -m`, `rocm-smi --showtopo` or `ibnetdiscover`, or Slurm's
            topology.conf or topology.yaml.
        machines: how many equal machines, for `nvidia-smi topo -m`.

    Raises:
        TopologyError: as the readers; the message names the cell or line.
    """
    text = Path(path).read_text()
    if text.lstrip("\ufeff \t\r\n")[:1] in ("{", "[") and "GPU0" not in text.partition("\n")[0]:
        network = Topology.load(path)
    elif "(Topology)" in text or "between two GPUs" in text:
        network = from_rocm_smi(text)
    elif "GPU0" in text:
        return from_nvidia_smi(text, count=machines)
    elif '"S-' in text or '"H-' in text:
        network = from_ibnetdiscover(text)
    elif is_slurm(text):
        network = from_slurm(text)
    else:
        return Topology.load(path)
    if machines > 1:
        raise TopologyError(
            f"{machines} machines are made of one machine's `nvidia-smi topo -m`; this file is another's"
        )
    return network
