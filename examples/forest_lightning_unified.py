"""Lightning's own small model under the package `lightning` on 8 CPU processes, its gradients along the trees of a network.

python examples/forest_lightning_unified.py examples/forest_two_islands.json
"""

import sys

import lightning as L
from lightning.pytorch.demos.boring_classes import BoringModel

from trainkit.lightning import ForestStrategy

if __name__ == "__main__":
    strategy = ForestStrategy(topology=sys.argv[1] if len(sys.argv) > 1 else "examples/forest_two_islands.json")
    trainer = L.Trainer(
        accelerator="cpu", devices=int(sys.argv[2]) if len(sys.argv) > 2 else 8, strategy=strategy, max_steps=20,
        logger=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(BoringModel())
    print(strategy.counters())
