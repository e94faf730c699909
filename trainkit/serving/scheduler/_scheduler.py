"""The scheduler: events in, actions out; the native core with names for its models."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import trainkit.serving._native as _native
from trainkit.serving.scheduler._actions import Action, Dispatch, Drop
from trainkit.serving.scheduler._profile import Profile
from trainkit.serving.scheduler._rules import DeferRule, DropRule, SchedulerError, check

if TYPE_CHECKING:
    from numpy.typing import NDArray

_Core: Any = _native.Core


class Scheduler(_Core):  # type: ignore[misc]
    """Deferred batch scheduling of several models on a pool of equal GPUs (Symphony, arXiv 2308.07470).

    It is pure: times are integer nanoseconds of the caller's clock, it starts nothing and waits for nothing. Each
    event returns a tuple of `Dispatch` and `Drop`; the caller carries them out and calls `on_timer` at `next_timer`.

    A request waits until its model's batch can no longer grow without missing the first deadline, then takes the
    lowest-numbered idle GPU; without one, the model whose window closes first gets the GPU that becomes free.

    Args:
        profiles: by the model's name; a model's number is its place in this order.
        gpus: GPUs 0 to gpus - 1, all idle.
        drop: "window" gives up requests that keep the batch much below the size which keeps up with the rate (it
            holds throughput under overload); "timeout" only what not even a batch of one can meet (better where
            arrivals are bursty and capacity ample); "auto" chooses by the measured burstiness and load.
        defer: "always" waits, "demand" dispatches as soon as the batch pays for its fixed cost at the measured rate,
            "never" is eager, "auto" waits where the models need more than one GPU each, else "demand". A batch that
            waits becomes schedulable earlier by what batches lately waited for a GPU (ours, not the paper's).
        jitter_ns: start this much before the last moment.

    Raises:
        SchedulerError: an option is out of its range.

    Example:
        >>> scheduler = Scheduler({"resnet": Profile.linear(1.0, 5.0, 16)}, gpus=2)
        >>> scheduler.on_request(id=7, model=0, deadline=25_000_000, now=0)
        ()
        >>> scheduler.on_timer(scheduler.next_timer)
        (Dispatch(model=0, ids=(7,), gpu=0),)
    """

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
        super().__init__(
            [profile.latency_ns for profile in profiles.values()],
            gpus,
            get_args(DropRule).index(drop),
            get_args(DeferRule).index(defer),
            jitter_ns,
            Dispatch,
            Drop,
        )
        self._numbers = {name: number for number, name in enumerate(profiles)}

    def number(self, name: str) -> int:
        """The number of a model, which all other calls take.

        Raises:
            SchedulerError: no such model.
        """
        try:
            return self._numbers[name]
        except KeyError:
            raise SchedulerError(f"there is no model {name!r}; there are {', '.join(self._numbers)}") from None

    def add_model(self, name: str, profile: Profile, *, priority: int = 0) -> int:
        """Serve one more model; its number. A free GPU goes to the highest priority first.

        Raises:
            SchedulerError: the name is taken.
        """
        if name in self._numbers:
            raise SchedulerError(f"a model's name is used once, got {name!r} again")
        self._numbers[name] = super().add_model(profile.latency_ns, priority)
        return self._numbers[name]

    def remove_model(self, name: str, now: int) -> tuple[Action, ...]:
        """Serve a model no more; its waiting requests are dropped, running ones end as usual."""
        dropped: tuple[Action, ...] = super().remove_model(self.number(name), now)
        del self._numbers[name]
        return dropped

    if TYPE_CHECKING:

        @property
        def next_timer(self) -> int | None:
            """When `on_timer` is due; None while nothing waits."""

        @property
        def waiting(self) -> int:
            """Requests neither dispatched nor dropped."""

        @property
        def idle_gpus(self) -> int:
            """GPUs that run nothing."""

        def waiting_of(self, model: int) -> int:
            """Waiting requests of one model."""

        def on_request(self, id: int, model: int, deadline: int, now: int) -> tuple[Action, ...]:
            """A request came.

            Args:
                id: any number that no waiting request has.
                model: the model's number.
                deadline: when its batch must have ended, ns.
                now: ns; time never goes back.
            """

        def on_requests(
            self, ids: "NDArray[Any]", models: "NDArray[Any]", deadlines: "NDArray[Any]", now: int
        ) -> tuple[Action, ...]:
            """Several requests came: int64 arrays [n] each. One decision a model for all of them."""

        def on_gpu_free(self, gpu: int, now: int) -> tuple[Action, ...]:
            """A dispatched batch ended."""

        def on_timer(self, now: int) -> tuple[Action, ...]:
            """It is `next_timer` or later."""

        def cancel(self, ids: Sequence[int], now: int) -> tuple[Action, ...]:
            """Nobody waits for these requests any more; an id that runs or is gone is passed over."""

        def add_gpu(self, gpu: int, now: int) -> tuple[Action, ...]:
            """One more idle GPU with this number."""

        def remove_gpu(self, gpu: int, now: int) -> None:
            """A GPU is gone; what it ran is forgotten, and the caller may bring it again by `on_requests`."""
