"""The demo's 30m step on one GPU, one worker, through a switch on loopback: what of it waits for the switch.

Prints a row a setting: milliseconds of a step, and of them what a step without communication (`noop_hook`) does not take.
Settings in alternation, medians over rounds. `--cpu` runs the tiny model on the CPU, to see that the script works.
"""

import argparse
import itertools
import os
import statistics
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from trainkit.demo._config import SIZES
from trainkit.demo._model import GPT
from trainkit.switchml import SoftwareSwitch, SwitchMLState, noop_hook, switchml_hook


class Arm:
    """The model under DDP with one setting."""

    def __init__(self, size: str, device: torch.device, bucket_mb: float, state: SwitchMLState | None) -> None:
        torch.manual_seed(0)
        self.shape, self.device, self.state = SIZES[size], device, state
        model = GPT(self.shape, 256, rate=1e-3).to(device)
        # as the demo's strategy has it
        options: dict[str, Any] = {"bucket_cap_mb": bucket_mb, "find_unused_parameters": True}
        self.ddp = DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None, **options
        )
        self.ddp.register_comm_hook(state, switchml_hook if state else noop_hook)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device.type == "cuda")
        self.tokens = torch.randint(0, 256, (self.shape.batch, self.shape.context + 1), device=device)
        self.took: list[float] = []

    def step(self) -> None:
        """One step, as in mixed precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.ddp(self.tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), self.tokens[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def measure(self, steps: int) -> None:
        """Seconds a step, over a few."""
        self.step()
        self._done()
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        self._done()
        self.took.append((time.perf_counter() - began) / steps)

    def _done(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main(cpu: bool, rounds: int, channels: list[int], buckets: list[float], slots: list[int]) -> None:
    """Measure and print."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29555", RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo" if cpu else "nccl")
    device = torch.device("cpu") if cpu else torch.device("cuda", 0)
    size, steps = ("tiny", 2) if cpu else ("30m", 10)
    switches = {count: SoftwareSwitch(threads=count) for count in channels}
    arms: dict[tuple[Any, ...], Arm] = {}
    states = []
    for bucket in buckets:
        arms["none", bucket, 0] = Arm(size, device, bucket, None)
        for count, window in itertools.product(channels, slots):
            states.append(SwitchMLState(switches[count].address, slots=window))
            arms[count, bucket, window] = Arm(size, device, bucket, states[-1])
    for arm in arms.values():
        arm.measure(2)
        arm.took.clear()
    for _ in range(rounds):
        for arm in arms.values():
            arm.measure(steps)
    parameters = sum(p.numel() for p in next(iter(arms.values())).ddp.parameters())
    print(
        f"{parameters / 1e6:.1f} M parameters on {torch.cuda.get_device_name() if not cpu else 'CPU'}, {os.cpu_count()} cores"
    )
    print("| channels | bucket_cap_mb | slots | step, ms | of it waiting for the switch, ms |")
    print("|---|---|---|---|---|")
    for (count, bucket, window), arm in arms.items():
        took = 1e3 * statistics.median(arm.took)
        bare = 1e3 * statistics.median(arms["none", bucket, 0].took)
        print(f"| {count} | {bucket:g} | {window} | {took:.1f} | {took - bare:.1f} |", flush=True)
    for state in states:
        state.close()
    for switch in switches.values():
        switch.close()
    arms.clear()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--channels", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--buckets", type=float, nargs="+", default=[25.0, 8.0])
    parser.add_argument("--slots", type=int, nargs="+", default=[20])
    given = parser.parse_args(sys.argv[1:])
    main(given.cpu, given.rounds, given.channels, given.buckets, given.slots)
