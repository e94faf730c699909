"""Processes on devices: the batches' own, and what the scheduler knows of any."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from trainkit.serving.engine._models import InputError, ModelError, ModelSource, Predict


def answers(predict: Predict, inputs: Sequence[Any]) -> list[tuple[bool, Any]]:
    """(True, output) or (False, (status, detail)) for each input; one bad input does not spoil its batch."""
    try:
        outputs = predict(inputs)
        if len(outputs) != len(inputs):
            raise ModelError(f"a model returns an output for each input, got {len(outputs)} for {len(inputs)}")
        return [(True, output) for output in outputs]
    except Exception as error:
        if len(inputs) > 1:
            return [answers(predict, [one])[0] for one in inputs]
        status = 400 if isinstance(error, InputError) else 500
        return [(False, (status, f"{type(error).__name__}: {error}"))]


def run_batches(pipe: Connection, device: str, models: Mapping[str, ModelSource]) -> None:
    """The process: all models on one device, one batch at a time, until the scheduler closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the scheduler ends us by closing the pipe
    try:
        loaded = {name: source.load(device) for name, source in models.items()}
    except ModelError as error:
        pipe.send(("failed", str(error)))
        return
    pipe.send(("ready", os.getpid()))
    with contextlib.suppress(EOFError, OSError):
        while True:
            model, inputs = pipe.recv()
            pipe.send(("done", answers(loaded[model], inputs)))


class GpuProcess:
    """A process on one device, as the scheduler sees it."""

    def __init__(self, device: str, main: Callable[..., None], *about: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.device = device
        self.pipe, child = context.Pipe()
        self.process = context.Process(target=main, args=(child, device, *about), daemon=True)
        self.process.start()
        child.close()
        self.ready = False

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until its models are loaded.

        Raises:
            ModelError: they do not load, or not in time.
        """
        if not self.pipe.poll(timeout_s):
            raise ModelError(f"the models did not load on {self.device} within {timeout_s:.0f} s")
        try:
            self.started(self.pipe.recv())
        except EOFError:
            raise ModelError(f"the process on {self.device} died while its models loaded") from None

    def started(self, message: tuple[str, Any]) -> None:
        """Take its first message.

        Raises:
            ModelError: the models do not load.
        """
        if message[0] == "failed":
            raise ModelError(str(message[1]))
        self.ready = True

    def send(self, message: tuple[Any, ...]) -> None:
        """Tell it something; a dead process is heard of by its pipe."""
        with contextlib.suppress(OSError):
            self.pipe.send(message)

    def close(self) -> None:
        """End it: at once if it is idle, else after its batch."""
        with contextlib.suppress(OSError):
            self.pipe.close()
