"""A collective's `Work`: a failure is raised wherever PyTorch or its user waits.

An exception that is set on a `torch.futures.Future` is an ordinary value to C++: `Work.wait()` made of such a future
returns as if all were well (PyTorch 2.13). Only one that a `then` callback raises is an error there.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trainkit.collectives.execute._errors import CollectiveTimeout

Tensors = list[torch.Tensor]
TensorsFuture = torch.futures.Future[Tensors]


def torch_future(
    done: "Future[Any]", value: Callable[[], Any], device: torch.device, behind: AbstractContextManager[object]
) -> Any:
    """A PyTorch future that ends as `done` does, with what fails it as an error in C++, too.

    Args:
        done: what ends it.
        value: what it holds then.
        device: of the tensors in the value.
        behind: a context in which work on a GPU is queued behind the collective.
    """
    future = torch.futures.Future[Any](devices=[device] if device.type == "cuda" else None)

    def end(done: "Future[Any]") -> None:
        error = done.exception()
        if error is None:
            future.set_result(value())
        else:
            future.set_exception(error)  # type: ignore[arg-type]

    with behind:
        done.add_done_callback(end)
    # through then(), the error is one in C++, with its own words
    return future.then(lambda ended: ended.value())


class CollectiveWork(dist.Work):
    """What a collective of the backend returns.

    Args:
        done: ends when the collective is complete here, or with its error.
        tensors: what it leaves its result in.
        awaited: a rank that it waits for, where that is known.
        behind: a context in which work on a GPU is queued behind the collective.
    """

    def __init__(
        self,
        done: "Future[None]",
        tensors: Sequence[torch.Tensor],
        awaited: Callable[[], int | None],
        behind: AbstractContextManager[object] | None = None,
    ) -> None:
        super().__init__()
        self._done, self._tensors, self._awaited = done, list(tensors), awaited
        device = self._tensors[0].device if self._tensors else torch.device("cpu")
        self._cuda = device.type == "cuda"
        self._future: TensorsFuture = torch_future(done, lambda: self._tensors, device, behind or nullcontext())

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Return when the collective is complete; on a GPU, what the current stream does next comes after it.

        Args:
            timeout: the longest wait; none as long as the group's own.

        Raises:
            CollectiveTimeout: it is not complete by then; it goes on.
            ExecutionError: it failed: why, and the rank.
        """
        seconds = timeout.total_seconds()
        try:
            self._done.result(seconds if seconds > 0 else None)
        except TimeoutError:
            if self._done.done():
                raise
            rank = self._awaited()
            who = "" if rank is None else f": waiting for rank {rank}"
            raise CollectiveTimeout(f"the collective is not complete after {seconds:g} s{who}", rank) from None
        if self._cuda:
            self._future.wait()
        return True

    def is_completed(self) -> bool:
        """Whether it has ended; one that failed raises.

        Raises:
            ExecutionError: it failed.
        """
        if self._done.done():
            self._done.result()
        return self._done.done()

    def is_success(self) -> bool:
        """Whether it has ended well."""
        return self._done.done() and self._done.exception() is None

    def exception(self) -> BaseException | None:  # type: ignore[override]
        """What it failed with."""
        return self._done.exception() if self._done.done() else None

    def result(self) -> Tensors:
        """What it leaves its result in; waits.

        Raises:
            ExecutionError: it failed.
        """
        self.wait()
        return self._tensors

    def synchronize(self) -> None:
        """The same as `wait()`."""
        self.wait()

    def get_future(self) -> TensorsFuture:  # type: ignore[override]
        """A future of the tensors; it and what is chained to it raise what the collective failed with."""
        return self._future


class ReceiveWork(CollectiveWork):
    """What a receive returns."""

    source: int | None = None
    """Who sent, once it is known."""

    def source_rank(self) -> int:
        """Who sent; after `wait()`."""
        return -1 if self.source is None else self.source

    def _source_rank(self) -> int:
        return self.source_rank()


class SendWork(dist.Work):
    """What a send returns; it names its peer when it fails.

    Args:
        works: gloo's own.
        kept: what must live as long as they do.
        failed: makes the error of gloo's.
    """

    def __init__(self, works: Sequence[Any], kept: object, failed: Callable[[RuntimeError], Exception]) -> None:
        super().__init__()
        self._works, self._kept, self._failed = works, kept, failed

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Return when the tensor may be written to again.

        Raises:
            ExecutionError: the other rank is lost or late.
        """
        try:
            for work in self._works:
                work.wait(timeout) if timeout.total_seconds() > 0 else work.wait()
        except RuntimeError as error:
            raise self._failed(error) from error
        return True

    def is_completed(self) -> bool:
        """Whether it has ended."""
        return all(work.is_completed() for work in self._works)
