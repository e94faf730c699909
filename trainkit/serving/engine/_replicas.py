"""Language models as the scheduler sees them: a process for each model and device, and who goes where."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from trainkit.serving.engine import _language
from trainkit.serving.engine._completions import Ask, Piece
from trainkit.serving.engine._gpu import GpuProcess
from trainkit.serving.engine._models import ModelError
from trainkit.serving.engine._options import ServeOptions

_logger = logging.getLogger(__name__)
_RESTART_S = 1.0

# (consumer, uid, what): a Piece, or (status, detail, seconds to come again)
Answer = Callable[[int, str, Any], None]


@dataclass
class _Open:
    consumer: int
    uid: str
    model: str
    ask: Ask
    deadline: int
    begun: bool = False
    deaths: int = 0


@dataclass
class _Replica:
    process: GpuProcess
    model: str
    device: str
    open: dict[int, _Open] = field(default_factory=dict)
    state: dict[str, int] = field(default_factory=dict)
    leaving: bool = False

    @property
    def rank(self) -> tuple[int, int]:
        """Where fewest wait to be admitted; among equals the fullest (Punica's rule: others stay free as a whole)."""
        running = self.state.get("running", 0)
        return (max(0, len(self.open) - running), -running)


class Replicas:
    """All processes of language models of one scheduler."""

    def __init__(self, options: ServeOptions, answer: Answer) -> None:
        self._options, self._answer = options, answer
        self._replicas: list[_Replica] = []
        self._by_uid: dict[str, tuple[int, _Replica]] = {}
        self._orphans: list[_Open] = []  # nobody is up for them
        self._restarts: list[tuple[float, str, str]] = []
        self._reloading: list[_Replica] = []
        self._next = 0

    @staticmethod
    def start(options: ServeOptions) -> list[tuple[str, GpuProcess]]:
        """A process for each model and device; they load at the same time."""
        return [(name, _process(options, name, device)) for name in options.languages for device in options.devices]

    def adopt(self, started: list[tuple[str, GpuProcess]]) -> None:
        """Take over what `start` began and somebody waited for."""
        self._replicas = [_Replica(process, name, process.device) for name, process in started]

    @property
    def pipes(self) -> dict[Connection, _Replica]:
        """Whom to listen to."""
        return {replica.process.pipe: replica for replica in self._replicas}

    @property
    def state(self) -> dict[str, int]:
        """Sums over the processes that serve."""
        up = [replica for replica in self._replicas if replica.process.ready and not replica.leaving]
        sums = {
            f"language_{key}": sum(replica.state.get(key, 0) for replica in up)
            for key in ("running", "waiting", "free_pages", "pages")
        }
        return sums | {"language_processes": len(up)}

    @property
    def due(self) -> list[float]:
        """Monotonic seconds at which `restart` has work."""
        return [at for at, _, _ in self._restarts]

    def request(self, consumer: int, uid: str, model: str, ask: Ask, deadline: int) -> None:
        """A prompt came."""
        self._route(_Open(consumer, uid, model, ask, deadline))

    def _route(self, one: _Open) -> None:
        up = [r for r in self._replicas if r.model == one.model and r.process.ready and not r.leaving]
        if not up:
            self._orphans.append(one)
            return
        replica = min(up, key=lambda r: r.rank)
        key = self._next = self._next + 1
        replica.open[key] = one
        self._by_uid[one.uid] = key, replica
        replica.process.send(("complete", key, one.ask, one.deadline))

    def cancel(self, uid: str) -> bool:
        """Its client is gone; whether it was one of ours."""
        key, replica = self._by_uid.pop(uid, (0, None))
        if replica is None:
            before = len(self._orphans)
            self._orphans = [one for one in self._orphans if one.uid != uid]
            return len(self._orphans) < before
        replica.open.pop(key, None)
        replica.process.send(("cancel", key))
        self._close_if_empty(replica)
        return True

    def hear(self, replica: _Replica) -> None:
        """A message of this process, or its death."""
        try:
            message = replica.process.pipe.recv()
            if not replica.process.ready:
                replica.process.started(message)
                self._began(replica)
                return
        except (EOFError, OSError):
            self._lost(replica)
            return
        except ModelError as error:
            _logger.error("a language model does not load again: %s", error)
            self._lost(replica)
            return
        _, events, replica.state = message
        for key, what in events:
            one = replica.open.get(key)
            if one is None:
                continue
            one.begun = True
            if not isinstance(what, Piece) or what.finish is not None:
                del replica.open[key]
                del self._by_uid[one.uid]
            self._answer(one.consumer, one.uid, what)
        self._close_if_empty(replica)

    def _began(self, replica: _Replica) -> None:
        """It serves: who waited for it goes there, and a reload goes on with the next."""
        if old := next(
            (r for r in self._reloading[:1] if r.model == replica.model and r.device == replica.device), None
        ):
            self._reloading.remove(old)
            old.leaving = True
            self._close_if_empty(old)
            self._replace_next()
        orphans, self._orphans = self._orphans, []
        for one in orphans:
            self._route(one)

    def _close_if_empty(self, replica: _Replica) -> None:
        if replica.leaving and not replica.open and replica in self._replicas:
            self._replicas.remove(replica)
            replica.process.close()

    def _lost(self, replica: _Replica) -> None:
        """What had not begun begins elsewhere, once; what had begun ends with an error, as its text is half sent."""
        self._replicas.remove(replica)
        replica.process.close()
        if not replica.leaving:
            _logger.warning("the process of %s on %s died; a new one loads", replica.model, replica.device)
            at = time.monotonic() + (0 if replica.process.ready else _RESTART_S)
            self._restarts.append((at, replica.model, replica.device))
        if replica in self._reloading:
            self._reloading.remove(replica)
        for one in replica.open.values():
            self._by_uid.pop(one.uid, None)
            one.deaths += 1
            if one.begun or one.deaths > 1:
                self._answer(one.consumer, one.uid, (500, "the model's process died while it ran this request", None))
            else:
                self._route(one)

    def reload(self) -> int:
        """Load all anew, one after the other; how many."""
        self._reloading = [r for r in self._replicas if r.process.ready and not r.leaving]
        count = len(self._reloading)
        self._replace_next()
        return count

    def _replace_next(self) -> None:
        if self._reloading:
            old = self._reloading[0]
            fresh = _Replica(_process(self._options, old.model, old.device), old.model, old.device)
            self._replicas.append(fresh)

    def tick(self) -> None:
        """Start what is due; give up who waited in vain for a process."""
        now = time.monotonic()
        for at, model, device in [one for one in self._restarts if one[0] <= now]:
            self._restarts.remove((at, model, device))
            self._replicas.append(_Replica(_process(self._options, model, device), model, device))
        for one in [one for one in self._orphans if one.deadline < time.monotonic_ns()]:
            self._orphans.remove(one)
            self._answer(one.consumer, one.uid, (503, "no process of this model is up", 5))


def _process(options: ServeOptions, model: str, device: str) -> GpuProcess:
    language = options.languages[model]
    return GpuProcess(device, _language.main, language.source, language.objective)
