"""`trainkit serve simulate`: how many GPUs a load needs, or how much load GPUs can take."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainkit.cli._subcommand import Subcommand


@dataclass(frozen=True)
class Options:
    """Options of the simulation."""

    profile: str
    """profile of each model, by commas: FILE, NAME=FILE (files of `trainkit serve profile`), or NAME=ALPHA*b+BETA in ms"""
    slo: str
    """from arrival to answer: 50ms, or one for each model by commas"""
    rate: str | None = None
    """requests/s: one total shared equally, or one for each model by commas; without it the highest rate is searched for"""
    gpus: int | None = None
    """equal GPUs; without it the fewest are searched for"""
    scale: str | None = None
    """LEAST:MOST GPUs, as the load needs from second to second"""
    start: str = "0s"
    """with --scale: from the order of a GPU until it serves"""
    policy: str = "symphony"
    """who schedules: symphony, eager, per_replica:BATCH:WAIT_MS, bentoml, clockwork, nexus, shepherd and variants"""
    arrivals: str = "poisson"
    """poisson, constant, gamma:SHAPE (below 1: bursts), or a JSON file of seconds by model"""
    zipf: float = 0
    """share a total rate by Zipf's law with this exponent"""
    bad: float = 0.01
    """largest share of late and dropped requests"""
    network: str = "0ms"
    """what the way to a GPU and back adds to a batch"""
    jitter: str = "0ms"
    """at most this much more, which the scheduler does not know; it aims as much earlier"""
    seconds: float = 10
    """length of the simulated load"""
    seed: int = 0
    """seed of the arrivals"""
    plot: Path | None = None
    """picture of batch sizes, latencies and GPUs"""
    json: bool = False
    """print JSON"""


def _profiles(text: str) -> dict[str, Any]:
    import re

    from trainkit.serving import Profile, ProfileError

    found: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, source = part.partition("=")
        if not equals:
            name, source = Path(part).stem, part
        if name in found:
            raise ProfileError(f"--profile names a model once, got {name!r} again: NAME=FILE names it")
        line = re.fullmatch(r"([0-9.]+)\*b\+([0-9.]+)", source.replace(" ", ""))
        found[name] = Profile.linear(float(line[1]), float(line[2]), 256) if line else Profile.load(source)
    return found


def _each(text: str, names: list[str], read: Any, flag: str) -> dict[str, Any]:
    values = [read(part) for part in text.split(",")]
    if len(values) not in (1, len(names)):
        raise ValueError(f"{flag} has one value, or one for each of the {len(names)} models, got {len(values)}")
    return dict(zip(names, values * len(names) if len(values) == 1 else values, strict=True))


def _load(options: Options, names: list[str]) -> dict[str, Any]:
    """Arguments of `simulate` that say what comes."""
    from trainkit.serving import zipf

    if options.arrivals.endswith(".json"):
        if options.rate is not None or options.zipf:
            raise ValueError("--arrivals FILE has its own rates: leave --rate and --zipf out")
        try:
            trace = json.loads(Path(options.arrivals).read_text())
        except ValueError as error:
            raise ValueError(f"{options.arrivals} is not JSON: {error}") from None
        if not isinstance(trace, dict):
            raise ValueError(f"{options.arrivals} must be an object: seconds by model")
        return {"arrivals": trace}
    if options.rate is None:
        return {"arrivals": options.arrivals}
    rates = [float(part) for part in options.rate.split(",")]
    if len(rates) == 1:
        return {"rates": zipf(names, rates[0], options.zipf), "arrivals": options.arrivals}
    if options.zipf:
        raise ValueError("--zipf shares one total --rate")
    return {"rates": _each(options.rate, names, float, "--rate"), "arrivals": options.arrivals}


def run(options: Options) -> int:
    """Search what is not given, simulate it once, print."""
    from trainkit.cli._quantities import seconds
    from trainkit.serving import goodput, gpus_needed, simulate, zipf

    profiles = _profiles(options.profile)
    names = list(profiles)
    jitter_ms = seconds(options.jitter) * 1e3
    common: dict[str, Any] = {
        "slo_ms": {name: value * 1e3 for name, value in _each(options.slo, names, seconds, "--slo").items()},
        "policy": options.policy,
        "seconds": options.seconds,
        "seed": options.seed,
        "network_ms": seconds(options.network) * 1e3,
        "network_jitter_ms": jitter_ms,
        "margin_ms": jitter_ms,
    }
    load = _load(options, names)
    if options.scale is not None:
        return _scaled(options, profiles, load, common)
    gpus = options.gpus
    facts: dict[str, Any] = {"policy": options.policy, "models": names}
    if "rates" not in load and isinstance(load["arrivals"], str):
        if gpus is None:
            raise ValueError("one of --rate, --gpus is needed: the other is searched for")
        shares = zipf(names, 1.0, options.zipf)
        facts["goodput"] = goodput(
            profiles, gpus, bad=options.bad, popularity=shares, arrivals=options.arrivals, **common
        )
        load["rates"] = {name: facts["goodput"] * share for name, share in shares.items()}
    elif gpus is None:
        facts["gpus_needed"] = gpus = gpus_needed(profiles, bad=options.bad, **load, **common)
        if gpus is None:
            raise ValueError(
                f"4096 GPUs are too few for {options.bad:.1%} bad requests: is --slo above one batch's latency?"
            )
    found = simulate(profiles, gpus, **load, **common)
    facts |= {"gpus": gpus, **found.summary(), "by_model": {name: dict(found.of(name)) for name in names}}
    if options.plot is not None:
        found.plot().savefig(options.plot)
    if options.json:
        print(json.dumps(facts, indent=1))
        return 0
    if "gpus_needed" in facts:
        print(f"{gpus} GPUs are needed for at most {options.bad:.1%} late or dropped")
    if "goodput" in facts:
        print(f"{facts['goodput']:.0f} requests/s are served with at most {options.bad:.1%} late or dropped")
    print(f"  served in time      {found.good_rate:.1f} requests/s, {1 - found.bad:.2%} of those who waited")
    print(f"  late, dropped       {found.late}, {found.dropped} of {found.arrived}")
    print(f"  latency             {found.latency_ms(50):.2f} ms median, {found.latency_ms(99):.2f} ms at 99 %")
    print(f"  batches             {found.mean_batch:.1f} requests on average")
    print(f"  GPUs                {found.busy_gpus:.2f} of {gpus} busy, {found.gpus_touched} used")
    return 0


def _scaled(options: Options, profiles: dict[str, Any], load: dict[str, Any], common: dict[str, Any]) -> int:
    """GPUs that come and go."""
    from trainkit.cli._quantities import seconds
    from trainkit.serving.autoscaling import Autoscaler, simulate_autoscaled

    least, colon, most = (options.scale or "").partition(":")
    if not colon or not least.isdigit() or not most.isdigit():
        raise ValueError(f"--scale is LEAST:MOST, got {options.scale!r}")
    if options.gpus is not None or ("rates" not in load and isinstance(load["arrivals"], str)):
        raise ValueError("--scale needs --rate or a recorded trace, and no --gpus")
    if common.pop("policy") != "symphony":
        raise ValueError("--scale is for the policy symphony")
    scaler = Autoscaler(int(least), int(most), bad=options.bad)
    found = simulate_autoscaled(profiles, scaler, start_s=seconds(options.start), **load, **common)
    if options.json:
        facts = {"gpu_seconds": found.gpu_seconds, "gpus": found.gpus.tolist(), **found.result.summary()}
        print(json.dumps(facts, indent=1))
        return 0
    fewest, mean, highest = found.gpus.min(), found.gpus.mean(), found.gpus.max()
    print(f"{fewest} to {highest} GPUs, {mean:.2f} on average ({found.gpu_seconds:.0f} GPU-seconds)")
    print(
        f"  served in time      {found.result.good_rate:.1f} requests/s, {1 - found.result.bad:.2%} of those who waited"
    )
    return 0


SUBCOMMAND = Subcommand(
    name="serve simulate",
    summary="answer how many GPUs a load needs, by simulating the scheduler on measured profiles",
    options=Options,
    run=run,
    example="trainkit serve simulate --profile resnet=1.053*b+5.072 --slo 25ms --rate 5000",
)
