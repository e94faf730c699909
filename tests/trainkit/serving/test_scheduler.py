"""The native scheduler decides as its plain reference does, on random traces and on cases worked out by hand."""

import doctest
import random

import numpy as np
import pytest

from trainkit.serving import Dispatch, Drop, Profile, ProfileError, Scheduler, SchedulerError
from trainkit.serving.scheduler import _scheduler
from trainkit.serving.scheduler._reference import ReferenceScheduler

MS = 1_000_000
LINE = Profile.linear(1.0, 5.0, 16)  # l(b) = b + 5 ms


class Trace:
    """One random history, told to both schedulers: every answer, timer and count must agree."""

    def __init__(self, seed: int) -> None:
        rng = self.rng = random.Random(seed)
        self.profiles: dict[str, Profile] = {}
        for number in range(rng.choice([1, 1, 2, 3, 5])):
            alpha, beta = rng.choice([0, 0.2, 1, 3]), rng.uniform(0.1, 20)
            sizes = range(1, rng.choice([1, 2, 5, 16, 32]) + 1)
            measured = [round((alpha * size + beta) * MS) + rng.randrange(200_000) for size in sizes]
            self.profiles[f"m{number}"] = Profile.monotone(measured)
        self.slo = [int(p.latency_ns[0] * rng.uniform(1.1, 6)) for p in self.profiles.values()]
        self.gpus = rng.choice([1, 2, 3, 8])
        options = {
            "drop": rng.choice(["window", "timeout", "auto"]),
            "defer": rng.choice(["always", "demand", "never", "auto"]),
            "jitter_ns": rng.choice([0, 0, MS]),
        }
        self.pair = [cls(self.profiles, self.gpus, **options) for cls in (Scheduler, ReferenceScheduler)]
        self.live, self.present = list(range(len(self.slo))), set(range(self.gpus))
        self.busy: dict[int, int] = {}
        self.now = self.ids = self.dispatches = 0
        self.answered: set[int] = set()

    def tell(self, call: str, *words: object, **named: object) -> object:
        said = []
        for scheduler in self.pair:
            try:
                said.append(getattr(scheduler, call)(*words, **named))
            except ValueError:
                said.append("refused")
        assert said[0] == said[1], (call, words)
        return said[0]

    def arrive(self) -> object:
        rng, kind, now = self.rng, self.rng.random(), self.now
        if kind < 0.75:
            model = rng.choice(self.live) if rng.random() < 0.98 else 99
            slo = self.slo[model] if model < len(self.slo) else MS
            late = rng.choice([0, 0, 0, -1, 1]) * rng.randrange(10 * MS)
            id = self.ids if rng.random() < 0.98 else max(0, self.ids - 3)
            self.ids += 1
            return self.tell("on_request", id, model, now + slo + late, now)
        if kind < 0.88:
            count = rng.randrange(12)
            models = [rng.choice(self.live) for _ in range(count)]
            ids = list(range(self.ids, self.ids + count))
            if count and rng.random() < 0.1:
                ids[-1] = max(0, self.ids - 2)  # perhaps still waiting: then none of them is taken
            self.ids += count
            deadlines = [now + self.slo[m] - rng.choice([0, rng.randrange(MS)]) for m in models]
            return self.tell("on_requests", *(np.array(a, dtype=np.int64) for a in (ids, models, deadlines)), now)
        if kind < 0.96:
            return self.tell("cancel", [rng.randrange(self.ids + 1) for _ in range(3)], now)
        if kind < 0.97 and self.present:
            gpu = rng.choice(sorted(self.present))
            self.tell("remove_gpu", gpu, now)
            self.present.discard(gpu)
            self.busy.pop(gpu, None)
            return ()
        if kind < 0.98:
            gpu = rng.randrange(200)
            actions = self.tell("add_gpu", gpu, now)
            self.present.add(gpu)
            return actions
        if kind < 0.99 and len(self.live) > 1:
            return self.tell("remove_model", f"m{self.live.pop()}", now)
        self.live.append(len(self.slo))
        self.slo.append(self.slo[0])
        self.tell("add_model", f"m{len(self.slo) - 1}", self.profiles["m0"], priority=rng.randrange(-1, 2))
        return ()

    def step(self, rate: float) -> None:
        rng = self.rng
        timer = self.pair[0].next_timer
        assert timer == self.pair[1].next_timer
        gap = int(rng.expovariate(rate)) if rng.random() < 0.9 else rng.choice([0, 60 * MS, 6000 * MS])
        events = [(self.now + gap, "arrival")] + [
            (end, "end") for end in [min(self.busy.values(), default=None)] if end
        ]
        events += [(max(timer, self.now), "timer")] if timer is not None else []
        self.now, kind = min(events)
        if kind == "arrival":
            actions = self.arrive()
        elif kind == "timer":
            actions = self.tell("on_timer", self.now)
        else:
            gpu = min(self.busy, key=lambda g: (self.busy[g], g))
            del self.busy[gpu]
            actions = self.tell("on_gpu_free", gpu, self.now)
        for action in actions if isinstance(actions, tuple) else ():
            if isinstance(action, Dispatch):
                assert action.gpu in self.present
                assert action.gpu not in self.busy
                profile = self.profiles.get(f"m{action.model}", self.profiles["m0"])
                assert 1 <= len(action.ids) <= profile.max_batch
                self.busy[action.gpu] = self.now + profile.latency_ns[len(action.ids) - 1] + rng.randrange(1000)
                self.dispatches += 1
        assert self.pair[0].waiting == self.pair[1].waiting
        assert self.pair[0].idle_gpus == self.pair[1].idle_gpus


def follow(seed: int) -> int:
    trace = Trace(seed)
    fastest = min(p.latency_ns[-1] / p.max_batch for p in trace.profiles.values())
    rate = trace.rng.choice([0.2, 1, 3]) * trace.gpus / fastest
    for _ in range(trace.rng.choice([30, 150, 400])):
        trace.step(rate)
    return trace.dispatches


@pytest.mark.parametrize("part", range(4))
def test_decides_as_the_reference(part: int) -> None:
    assert sum(follow(seed) for seed in range(50 * part, 50 * part + 50)) > 1000


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_decides_as_the_reference_on_a_thousand_traces() -> None:
    for seed in range(1000, 2000):
        follow(seed)


def test_the_example_of_the_docstring() -> None:
    assert doctest.testmod(_scheduler).failed == 0
    assert doctest.DocTestFinder().find(_scheduler.Scheduler)


def test_a_first_request_waits_no_longer_than_its_rate_is_measured() -> None:
    for kind in (Scheduler, ReferenceScheduler):
        scheduler = kind({"m": LINE}, 2)
        assert scheduler.on_request(1, 0, 3000 * MS, 0) == ()
        assert scheduler.next_timer == 50 * MS
        assert scheduler.on_timer(50 * MS) == (Dispatch(0, (1,), 0),)


def test_waits_until_one_more_request_would_not_fit() -> None:
    scheduler = Scheduler({"m": LINE}, 2)
    assert scheduler.on_request(1, 0, 25 * MS, 0) == ()
    assert scheduler.next_timer == 18 * MS  # 25 - l(2)
    assert scheduler.on_request(2, 0, 26 * MS, MS) == ()
    assert scheduler.next_timer == 17 * MS  # 25 - l(3)
    assert scheduler.on_timer(17 * MS) == (Dispatch(0, (1, 2), 0),)
    assert scheduler.next_timer is None


def test_the_window_closes_first_gets_the_free_gpu() -> None:
    scheduler = Scheduler({"a": LINE, "b": LINE}, 1, defer="never")
    assert scheduler.on_request(0, 0, 25 * MS, 0) == (Dispatch(0, (0,), 0),)
    assert scheduler.on_request(1, 0, 60 * MS, 1) == ()
    assert scheduler.on_request(2, 1, 50 * MS, 2) == ()
    assert scheduler.on_gpu_free(0, 6 * MS) == (Dispatch(1, (2,), 0),)


def test_priority_goes_before_urgency() -> None:
    scheduler = Scheduler({"a": LINE}, 1, defer="never")
    scheduler.add_model("vip", LINE, priority=1)
    scheduler.on_request(0, 0, 25 * MS, 0)
    scheduler.on_request(1, 0, 50 * MS, 1)
    scheduler.on_request(2, 1, 60 * MS, 2)
    assert scheduler.on_gpu_free(0, 6 * MS) == (Dispatch(1, (2,), 0),)


def test_a_drop_is_decided_while_a_batch_runs() -> None:
    scheduler = Scheduler({"m": LINE}, 1, defer="never")
    scheduler.on_request(0, 0, 100 * MS, 0)
    scheduler.on_request(1, 0, 10 * MS, 0)
    assert scheduler.next_timer == 4 * MS + 1  # 10 - l(1), then it is too late
    assert scheduler.on_timer(4 * MS + 1) == (Drop(0, (1,)),)


def test_the_lowest_idle_gpu_among_thousands() -> None:
    scheduler = Scheduler({"m": Profile([MS])}, 5000, defer="never")
    for at in range(5000):
        assert scheduler.on_request(at, 0, 9 * MS, 0) == (Dispatch(0, (at,), at),)
    for gpu in (4999, 4097, 63, 64):
        scheduler.on_gpu_free(gpu, MS)
    assert [a.gpu for n in range(4) for a in scheduler.on_request(9000 + n, 0, 9 * MS, MS)] == [63, 64, 4097, 4999]


def test_cancelled_requests_never_run() -> None:
    scheduler = Scheduler({"m": LINE}, 1, defer="always")
    scheduler.on_requests(np.arange(5), np.zeros(5, np.int64), np.full(5, 30 * MS), 0)
    assert scheduler.cancel([1, 3, 77], MS) == ()
    assert scheduler.waiting == 3
    assert scheduler.on_timer(scheduler.next_timer or 0) == (Dispatch(0, (0, 2, 4), 0),)


def test_a_lost_gpu_gets_nothing_more() -> None:
    scheduler = Scheduler({"m": LINE}, 2, defer="never")
    scheduler.remove_gpu(0, 0)
    assert scheduler.on_request(0, 0, 25 * MS, 0) == (Dispatch(0, (0,), 1),)
    scheduler.remove_gpu(1, 1)
    assert scheduler.on_request(0, 0, 25 * MS, 1) == ()  # brought again: the id is free once dispatched
    assert scheduler.add_gpu(7, 2) == (Dispatch(0, (0,), 7),)
    with pytest.raises(ValueError, match="runs nothing"):
        scheduler.on_gpu_free(0, 3)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda s: s.on_request(1, 0, 10 * MS, 0), "must not be used again, got 1"),
        (lambda s: s.on_request(2, 5, 10 * MS, 0), "no model 5: 1 were added"),
        (lambda s: s.on_timer(-1), "time runs forward"),
        (lambda s: s.on_request(2, 0, 2 * 10**15, 0), "at most 10\\^15 ns away"),
        (lambda s: s.on_gpu_free(1, 0), "got GPU 1, which runs nothing"),
        (lambda s: s.add_gpu(0, 0), "not in use, got 0"),
        (lambda s: s.remove_gpu(9, 0), "no GPU 9"),
        (lambda s: s.add_model("m", LINE), "used once, got 'm'"),
        (lambda s: s.remove_model("x", 0), "no model 'x'"),
        (lambda s: s.on_requests(np.arange(2), np.arange(1), np.arange(2), 0), "equally long"),
    ],
)
def test_refusals_change_nothing(call: object, match: str) -> None:
    scheduler = Scheduler({"m": LINE}, 2)
    scheduler.on_request(1, 0, 25 * MS, 0)
    with pytest.raises(ValueError, match=match):
        call(scheduler)  # type: ignore[operator]
    assert (scheduler.waiting, scheduler.next_timer) == (1, 18 * MS)


def test_options_are_checked() -> None:
    for options in ({"gpus": -1}, {"gpus": 1, "drop": "x"}, {"gpus": 1, "defer": "x"}, {"gpus": 1, "jitter_ns": -1}):
        with pytest.raises(SchedulerError, match="got"):
            Scheduler({"m": LINE}, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("table", [[], [0], [5, 4], [1.5], [True], [10**16]])
def test_a_profile_that_is_no_profile(table: list[int]) -> None:
    with pytest.raises(ProfileError):
        Profile(table)


def test_profiles_are_saved_and_read(tmp_path: object) -> None:
    path = f"{tmp_path}/p.json"
    Profile([1, 2, 2], {"machine": "x"}).save(path)
    assert Profile.load(path) == Profile([1, 2, 2])
    assert Profile.load(path).about == {"machine": "x"}
    assert Profile.slowest([Profile([1, 5]), Profile([2, 3, 9])]) == Profile([2, 5])
    for text, match in (("{", "not JSON"), ("[]", "not a profile"), ('{"format": "trainkit-profile-1"}', "must hold")):
        with open(path, "w") as file:
            file.write(text)
        with pytest.raises(ProfileError, match=match):
            Profile.load(path)
    with open(path, "w") as file:
        file.write('{"format": "trainkit-profile-1", "latency_ns": [3, 2]}')
    with pytest.raises(ProfileError, match=r"p\.json: latency must not fall"):
        Profile.load(path)
