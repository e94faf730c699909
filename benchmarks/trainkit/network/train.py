"""Training the demo's GPT over E1 with `AutoNetworkStrategy`: plain DDP, planned, and without communication (root needed).

Every arm is a whole Lightning run on the same eight ranks, one namespace each; links are shaped. A step's time is from one
batch's end to the next's, the slowest rank's. `python benchmarks/trainkit/network/train.py --steps 50 --plain 15`
"""

import argparse
import os
import statistics
import time
import warnings
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from _cases import CASES
from _lab import INTERFACE, Lab
from auto import join, run
from lightning_fabric.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy

from trainkit import AutoNetworkStrategy
from trainkit.collectives import Topology
from trainkit.demo._config import SIZES
from trainkit.demo._model import GPT
from trainkit.integrations.lightning._strategies import _Hooked
from trainkit.switchml import noop_hook

SETTLING = 3
"""Steps before a plan carries gradients; the third plans."""


class Silence:
    """The state of a hook that leaves every rank's gradients as they are."""

    error = None

    def connect(self) -> None:
        """Nothing to connect to."""

    def close(self) -> None:
        """Nothing to close."""


class Alone(_Hooked, DDPStrategy):
    """DDP without communication: what a step costs beside it."""

    def __init__(self) -> None:
        super().__init__(ddp_comm_state=Silence(), ddp_comm_hook=noop_hook)


class Clock(pl.Callback):
    """Seconds from one step's end to the next's."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """A step is done."""
        self.ends.append(time.monotonic())


def train(rank: int, lab: Lab, measured: Topology, options: Any, pipe: Connection) -> None:
    """One rank; rank 0 sends ("step", arm, seconds of each) and what the strategy says of its plan."""
    warnings.filterwarnings("ignore")
    names = measured.compute_nodes
    os.environ.update(
        MASTER_ADDR=lab.address(names[0]), MASTER_PORT=str(options.port), NODE_RANK=str(rank), LOCAL_RANK="0",
        OMP_NUM_THREADS="1",  # or Lightning gives every rank a thread a core
    )  # fmt: skip
    join(rank, lab, options.port)
    planned = partial(AutoNetworkStrategy, measured, interface=INTERFACE, window=options.steps)
    arms = {
        "compute": (Alone, 20),
        "planned": (planned, options.steps + SETTLING + 2),
        "plain DDP": (DDPStrategy, options.plain + 2),
    }
    for arm, (strategy, steps) in arms.items():
        pl.seed_everything(0, verbose=False)
        clock = Clock()
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, num_nodes=len(names), strategy=strategy(), max_steps=steps, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[clock],
            plugins=[LightningEnvironment()], use_distributed_sampler=False,
        )  # fmt: skip
        tokens = torch.randint(0, 256, (steps, 65), generator=torch.Generator().manual_seed(rank))
        trainer.fit(GPT(SIZES["small"], 256, rate=1e-3), torch.utils.data.DataLoader(tokens, batch_size=1))
        taken = torch.tensor(clock.ends, dtype=torch.float64).diff()
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        if rank == 0:
            pipe.send((arm, taken.tolist()))
        if rank == 0 and arm == "planned":
            state = trainer.strategy.network_state
            assert state.plan is not None
            pipe.send(("plan", state.plan.as_dict(), str(state.comparisons[0])))


def main() -> None:
    """Measure on E1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="steps on the planned way")
    parser.add_argument("--plain", type=int, default=15, help="steps with plain DDP")
    parser.add_argument("--port", type=int, default=29441)
    options = parser.parse_args()
    with Lab(CASES["E1"]()) as lab:
        rows = run(lab, train, options)
    taken = {row[0]: row[1] for row in rows if row[0] != "plan"}
    _, plan, comparison = next(row for row in rows if row[0] == "plan")
    # the first steps connect, or run on the ring before the plan
    skipped = {"compute": 1, "planned": SETTLING, "plain DDP": 1}
    middle = {arm: statistics.median(seconds[skipped[arm] :]) for arm, seconds in taken.items()}
    print(f"\nbuckets {plan['buckets']}; the strategy's own comparison: {comparison}")
    print("| arm | steps | median s | min..max |\n|---|---|---|---|")
    for arm, seconds in taken.items():
        kept = seconds[skipped[arm] :]
        print(f"| {arm} | {len(kept)} | {middle[arm]:.3f} | {min(kept):.3f}..{max(kept):.3f} |")
    for arm, way in (("planned", plan["chosen"]), ("plain DDP", "ring")):
        predicted, left = plan["algorithms"][way]["step_s"], middle[arm] - middle["compute"]
        print(f"{arm} ({way}): step less compute {left:.3f} s, predicted {predicted:.3f} s, {left / predicted:.2f}")
    print(f"plain DDP over planned: {middle['plain DDP'] / middle['planned']:.2f}")


if __name__ == "__main__":
    main()
