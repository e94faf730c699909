"""The demo's GPT trained with each wire: `python benchmarks/switchml/narrow.py [SIZE] [STEPS]`.

Two ranks, AdamW 1e-3, the same batches; with built-in all-reduce, int32, and int16 and int8 with error feedback. Prints
bits a byte on held-out files, the share by which they differ from built-in all-reduce, seconds a step and megabytes sent.
"""

import copy
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from trainkit.demo._config import SIZES
from trainkit.demo._corpus import WindowLoader, read_corpus, write_corpus
from trainkit.demo._model import GPT
from trainkit.switchml import SoftwareSwitch, SwitchMLState, switchml_hook

_WIRES = (None, "int32", "int16", "int8")


def _rank(rank: int, switch: str, folder: str, size_name: str, steps: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29547")
    cuda = torch.cuda.device_count() >= 2
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=2)
    size = SIZES[size_name]
    torch.manual_seed(0)
    start = GPT(size, 256, rate=1e-3).to(device)

    def batches(split: str, count: int, seed: int) -> WindowLoader:
        return WindowLoader(
            read_corpus(Path(folder), split), batch=size.batch, context=size.context, length=count, seed=seed,
            rank=rank, world_size=2,
        )  # fmt: skip

    def loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            logits = model(batch[:, :-1])
        return cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    rows = {}
    for wire in _WIRES:
        model = copy.deepcopy(start)
        ddp = DistributedDataParallel(model, device_ids=[rank] if cuda else None)
        state = None
        if wire:
            state = SwitchMLState(switch, session=wire, wire=wire)  # type: ignore[arg-type]
            ddp.register_comm_hook(state, switchml_hook)
        optimizer = model.configure_optimizers()
        began = time.perf_counter()
        for batch in batches("train", steps, 0):
            loss(ddp, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        with torch.no_grad():
            held_out = torch.stack([loss(model, batch) for batch in batches("validation", 32, 1)]).mean()
        dist.all_reduce(held_out)
        sent = state.counters()["sent_bytes"] if state else 0.0
        rows[wire or "built-in"] = {
            "bits": float(held_out) / 2 / math.log(2),
            "step_s": seconds / steps,
            "sent_mb": sent / 1e6,
        }
        if state:
            state.close()
    if rank == 0:
        for row in rows.values():
            row["difference"] = row["bits"] / rows["built-in"]["bits"] - 1
        print(json.dumps({"size": size_name, "steps": steps, "device": device.type, **rows}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    chosen, count = (sys.argv[1] if len(sys.argv) > 1 else "small"), (int(sys.argv[2]) if len(sys.argv) > 2 else 400)
    with tempfile.TemporaryDirectory() as corpus, SoftwareSwitch(threads=2) as running:
        write_corpus(Path(corpus))
        mp.spawn(_rank, (running.address, corpus, chosen, count), nprocs=2)
