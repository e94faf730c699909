"""A language model's process: iteration-level batching, admission by pages under TTFT and TPOT objectives.

Deferral is not for language models: a decoding step serves all that run, whenever they came (Orca, OSDI 2022).
"""

import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from trainkit.serving.engine._completions import Ask, Piece, held
from trainkit.serving.engine._models import LanguageModel, ModelError, ModelSource
from trainkit.serving.engine._options import Objective

# A character has at most four bytes, and so at most four tokens of a model of bytes.
_LONGEST_CHARACTER = 4
# Weight of the newest step in the running means.
_NEW = 0.2


class _Text:
    """Text of tokens as they come: whole characters, nothing of a stop text."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str]) -> None:
        self._decode, self._stops = decode, stops
        self.tokens: list[int] = []
        self._known = self._begin = 0  # tokens[begin:known] are decoded for the sake of what follows them
        self._buffer = ""

    def take(self, end: bool) -> tuple[str, bool]:
        """(what is new, whether a stop text ended it)."""
        before = self._decode(self.tokens[self._begin : self._known])
        text = self._decode(self.tokens[self._begin :])
        open_character = text.endswith("\ufffd") and len(self.tokens) - self._known < _LONGEST_CHARACTER
        if end or not open_character:
            self._buffer += text[len(before) :]
            self._begin, self._known = self._known, len(self.tokens)
        cuts = [at for stop in self._stops if (at := self._buffer.find(stop)) >= 0]
        if cuts:
            return self._buffer[: min(cuts)], True
        keep = 0 if end else held(self._buffer, self._stops)
        ready, self._buffer = self._buffer[: len(self._buffer) - keep], self._buffer[len(self._buffer) - keep :]
        return ready, False


@dataclass
class _Running:
    ask: Ask
    prompt: Sequence[int]
    deadline: int
    text: _Text
    admitted: float = 0.0


@dataclass
class _Replica:
    """Waiting and running requests of one process."""

    model: LanguageModel
    objective: Objective
    sampling: Callable[..., Any] = field(init=False)
    waiting: deque[tuple[int, _Running]] = field(default_factory=deque)
    running: dict[int, _Running] = field(default_factory=dict)
    events: list[tuple[int, Any]] = field(default_factory=list)
    pace_s: float = 0.0  # of a step, a running mean
    prefill_s: float = 0.0  # of a prompt's token, from its admission to the first answer

    def __post_init__(self) -> None:
        if self.model.sampling is None:
            from trainkit.serving.generate import Sampling

            self.sampling = Sampling
        else:
            self.sampling = self.model.sampling

    def take(self, message: tuple[Any, ...]) -> None:
        """A prompt, or the end of one, from the scheduler."""
        kind, key, *words = message
        if kind == "cancel":
            self.waiting = deque(one for one in self.waiting if one[0] != key)
            if self.running.pop(key, None) is not None:
                self.model.engine.cancel(key)
            return
        ask, deadline = words
        try:
            prompt = list(self.model.encode(ask.prompt)) if isinstance(ask.prompt, str) else list(ask.prompt)
            one = _Running(ask, prompt, deadline, _Text(self.model.decode, ask.stop))
        except Exception as error:
            self.events.append((key, (400, f"the prompt cannot be encoded: {error}", None)))
            return
        self.waiting.append((key, one))

    def admit(self) -> None:
        """In order of arrival, while pages suffice and the pace is kept."""
        engine, tpot = self.model.engine, self.objective.tpot_ms
        while self.waiting:
            key, one = self.waiting[0]
            # who has the engine alone is no longer delayed by others: a wrong estimate must not refuse for ever
            estimate = self.prefill_s * len(one.prompt) if engine.running > 0 else 0.0
            if time.monotonic_ns() + 1e9 * estimate > one.deadline:
                self.events.append((key, (503, "the first token cannot come in time at this load", 1)))
                self.waiting.popleft()
                continue
            slow = tpot is not None and engine.running > 0 and self.pace_s * 1e3 > tpot
            full = engine.running > 0 and not engine.fits(one.prompt, one.ask.max_tokens)
            never = len(one.prompt) + one.ask.max_tokens > engine.max_length  # which add_request says
            if (slow or full) and not never:
                return
            self.waiting.popleft()
            ask = one.ask
            try:
                sampling = self.sampling(
                    temperature=ask.temperature, top_k=ask.top_k, top_p=ask.top_p, min_p=ask.min_p, seed=ask.seed
                )
                engine.add_request(key, one.prompt, max_new_tokens=ask.max_tokens, sampling=sampling)
            except ValueError as error:
                self.events.append((key, (400, str(error), None)))
                continue
            one.admitted = time.monotonic()
            self.running[key] = one

    def warm(self) -> None:
        """Two tokens for nobody, so that the first request does not wait for kernels that compile."""
        if prompt := list(self.model.encode(" ")):
            sampling = self.sampling(temperature=1.0, top_k=None, top_p=1.0, min_p=0.0, seed=0)
            self.model.engine.add_request(0, prompt, max_new_tokens=2, sampling=sampling)
            while self.model.engine.running:
                self.model.engine.step()

    def step(self) -> None:
        """One iteration of all that run."""
        begin = time.monotonic()
        tokens = self.model.engine.step()
        now = time.monotonic()
        if tokens:
            self.pace_s += _NEW * (now - begin - self.pace_s)
        for key, token, finish in tokens:
            one = self.running.get(key)
            if one is None:
                continue
            if not one.text.tokens:
                self.prefill_s += _NEW * ((now - one.admitted) / len(one.prompt) - self.prefill_s)
            if finish != "stop":  # the end's own token is no text
                one.text.tokens.append(token)
            text, stopped = one.text.take(finish is not None)
            if stopped and finish is None:
                self.model.engine.cancel(key)
            finish = "stop" if stopped else finish
            self.events.append((key, Piece(text, len(one.text.tokens), len(one.prompt), finish)))
            if finish is not None:
                del self.running[key]

    @property
    def state(self) -> dict[str, int]:
        """For the router and the metrics."""
        engine = self.model.engine
        return {
            "running": len(self.running),
            "waiting": len(self.waiting),
            "free_pages": engine.free_pages,
            "pages": engine.num_pages,
        }


def main(pipe: Connection, device: str, source: ModelSource, objective: Objective) -> None:
    """The process: it ends when the scheduler closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        replica = _Replica(source.load_language(device), objective)
        replica.warm()
    except ModelError as error:
        pipe.send(("failed", str(error)))
        return
    pipe.send(("ready", os.getpid()))
    pipe.send(("step", [], told := replica.state))
    with contextlib.suppress(EOFError, OSError):
        while True:
            idle = not replica.running and not replica.waiting
            while pipe.poll(None if idle else 0):
                replica.take(pipe.recv())
                idle = False  # what was taken is told before the next wait
            replica.admit()
            if replica.running:
                replica.step()
            if replica.events or replica.state != told:
                told = replica.state
                pipe.send(("step", replica.events, told))
                replica.events = []
