"""One worker process of the demo: trains one arm and leaves its result. Run as `python -m trainkit.demo._worker JOB`."""

import json
import logging
import math
import os
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainkit._processes import die_with_parent


@dataclass(frozen=True)
class Job:
    """What one worker is told."""

    folder: str
    arm: str
    switch: str
    rank: int
    world_size: int
    port: int
    parent: int


def _quiet() -> None:
    # Lightning's hints (number of loader workers, a GPU that is not used, ...) are about the user's own scripts
    for module in ("pytorch_lightning", "lightning_fabric", "torch"):
        logging.getLogger(module).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=rf"{module}.*")


def _progress_bar() -> Any:
    from pytorch_lightning.callbacks import TQDMProgressBar
    from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm

    class TrainingBar(TQDMProgressBar):
        """The Trainer's own bar without the validation's, and in a log file a line now and then."""

        def init_validation_tqdm(self) -> Tqdm:
            return Tqdm(disable=True)

    return TrainingBar(refresh_rate=2 if sys.stderr.isatty() else 40)


def train(job: Job) -> None:
    """Train `job.arm`, from its newest checkpoint where there is one; rank 0 writes `result.json`."""
    import pytorch_lightning as pl
    import torch
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment

    from trainkit._files import write_text_atomically
    from trainkit.autolrs._ranks import from_every_rank
    from trainkit.demo._checkpoint import DurableCheckpointIO, RollingCheckpoint, newest_checkpoint, parameters_digest
    from trainkit.demo._config import ARMS, USELESS_RATE, Config
    from trainkit.demo._corpus import WindowLoader, read_corpus
    from trainkit.demo._model import GPT
    from trainkit.integrations.lightning._callback import AutoLRS
    from trainkit.integrations.lightning._report import RunReport
    from trainkit.integrations.lightning._strategies import SwitchMLStrategy

    _quiet()
    folder = Path(job.folder)
    config = Config.load(folder)
    size, arm_folder = config.shape, folder / job.arm
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // job.world_size))
    pl.seed_everything(config.seed, verbose=False)

    def loader(split: str, length: int, seed: int) -> WindowLoader:
        return WindowLoader(
            read_corpus(folder, split),
            batch=size.batch,
            context=size.context,
            length=length,
            seed=seed,
            rank=job.rank,
            world_size=job.world_size,
        )

    # the same held-out batches at every look
    held_out = list(loader("validation", 32, config.seed + 1))
    validation: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(held_out, batch_size=None)  # type: ignore[arg-type]
    strategy = SwitchMLStrategy(
        switch=job.switch,
        session=f"demo-{job.arm}",
        timeout_s=config.deadline_s,
        cluster_environment=LightningEnvironment(),
        # keeps DDP's buckets as they are from the first step on; otherwise they are rebuilt after it, once more after a
        # resume, and the fixed-point blocks, which follow the buckets, would round differently
        find_unused_parameters=True,
    )
    recorder = RunReport(
        arm_folder, name=ARMS[job.arm], loss="val_bits", loss_unit="bits a byte", scale=1 / math.log(2)
    )
    rolling = RollingCheckpoint(arm_folder, every=max(10, config.steps // 12))
    search = [AutoLRS(count="all", seed=config.seed)] if job.arm == "autolrs" else []
    trainer = pl.Trainer(
        accelerator=config.accelerator if config.accelerator == "cpu" else "gpu",
        devices=job.world_size,
        strategy=strategy,
        precision="32-true" if config.accelerator == "cpu" else "bf16-mixed",
        max_steps=config.steps,
        max_epochs=-1,
        callbacks=[*search, recorder, rolling, _progress_bar()],
        plugins=[DurableCheckpointIO()],
        logger=False,
        enable_checkpointing=True,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        val_check_interval=max(10, config.steps // 8),
        check_val_every_n_epoch=None,
        limit_val_batches=8,
    )
    module = GPT(size, config.vocab, rate=1e-3 if job.arm == "constant" else USELESS_RATE)
    train_loader = loader("train", 10_000, config.seed)
    started = time.monotonic()
    resume_from = newest_checkpoint(arm_folder)
    trainer.fit(module, train_loader, validation, ckpt_path=resume_from)
    seconds = time.monotonic() - started

    digests = from_every_rank(parameters_digest(module))
    if len(set(digests)) > 1:
        raise RuntimeError(f"after training all ranks must hold equal parameters, their digests are {digests}")
    trainer.limit_val_batches = len(held_out)
    bits = trainer.validate(module, validation, verbose=False)[0]["val_bits"]
    trainer.save_checkpoint(folder / f"{job.arm}.ckpt")
    if trainer.is_global_zero:
        recorder.run(trainer, {"held-out bits a byte": bits}).save(arm_folder)
        history = search[0].history.as_dict() if search else None
        if search:
            search[0].schedule.save(folder / "lr_schedule.json")
        result = {
            "arm": job.arm,
            "val_bits": bits,
            "kept_steps": trainer.global_step,
            "seconds": seconds,
            "parameters": sum(p.numel() for p in module.parameters()),
            "digest": digests[0],
            "history": history,
        }
        write_text_atomically(arm_folder / "result.json", json.dumps(result) + "\n")
    torch.distributed.barrier()


def main() -> None:
    """Do the job in argv; an error goes to the log in full and to the parent in one line."""
    job = Job(**json.loads(sys.argv[1]))
    die_with_parent(job.parent)
    os.environ |= {
        "LOCAL_RANK": str(job.rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(job.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(job.port),
    }
    logs = Path(job.folder) / "logs"
    try:
        train(job)
    except BaseException as error:
        with (logs / f"worker-{job.rank}.log").open("a") as log:
            traceback.print_exc(file=log)
        (logs / f"error-{job.rank}.txt").write_text(f"{type(error).__name__}: {error}")
        sys.stdout.flush()
        # not sys.exit: a peer that is gone would hold the process group's destructor
        os._exit(1)


if __name__ == "__main__":
    main()
