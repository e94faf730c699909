"""Serving in simulation: goodput of each policy, GPUs used, overload, bursts; core throughput.

usage: simulation.py [--seeds 5] [--seconds 10]
Profiles in ms: ResNet50 l(b) = 1.053 b + 5.072, SLO 25; InceptionResNetV2 5.090 b + 18.368, SLO 70; sleep profile
1.08 b + 5.15, SLO 100. Goodput: highest rate with at most 1 % late or dropped, mean over the seeds.
"""

import argparse
import statistics
import time

import numpy as np

from trainkit.serving import Dispatch, Profile, Scheduler, bounds, goodput, simulate, zipf
from trainkit.serving.simulation._load import generate
from trainkit.serving.simulation._simulate import FOREVER, prepare

RESNET, INCEPTION = Profile.linear(1.053, 5.072, 32), Profile.linear(5.090, 18.368, 16)
REPLICAS = [f"per_replica:{batch}:{wait}" for batch in (6, 7, 8, 12) for wait in (0, 4, 8)]
POLICIES = ["symphony", "deferred", "eager", "eager-window", "nexus", "clockwork", "shepherd", "bentoml"]


def mean(profiles, gpus, slo_ms, policy, options, **more):
    found = [
        goodput(profiles, gpus, slo_ms=slo_ms, policy=policy, seconds=options.seconds, seed=seed, **more)
        for seed in range(options.seeds)
    ]
    return statistics.mean(found)


def tables(options):
    print("| models, GPUs | fluid bound | " + " | ".join(POLICIES) + " | best per-replica |")
    print("|---|---|" + "---|" * (len(POLICIES) + 1))
    for name, profile, slo, shapes in (
        ("ResNet50", RESNET, 25, [(1, 1), (1, 2), (1, 4), (1, 8), (1, 16), (1, 64), (8, 8), (20, 8), (20, 32)]),
        ("Inception", INCEPTION, 70, [(1, 8)]),
        ("SLO 100", Profile.linear(1.08, 5.15, 128), 100, [(1, 8)]),
    ):
        for models, gpus in shapes:
            profiles = {f"m{n}": profile for n in range(models)}
            row = [mean(profiles, gpus, slo, policy, options) for policy in POLICIES]
            best = max(mean(profiles, gpus, slo, policy, options) for policy in REPLICAS) if models == 1 else None
            bound = bounds.fluid(profile, gpus, slo, models=models)
            cells = [f"{value:.0f}" for value in [bound, *row]] + ["" if best is None else f"{best:.0f}"]
            print(f"| {name} {models}, {gpus} | " + " | ".join(cells) + " |", flush=True)
    one = {"m": RESNET}
    print("\nBursts (gamma 0.1), ResNet50, 8 GPUs:")
    for policy in ("symphony", "symphony-timeout", "symphony-auto-drop", "eager"):
        print(f"  {policy:20} {mean(one, 8, 25, policy, options, arrivals='gamma:0.1'):.0f}")
    print("\nLoad, share of 5839/s: busy GPUs, GPUs used (symphony | eager)")
    for share in (0.1, 0.2, 0.3, 0.5, 0.7, 0.85):
        ours, eager = (simulate(one, 8, {"m": share * 5839}, slo_ms=25, policy=p) for p in ("symphony", "eager"))
        print(f"  {share:.2f}  {ours.busy_gpus:.2f} {ours.gpus_touched} | {eager.busy_gpus:.2f} {eager.gpus_touched}")
    print("\nOverload, good requests/s at 1.0, 1.1, 1.3, 1.6 x 5875:")
    for policy in ("symphony", "symphony-timeout", "eager", "eager-window", "nexus", "shepherd"):
        rates = [simulate(one, 8, {"m": x * 5875}, slo_ms=25, policy=policy).good_rate for x in (1, 1.1, 1.3, 1.6)]
        print(f"  {policy:20} " + " ".join(f"{rate:.0f}" for rate in rates))
    line = simulate(one, 8, {"m": 1.3 * 5875}, slo_ms=25, seconds=600).timeline(10)
    print(f"\n10 minutes at 1.3 x: {line.min():.0f} to {line.max():.0f} good requests/s in windows of 10 s")
    profiles = {f"m{n}": p for n, p in enumerate([RESNET, INCEPTION] * 5)}
    slo = {name: 25 if p is RESNET else 70 for name, p in profiles.items()}
    print("\nTen mixed models by Zipf (0.9) on 24 GPUs:")
    for policy in POLICIES:
        print(f"  {policy:20} {mean(profiles, 24, slo, policy, options, popularity=zipf(list(profiles), 1.0)):.0f}")


def random_settings(options, count=50):
    rng = np.random.default_rng(2026)
    ratios = []
    for _ in range(count):
        models, gpus = int(rng.integers(1, 13)), int(rng.integers(1, 25))
        alpha = rng.uniform(0.2, 5)
        beta = alpha * rng.uniform(0.5, 20)
        scale = rng.uniform(0.5, 2, models)
        profiles = {f"m{n}": Profile.linear(alpha * s, beta * s, 32) for n, s in enumerate(scale)}
        slo = {name: float(s * (alpha + beta) * rng.uniform(2, 6)) for name, s in zip(profiles, scale, strict=True)}
        more = {"popularity": zipf(list(profiles), 1.0, float(rng.choice([0, 0.9, 1.5])))}
        more["arrivals"] = str(rng.choice(["poisson", "poisson", "gamma:0.5"]))
        ours, eager = (mean(profiles, gpus, slo, policy, options, **more) for policy in ("symphony", "eager"))
        ratios.append(ours / eager)
    below = sum(ratio < 0.98 for ratio in ratios)
    print(f"\n{count} random settings, ours over eager: least {min(ratios):.3f}, below 0.98 {below}, ", end="")
    print(f"median {statistics.median(ratios):.3f}, mean {statistics.mean(ratios):.3f}, most {max(ratios):.3f}")


def core():
    print("\nCore, requests/s of CPU time on one core, ResNet50 at .85 of the bound")
    for models, gpus, count in ((1, 8, 10**6), (8, 64, 10**6), (64, 512, 10**6), (1000, 10000, 3 * 10**6)):
        profiles = {f"m{n}": RESNET for n in range(models)}
        rate = 0.85 * bounds.fluid(RESNET, gpus, 25, models=models)
        load = generate(list(profiles), {name: rate / models for name in profiles}, "poisson", count / rate, 0)
        run = prepare(profiles, gpus, load, slo_ms=25, policy="symphony", seed=0)
        begin = time.process_time()
        run.until(FOREVER)
        spent = time.process_time() - begin
        good = (run.fate == 1).mean()
        print(f"  in C++, {models} x {gpus}: {len(load.model) / spent / 1e6:.2f} million ({good:.2%} good)", flush=True)
    gaps = np.random.default_rng(0).exponential(1e9 / 5300, 320_000)
    arrival = np.cumsum(gaps).astype(np.int64)
    for step in (1, 16, 64):
        print(f"  from Python, {step} a call: {_from_python(arrival, step) / 1e6:.2f} million")


def _from_python(arrival, step):
    """All events by calls from Python: requests, timers, GPUs that become free."""
    scheduler, latency, ends = Scheduler({"m": RESNET}, 8), RESNET.latency_ns, {}
    ids, models, deadlines = np.arange(len(arrival)), np.zeros(step, np.int64), arrival + 25_000_000
    plain = arrival.tolist()
    begin = time.process_time()

    def act(actions, now):
        for action in actions:
            if type(action) is Dispatch:
                ends[action.gpu] = now + latency[len(action.ids) - 1]

    for first in range(0, len(plain), step):
        now = plain[first + step - 1]
        while True:
            timer, end = scheduler.next_timer, min(ends.values(), default=None)
            if end is not None and end <= now and (timer is None or end <= timer):
                gpu = min(ends, key=ends.__getitem__)
                del ends[gpu]
                act(scheduler.on_gpu_free(gpu, end), end)
            elif timer is not None and timer <= now:
                act(scheduler.on_timer(timer), timer)
            else:
                break
        if step == 1:
            act(scheduler.on_request(first, 0, now + 25_000_000, now), now)
        else:
            last = first + step
            act(scheduler.on_requests(ids[first:last], models, deadlines[first:last], now), now)
    return len(plain) / (time.process_time() - begin)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10)
    given = parser.parse_args()
    tables(given)
    random_settings(given)
    core()
