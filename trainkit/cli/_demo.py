"""`trainkit demo`: the main job."""

import json
from dataclasses import dataclass
from pathlib import Path

from trainkit.cli._subcommand import Subcommand


@dataclass(frozen=True)
class Options:
    """Options of the demo."""

    size: str | None = None
    """tiny, small, 30m or 124m parameters; default: small on CPU, 30m on GPUs"""
    workers: int | None = None
    """DDP processes; default: 2 on CPU, one a GPU"""
    steps: int | None = None
    """optimiser steps of each arm, discarded ones counted; default: by size"""
    vocab: int | None = None
    """rows of the embedding, 256 or more; default: 256"""
    seed: int | None = None
    """of weights, batches and search; default: 0"""
    out: Path = Path("runs/demo")
    """folder of the run"""
    resume: bool = False
    """go on with the run in --out where it was killed"""
    overwrite: bool = False
    """replace the run in --out"""
    switch: str | None = None
    """HOST:PORT of a running switch; default: the demo starts its own on loopback"""
    port: int = 0
    """UDP port of the demo's own switch; 0 takes a free one"""
    deadline: float | None = None
    """seconds after which a silent worker or switch is an error; default: 30"""
    json: bool = False
    """print the results as JSON on standard output"""


def _fresh(options: Options) -> dict[str, object]:
    import torch

    gpus = torch.cuda.device_count()
    size = options.size or ("30m" if gpus else "small")
    from trainkit.demo import SIZES

    return {
        "size": size,
        "workers": options.workers if options.workers is not None else (gpus or 2),
        "accelerator": "cuda" if gpus else "cpu",
        "steps": options.steps if options.steps is not None else getattr(SIZES.get(size), "steps", 0) or 240,
        "vocab": options.vocab if options.vocab is not None else 256,
        "seed": options.seed if options.seed is not None else 0,
        "deadline_s": options.deadline if options.deadline is not None else 30.0,
    }


def run(options: Options) -> int:
    """Run or resume the demo."""
    from trainkit.demo import Config, WorkerFailed, prepare
    from trainkit.demo import run as run_demo

    if options.resume:
        config = Config.load(options.out)
        for name in ("size", "workers", "steps", "vocab", "seed", "deadline"):
            given = getattr(options, name)
            if given is not None and given != getattr(config, "deadline_s" if name == "deadline" else name):
                raise ValueError(
                    f"--resume goes on as the run began, got --{name} {given}: leave it out, or start anew"
                )
    else:
        config = Config(**_fresh(options))  # type: ignore[arg-type]
        prepare(config, options.out, overwrite=options.overwrite)
    try:
        results = run_demo(config, options.out, switch=options.switch, port=options.port)
    except WorkerFailed as error:
        raise WorkerFailed(f"{error}; `trainkit demo --resume --out {options.out}` goes on") from None
    if options.json:
        print(json.dumps([{k: v for k, v in r.items() if k != "history"} for r in results], indent=1))
    return 0


SUBCOMMAND = Subcommand(
    name="demo",
    summary="Train a byte-level GPT with AutoLRS, SwitchML and the fused attention at once, and report.",
    options=Options,
    run=run,
    example="trainkit demo --size tiny --steps 120 --out runs/tiny",
)
