"""An all-reduce for two DGX A100 boxes as an MSCCL algorithm file and an MSCCL++ plan.

python examples/forest_export.py FOLDER
"""

import sys
from pathlib import Path

from trainkit.collectives.fabrics import dgx_a100
from trainkit.collectives.trees import fit

folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
for runtime, suffix in (("msccl", "xml"), ("mscclpp", "json")):
    fitted = fit(dgx_a100(2), "allreduce", runtime)
    target = folder / f"allreduce_2x8.{suffix}"
    target.write_text(fitted.text)
    print(f"{target}: {float(fitted.loss):.2%} slower than the optimum")
