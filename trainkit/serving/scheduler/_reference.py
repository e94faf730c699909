"""The scheduler in plain Python: the definition that the native core is tested against, decision by decision.

Lists and linear scans, nothing clever. Names follow the paper (arXiv 2308.07470): the schedulable window of a batch of
b requests whose first deadline is D is [D - l(b + 1), D - l(b)], its ends called frontrun and latest.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trainkit.serving.scheduler._actions import Action, Dispatch, Drop
from trainkit.serving.scheduler._profile import Profile
from trainkit.serving.scheduler._rules import DeferRule, DropRule, SchedulerError, check

_BUCKET_NS = 50_000_000
_BUCKETS = 100
_FARTHEST_NS = 10**15
_LAST_NS = 4 * 10**18


@dataclass
class _Meter:
    """Arrivals of the last five seconds, by completed buckets of 50 ms: (requests, sum of their time left)."""

    done: list[tuple[int, int]] = field(default_factory=list)
    count: int = 0
    budget_ns: int = 0
    until: int | None = None

    def add(self, now: int, budget: int) -> bool:
        if self.until is None:
            self.until = now + _BUCKET_NS
        completed = False
        while now >= self.until:
            self.done = [*self.done, (self.count, self.budget_ns)][-_BUCKETS:]
            self.count = self.budget_ns = 0
            self.until += _BUCKET_NS
            completed = True
        self.count += 1
        self.budget_ns += budget
        return completed

    @property
    def requests(self) -> int:
        return sum(count for count, _ in self.done)

    @property
    def window(self) -> int:
        return len(self.done) * _BUCKET_NS

    @property
    def budget(self) -> int:
        if self.requests:
            return sum(budget for _, budget in self.done) // self.requests
        return self.budget_ns // self.count if self.count else 0

    @property
    def bursty(self) -> bool:
        buckets, squares = len(self.done), sum(count**2 for count, _ in self.done)
        return buckets >= 20 and buckets * squares - self.requests**2 > 3 * buckets * self.requests


@dataclass
class _Model:
    profile: Profile
    priority: int
    waiting: list[tuple[int, int]] = field(default_factory=list)  # (deadline, id), sorted by deadline alone
    split: int = 0
    meter: _Meter = field(default_factory=_Meter)
    target: int = 0
    demand: int = 0  # thousandths of a GPU
    bursty: bool = False
    timer: int | None = None
    ready: int | None = None  # end of the window, while the model waits for a GPU ...
    ready_since: int | None = None  # ... which it does since then

    def latency(self, size: int) -> int:
        return self.profile.latency_ns[min(size, self.profile.max_batch) - 1]


class ReferenceScheduler:
    """`Scheduler` with the same calls, options and decisions, at the price of time."""

    def __init__(
        self,
        profiles: Mapping[str, Profile],
        gpus: int,
        *,
        drop: DropRule = "window",
        defer: DeferRule = "auto",
        jitter_ns: int = 0,
    ) -> None:
        check(profiles, gpus, drop, defer, jitter_ns)
        self._drop, self._defer, self._jitter = drop, defer, jitter_ns
        self._models: list[_Model | None] = [_Model(profile, 0) for profile in profiles.values()]
        self._numbers = {name: number for number, name in enumerate(profiles)}
        self._busy: dict[int, bool] = dict.fromkeys(range(gpus), False)
        self._now = 0
        self._wait = 0
        self._few = self._deferring = self._overloaded = False
        self._actions: list[Action] = []

    @property
    def next_timer(self) -> int | None:
        return min((m.timer for m in self._models if m and m.timer is not None), default=None)

    @property
    def waiting(self) -> int:
        return sum(len(m.waiting) for m in self._models if m)

    @property
    def idle_gpus(self) -> int:
        return sum(not busy for busy in self._busy.values())

    def waiting_of(self, model: int) -> int:
        return len(self._known(model).waiting)

    def on_request(self, id: int, model: int, deadline: int, now: int) -> tuple[Action, ...]:
        return self.on_requests([id], [model], [deadline], now)

    def on_requests(
        self, ids: Sequence[int], models: Sequence[int], deadlines: Sequence[int], now: int
    ) -> tuple[Action, ...]:
        if not len(ids) == len(models) == len(deadlines):
            raise SchedulerError("ids, models and deadlines must be equally long")
        for number in models:
            self._known(number)
        self._advance(now)
        seen = {id for m in self._models if m for _, id in m.waiting}
        for id, deadline in zip(ids, deadlines, strict=True):
            if deadline > now + _FARTHEST_NS:
                raise SchedulerError(f"a deadline is at most 10^15 ns away, got {deadline} at {now}")
            if id in seen:
                raise SchedulerError(f"a waiting request's id must not be used again, got {id}")
            seen.add(id)
        for id, number, deadline in zip(ids, models, deadlines, strict=True):
            model = self._known(number)
            if model.meter.add(now, max(deadline - now, 0)) or not model.target:
                self._retarget(model)
                self._weigh()
            at = bisect_right(model.waiting, deadline, key=lambda request: request[0])
            model.waiting.insert(at, (deadline, id))
            model.split += at < model.split
        for number in dict.fromkeys(models):
            self._settle(number)
        return self._acted()

    def on_gpu_free(self, gpu: int, now: int) -> tuple[Action, ...]:
        if not self._busy.get(gpu):
            raise SchedulerError(f"a GPU becomes free after a dispatch to it, got GPU {gpu}, which runs nothing")
        self._advance(now)
        self._busy[gpu] = False
        return self._match()

    def on_timer(self, now: int) -> tuple[Action, ...]:
        self._advance(now)
        while (due := self.next_timer) is not None and due <= now:
            self._settle(next(n for n, m in enumerate(self._models) if m and m.timer == due))
        return self._acted()

    def cancel(self, ids: Sequence[int], now: int) -> tuple[Action, ...]:
        self._advance(now)
        for id in ids:
            for number, model in enumerate(self._models):
                for at, (_, other) in enumerate(model.waiting if model else []):
                    if model and other == id:
                        del model.waiting[at]
                        model.split -= at < model.split
                        self._settle(number)
                        break
        return self._acted()

    def add_gpu(self, gpu: int, now: int) -> tuple[Action, ...]:
        if not 0 <= gpu <= 1_000_000 or gpu in self._busy:
            raise SchedulerError(f"a new GPU's number is from 0 to 1000000 and not in use, got {gpu}")
        self._advance(now)
        self._busy[gpu] = False
        return self._match()

    def remove_gpu(self, gpu: int, now: int) -> None:
        if gpu not in self._busy:
            raise SchedulerError(f"there is no GPU {gpu} to remove")
        self._advance(now)
        del self._busy[gpu]

    def add_model(self, name: str, profile: Profile, *, priority: int = 0) -> int:
        self._models.append(_Model(profile, priority))
        self._numbers[name] = len(self._models) - 1
        return self._numbers[name]

    def remove_model(self, name: str, now: int) -> tuple[Action, ...]:
        self._advance(now)
        number = self._numbers.pop(name)
        self._give_up(number, len(self._known(number).waiting))
        self._models[number] = None
        return self._acted()

    def _known(self, number: int) -> _Model:
        model = self._models[number] if 0 <= number < len(self._models) else None
        if model is None:
            raise SchedulerError(f"there is no model {number}: {len(self._models)} were added")
        return model

    def _advance(self, now: int) -> None:
        if not self._now <= now <= _LAST_NS:
            raise SchedulerError(f"time runs forward, up to 4 * 10^18 ns: it was {self._now}, got {now}")
        self._now = now

    def _acted(self) -> tuple[Action, ...]:
        acted, self._actions = tuple(self._actions), []
        return acted

    def _give_up(self, number: int, count: int) -> None:
        """Drop the first `count` requests."""
        model = self._known(number)
        ids = tuple(id for _, id in model.waiting[:count])
        del model.waiting[:count]
        model.split = max(0, model.split - count)
        if ids and self._actions and isinstance(last := self._actions[-1], Drop) and last.model == number:
            self._actions[-1] = Drop(number, last.ids + ids)
        elif ids:
            self._actions.append(Drop(number, ids))

    def _retarget(self, model: _Model) -> None:
        """The largest b with l(b) + l(b) / n <= budget, n = rate l(b) / b GPUs; section 1.1 of the design notes."""
        budget, window, count = model.meter.budget, model.meter.window, model.meter.requests
        sizes = range(1, model.profile.max_batch + 1)
        if not count:
            model.target = max([1, *(b for b in sizes if model.latency(b) <= budget // 2)])
            return
        model.target = max([1, *(b for b in sizes if model.latency(b) * count + window * b <= budget * count)])
        model.demand = min(50_000_000, model.latency(model.target) * count * 1000 // (window * model.target))
        model.bursty = self._drop == "auto" and model.meter.bursty

    def _weigh(self) -> None:
        """Whether deferral suits this load, and whether it is more than the GPUs can serve."""
        demands = [model.demand for model in self._models if model]
        total, squares, gpus = sum(demands), sum(demand**2 for demand in demands), len(self._busy)
        self._few = 2 * gpus < 3 * len(demands)
        if not total:
            self._deferring = not self._few
        elif self._few or 10 * squares <= 13_000 * total:
            self._deferring = False
        elif 10 * squares > 16_000 * total:
            self._deferring = True
        self._overloaded = 5 * total > 6000 * gpus

    def _next(self, number: int) -> tuple[int, int, int] | None:
        """(batch, when it should start, when it cannot any more), dropping what is out of reach."""
        model, now = self._known(number), self._now
        waiting = model.waiting
        while model.split < len(waiting) and waiting[model.split][0] < now + model.latency(len(waiting) - model.split):
            model.split += 1
        if model.split == len(waiting):
            self._give_up(number, len(waiting))
            return None
        timeout = self._drop == "timeout" or (self._drop == "auto" and model.bursty and not self._overloaded)
        least = (
            1 if timeout else model.target if self._overloaded else max(1, model.target * (4 if self._few else 7) // 8)
        )
        finish = now + model.latency(min(least, len(waiting) - model.split))
        late = 0
        while late < model.split and waiting[late][0] < finish:
            late += 1
        self._give_up(number, late)
        deadline = waiting[0][0]
        fits = sum(latency <= deadline - now for latency in model.profile.latency_ns)
        batch = min(fits, len(waiting))
        latest = deadline - model.latency(batch)
        slope = (model.latency(model.profile.max_batch) - model.latency(1)) // max(1, model.profile.max_batch - 1)
        fixed = max(0, model.latency(1) - slope)
        gains = fixed >= 4 * slope
        deferred = self._defer == "always" or (self._defer == "auto" and self._deferring and gains)
        worth = 2 * batch if self._defer == "auto" and self._few else batch
        enough = not deferred and worth * model.meter.window >= fixed * model.meter.requests
        start = now
        if batch < model.profile.max_batch and self._defer != "never" and not enough:
            frontrun = deadline - model.latency(batch + 1)
            allowance = self._wait if self._overloaded else 2 * self._wait
            start = max(now, frontrun - self._jitter - allowance)
            if self._defer == "auto" and not model.meter.requests:
                start = min(start, max(now, model.meter.until or 0))
        return batch, start, latest

    def _settle(self, number: int) -> None:
        model = self._known(number)
        while True:
            found = self._next(number)
            model.timer = model.ready = None
            if found is None:
                model.ready_since = None
                return
            batch, start, latest = found
            if start > self._now:
                model.timer, model.ready_since = start, None
                return
            idle = [gpu for gpu, busy in self._busy.items() if not busy]
            if not idle:
                model.ready, model.timer = latest, latest + 1
                model.ready_since = self._now if model.ready_since is None else model.ready_since
                return
            waited = 0 if model.ready_since is None else self._now - model.ready_since
            self._wait += (waited - self._wait) >> 5
            model.ready_since = None
            gpu = min(idle)
            self._busy[gpu] = True
            ids = tuple(id for _, id in model.waiting[:batch])
            del model.waiting[:batch]
            model.split = max(0, model.split - batch)
            self._actions.append(Dispatch(number, ids, gpu))

    def _match(self) -> tuple[Action, ...]:
        while self.idle_gpus:
            ready = [(-m.priority, m.ready, n) for n, m in enumerate(self._models) if m and m.ready is not None]
            if not ready:
                break
            self._settle(min(ready)[2])
        return self._acted()
