"""Named fabrics.

Compute nodes are numbered level by level (pod, box, device), which is where the search for symmetry looks. Rates are per
direction.
"""

from trainkit.collectives.fabrics._infiniband import from_ibnetdiscover as from_ibnetdiscover
from trainkit.collectives.fabrics._machines import boxes as boxes
from trainkit.collectives.fabrics._machines import dgx_a100 as dgx_a100
from trainkit.collectives.fabrics._machines import dgx_h100 as dgx_h100
from trainkit.collectives.fabrics._machines import fat_tree as fat_tree
from trainkit.collectives.fabrics._machines import mi250 as mi250
from trainkit.collectives.fabrics._machines import rail_fat_tree as rail_fat_tree
from trainkit.collectives.fabrics._read import read_network as read_network
from trainkit.collectives.fabrics._regular import dragonfly as dragonfly
from trainkit.collectives.fabrics._regular import hypercube as hypercube
from trainkit.collectives.fabrics._regular import kautz as kautz
from trainkit.collectives.fabrics._regular import mesh as mesh
from trainkit.collectives.fabrics._regular import ring as ring
from trainkit.collectives.fabrics._regular import star as star
from trainkit.collectives.fabrics._regular import torus as torus
from trainkit.collectives.fabrics._rocm import from_rocm_smi as from_rocm_smi
from trainkit.collectives.fabrics._slurm import from_slurm as from_slurm
from trainkit.collectives.fabrics._smi import from_nvidia_smi as from_nvidia_smi
