"""Measure how long batches of each size take, through the same function that serves them."""

import platform
import time
from typing import Any

from trainkit.serving.engine._models import ModelError, ModelSource
from trainkit.serving.scheduler import Profile

_WARM_RUNS = 3


def _sizes(max_batch: int) -> list[int]:
    """All sizes up to 8, then steps of an eighth: between them a batch counts as the next larger one measured."""
    found = [1]
    while found[-1] < max_batch:
        found.append(min(max_batch, found[-1] + max(1, found[-1] // 8)))
    return found


def measure(
    source: ModelSource, example: Any, device: str = "cpu", *, max_batch: int = 64, repeat: int = 20
) -> Profile:
    """The profile of a model.

    Args:
        source: the model.
        example: one request's input, as JSON gives it.
        device: "cpu", "cuda:0".
        max_batch: largest batch measured, and so the largest that is ever formed.
        repeat: runs of each size; the 90th percentile counts, so that few batches take longer than planned.

    Raises:
        ModelError: the model does not load, or an option is out of its range.
    """
    if not 1 <= max_batch <= 4096 or not 1 <= repeat <= 100_000:
        raise ModelError(f"max_batch is from 1 to 4096 and repeat from 1 to 100000, got {max_batch} and {repeat}")
    predict = source.load(device)
    table: list[int] = []
    for size in _sizes(max_batch):
        batch = [example] * size
        for _ in range(_WARM_RUNS):
            predict(batch)
        runs = []
        for _ in range(repeat):
            begin = time.perf_counter_ns()
            outputs = predict(batch)
            runs.append(time.perf_counter_ns() - begin)
            if len(outputs) != size:
                raise ModelError(f"a model returns an output for each input, got {len(outputs)} for {size}")
        latency = sorted(runs)[(9 * repeat - 1) // 10]
        table += [latency] * (size - len(table))
    about = {"machine": _machine(device), "model": source.where, "repeat": repeat, "percentile": 90}
    return Profile.monotone(table, about)


def _machine(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(device))
    return f"{platform.machine()}, {platform.system()} {platform.release()}"
