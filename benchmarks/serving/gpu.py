"""One GPU, real models, real time: our scheduler against batching by hand (at most B requests, at most T ms of waiting).

usage: gpu.py [--seconds 1.5] [--device cuda:0]
A ResNet50 (random weights, half precision, 224 x 224 pictures from the host) and the demo's 30m GPT scoring 256 bytes,
SLO 50 ms from arrival to answer: a GPU process over a pipe as in the server, without HTTP. Poisson arrivals at 30, 65 and 90 % of
what the largest batch that fits could do. Each setting of (B, T) is kept for all three rates; the best one at each rate
is the hand-tuned one. Both drop what can no longer be met by a batch of one.
"""

import argparse
import multiprocessing
import sys
import time
import types

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

try:
    import trainkit.serving._native  # noqa: F401
except ImportError:
    # A GPU machine without the native core: its Python twin decides the same, as the tests say.
    sys.modules["trainkit.serving._native"] = types.SimpleNamespace(Core=object)
from trainkit.serving.scheduler import Dispatch, Profile
from trainkit.serving.scheduler._reference import ReferenceScheduler

SLO, MARGIN, LARGEST = 50_000_000, 3_000_000, 96
SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96]
HAND = [(16, 0), (32, 10), (64, 20), (96, 30)]


class Bottleneck(nn.Module):
    """He et al., CVPR 2016, with the stride in the 3 x 3."""

    def __init__(self, wide, narrow, out, stride):
        super().__init__()
        sizes = ((wide, narrow, 1, 1), (narrow, narrow, 3, stride), (narrow, out, 1, 1))
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, s, k // 2, bias=False) for i, o, k, s in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _, _ in sizes)
        self.short = None if wide == out and stride == 1 else nn.Conv2d(wide, out, 1, stride, bias=False)

    def forward(self, x):
        y = x
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = norm(conv(F.relu(y) if conv is not self.convs[0] else y))
        return F.relu(y + (x if self.short is None else self.short(x)))


def resnet50():
    """The trunk and head of ResNet50."""
    layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    wide = 64
    for narrow, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(count):
            layers.append(Bottleneck(wide, narrow, 4 * narrow, stride if block == 0 else 1))
            wide = 4 * narrow
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def classifier(device):
    """ResNet50: a function of a batch of pictures, and one of them."""
    kind = torch.float16 if device.startswith("cuda") else torch.float32
    net = resnet50().to(device, kind).eval().to(memory_format=torch.channels_last)

    def forward(pixels):
        return net(pixels.to(kind).div(255).to(memory_format=torch.channels_last)).argmax(-1)

    return forward, torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8)


def scorer(device):
    """The demo's GPT: a function of a batch of bytes, their bits each; and one of them."""
    from trainkit.demo._config import SIZES
    from trainkit.demo._model import GPT

    gpt = GPT(SIZES["30m"], vocab=256, rate=1e-3).to(device, torch.bfloat16).eval()

    def forward(tokens):
        logits = gpt(tokens[:, :-1]).float()
        return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)

    return forward, torch.randint(0, 256, (257,))


MODELS = {"ResNet50": classifier, "GPT 30m": scorer}


class Captured:
    """A CUDA graph for each size of SIZES; a batch runs as the next larger one."""

    def __init__(self, forward, one, device):
        self.forward, self.one, self.device, self.graphs = forward, one, device, {}
        for size in SIZES if device.startswith("cuda") else ():
            held = torch.stack([one] * size).to(device)
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                for _ in range(2):
                    forward(held)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                answer = forward(held)
            self.graphs[size] = graph, held, answer

    def __call__(self, count):
        batch = torch.stack([self.one] * count)
        if not self.graphs:
            return self.forward(batch).tolist()
        graph, held, answer = self.graphs[next(size for size in SIZES if size >= count)]
        held[:count].copy_(batch.pin_memory(), non_blocking=True)
        graph.replay()
        return answer[:count].tolist()


def gpu_process(pipe, name, device):
    """Load, measure, then run batches of the sizes that come."""
    # threads that wait for one another beside a scheduler that spins: with all cores a batch of pictures took 50 times longer
    torch.set_num_threads(2)
    with torch.inference_mode():
        run = Captured(*MODELS[name](device), device)
        table = []
        for size in SIZES:
            times = []
            for attempt in range(13):
                begin = time.perf_counter_ns()
                run(size)
                if attempt >= 3:
                    times.append(time.perf_counter_ns() - begin)
            table += [sorted(times)[8]] * (size - len(table))
        pipe.send(table)
        while (batch := pipe.recv()) is not None:
            run(len(batch))
            pipe.send(batch)


class Ours:
    """The scheduler with its timers."""

    def __init__(self, profile):
        self.core = ReferenceScheduler({"m": profile}, 1)

    def ask(self, id, due, now):
        return self._acted(self.core.on_request(id, 0, due - MARGIN, now))

    def free(self, now):
        return self._acted(self.core.on_gpu_free(0, now))

    def tick(self, now):
        return self._acted(self.core.on_timer(now)) if self.due is not None and self.due <= now else (None, 0)

    @property
    def due(self):
        return self.core.next_timer

    def _acted(self, actions):
        batch, dropped = None, 0
        for action in actions:
            if isinstance(action, Dispatch):
                batch = action.ids
            else:
                dropped += len(action.ids)
        return batch, dropped


class ByHand:
    """A full batch, or what waits since T."""

    def __init__(self, profile, largest, wait_ms):
        self.one, self.largest, self.wait = profile.latency_ns[0], largest, round(wait_ms * 1e6)
        self.waiting, self.idle = [], True

    def ask(self, id, due, now):
        self.waiting.append((id, due))
        return self.tick(now)

    def free(self, now):
        self.idle = True
        return self.tick(now)

    @property
    def due(self):
        return self.waiting[0][1] - SLO + self.wait if self.waiting and self.idle else None

    def tick(self, now):
        kept = [one for one in self.waiting if one[1] >= now + self.one]
        dropped, self.waiting = len(self.waiting) - len(kept), kept
        if self.idle and kept and (len(kept) >= self.largest or kept[0][1] - SLO + self.wait <= now):
            batch, self.waiting, self.idle = tuple(id for id, _ in kept[: self.largest]), kept[self.largest :], False
            return batch, dropped
        return None, dropped


def serve(policy, pipe, rate, seconds, seed):
    """(good answers a second, share of bad ones, 99th percentile in ms, mean batch) of a real-time run."""
    arrivals = (np.cumsum(np.random.default_rng(seed).exponential(1e9 / rate, int(rate * seconds)))).astype(np.int64)
    begin, at, latencies, dropped, sizes, flying = time.monotonic_ns(), 0, [], 0, [], 0
    while at < len(arrivals) or flying or policy.due is not None:
        now = time.monotonic_ns() - begin
        if flying and pipe.poll(0):
            flying -= 1
            latencies += [now - arrivals[id] for id in pipe.recv()]
            batch, lost = policy.free(now)
        elif at < len(arrivals) and arrivals[at] <= now:
            batch, lost = policy.ask(at, int(arrivals[at]) + SLO, now)
            at += 1
        else:
            batch, lost = policy.tick(now)
        dropped += lost
        if batch:
            flying += 1
            sizes.append(len(batch))
            pipe.send(batch)
    good = sum(latency <= SLO for latency in latencies)
    p99 = np.percentile(latencies, 99) / 1e6 if latencies else float("nan")
    return good / seconds, 1 - good / len(arrivals), p99, float(np.mean(sizes))


def compare(name, device, seconds):
    """Print a model's table."""
    context = multiprocessing.get_context("spawn")
    pipe, child = context.Pipe()
    process = context.Process(target=gpu_process, args=(child, name, device), daemon=True)
    process.start()
    profile = Profile.monotone(pipe.recv())
    fits = max(size for size in range(1, LARGEST + 1) if profile.latency_ns[size - 1] <= SLO / 2)
    most = fits / profile.latency_ns[fits - 1] * 1e9
    rates = [share * most for share in (0.3, 0.65, 0.9)]
    where = torch.cuda.get_device_name() if device.startswith("cuda") else device
    print(f"{name}, {where}: l(1) {profile.latency_ns[0] / 1e6:.2f} ms, ", end="")
    print(f"l({fits}) {profile.latency_ns[fits - 1] / 1e6:.2f} ms, rates {[round(rate) for rate in rates]}")
    table = {}
    for key, make in [("ours", lambda: Ours(profile))] + [
        (f"by hand {b}, {t} ms", lambda b=b, t=t: ByHand(profile, b, t)) for b, t in HAND
    ]:
        table[key] = [serve(make(), pipe, rate, seconds, 1) for rate in rates]
        cells = [f"{g:.0f} good/s, {b:.2%} bad, p99 {p:.1f} ms, batch {m:.1f}" for g, b, p, m in table[key]]
        print(f"  {key:18} | " + " | ".join(cells), flush=True)
    pipe.send(None)
    process.join()
    hand = np.array([[row[0] for row in table[key]] for key in table if key != "ours"])
    ours = np.array([row[0] for row in table["ours"]])
    kept = hand[hand.argmax(0)].min(0)  # of equals the one with the smallest batch, which answers soonest
    print("  ours over the best by hand at each rate: " + " ".join(f"{x:.3f}" for x in ours / hand.max(0)))
    print("  ours over the worst of those three where kept: " + " ".join(f"{x:.3f}" for x in ours / kept))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--device", default="cuda:0")
    options = parser.parse_args()
    for model in MODELS:
        compare(model, options.device, options.seconds)
