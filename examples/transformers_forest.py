"""transformers.Trainer on CPUs with a tiny GPT-2: gradients along trees, by a callback or by the backend.

torchrun --nproc-per-node 8 examples/transformers_forest.py [--backend] [--topology examples/forest_two_islands.json]
"""

import argparse
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from trainkit.collectives import ForestState, Topology
from trainkit.integrations.accelerate import register_backend
from trainkit.integrations.transformers import CommHook

parser = argparse.ArgumentParser()
parser.add_argument("--topology", default="examples/forest_two_islands.json")
parser.add_argument("--backend", action="store_true", help="by ddp_backend= instead of a callback")
given = parser.parse_args()
topology = Topology.load(given.topology)
if given.backend:
    register_backend(topology)

torch.manual_seed(0)
rows = torch.randint(0, 64, (512, 16))
data = [{"input_ids": row, "labels": row} for row in rows]
model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2))
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        ddp_backend="trainkit" if given.backend else None,
        ddp_find_unused_parameters=False,
        per_device_train_batch_size=4,
        num_train_epochs=2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=10,
    )
    callbacks = [] if given.backend else [CommHook(ForestState(topology=topology))]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
    trainer.train()
del trainer  # before the group: see docs/troubleshooting.md
torch.distributed.destroy_process_group()
