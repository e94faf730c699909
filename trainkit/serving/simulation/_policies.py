"""Which rule decides in a simulation: ours, its ablations, and other systems' as published."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import trainkit.serving._native as _native
from trainkit.serving.scheduler import Profile, SchedulerError
from trainkit.serving.scheduler._rules import DeferRule, DropRule
from trainkit.serving.simulation._nexus import plan


@dataclass(frozen=True)
class Setting:
    """What a policy may know."""

    profiles: Mapping[str, Profile]
    gpus: int
    rates: Mapping[str, float]
    slo_ns: Mapping[str, int]
    seen: Sequence[Sequence[int]]
    """each model's latencies as the scheduler believes them"""
    jitter_ns: int


def _scheduler(drop: str, defer: str) -> Any:
    def make(setting: Setting, tables: Any, words: Sequence[str]) -> Any:
        if words:
            raise SchedulerError(f"this policy takes no arguments, got {':'.join(words)!r}")
        rules = get_args(DropRule).index(drop), get_args(DeferRule).index(defer)
        return _native.Run.scheduler(setting.seen, tables, setting.gpus, *rules, setting.jitter_ns)

    return make


def _per_replica(setting: Setting, tables: Any, words: Sequence[str]) -> Any:
    try:
        batch, wait_ms = int(words[0]), float(words[1])
        if len(words) > 2 or batch < 1 or not 0 <= wait_ms < 1e6:
            raise ValueError
    except (ValueError, IndexError):
        raise SchedulerError(
            f"per_replica takes a batch from 1 and a wait in ms, per_replica:16:5, got {':'.join(words)!r}"
        ) from None
    return _native.Run.per_replica(setting.seen, tables, setting.gpus, batch, round(wait_ms * 1e6))


def _nexus(setting: Setting, tables: Any, words: Sequence[str]) -> Any:
    sessions = plan(setting.profiles, setting.gpus, setting.rates, setting.slo_ns)
    return _native.Run.nexus(setting.seen, tables, setting.gpus, sessions)


_POLICIES: Mapping[str, Any] = {
    "symphony": _scheduler("window", "auto"),
    "symphony-auto-drop": _scheduler("auto", "auto"),
    "symphony-timeout": _scheduler("timeout", "auto"),
    "deferred": _scheduler("window", "always"),
    "demand": _scheduler("window", "demand"),
    "eager": _scheduler("timeout", "never"),
    "eager-window": _scheduler("window", "never"),
    "per_replica": _per_replica,
    "bentoml": lambda s, tables, _: _native.Run.bentoml(s.seen, tables, s.gpus, list(s.slo_ns.values())),
    "clockwork": lambda s, tables, _: _native.Run.clockwork(s.seen, tables, s.gpus),
    "nexus": _nexus,
    "shepherd": lambda s, tables, _: _native.Run.shepherd(s.seen, tables, s.gpus, 3.03),
}
POLICIES = tuple(_POLICIES)


def start(policy: str, setting: Setting) -> Any:
    """A native run of this policy.

    Raises:
        SchedulerError: there is no such policy, or not with these arguments.
    """
    name, *words = policy.split(":")
    if name not in _POLICIES:
        raise SchedulerError(f"policy is one of {', '.join(POLICIES)}, got {policy!r}")
    return _POLICIES[name](setting, [p.latency_ns for p in setting.profiles.values()], words)
