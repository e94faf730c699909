"""Messages between two ranks over gloo, each announced, so that nobody takes for his own what was not sent to him so.

Gloo compares neither dtypes nor numbers of elements: another dtype of as many bytes is taken as it comes, a shorter
message leaves the rest of the buffer as it was, a longer one aborts the receiver's process (PyTorch 2.13). So a small
message goes ahead of each, and what is announced is compared before anything is received.
"""

import struct
import threading
from collections import Counter
from concurrent.futures import Future
from typing import Any

import torch

from trainkit.collectives.execute._errors import ExecutionError, PeerLost
from trainkit.collectives.execute._runner import Runner
from trainkit.collectives.execute._work import ReceiveWork, SendWork

_ANNOUNCED = 1 << 30
"""Added to a message's tag: that of its announcement. Gloo's tags are below 2^31."""
_WORDS = struct.Struct("<24sQQ")  # dtype, number of elements, which message to this rank with this tag it is


class Messages:
    """Sends and receives of the backend for tensors in host memory.

    Args:
        runner: the backend's; a message that fails ends it.
        gloo: the backend that carries them.
    """

    def __init__(self, runner: Runner, gloo: Any) -> None:
        self._runner, self._gloo = runner, gloo
        self._sent: Counter[tuple[int, int]] = Counter()
        self._taken: Counter[tuple[int, int]] = Counter()
        self._turn = threading.Condition()

    def send(self, tensor: torch.Tensor, peer: int, tag: int) -> SendWork:
        """To one rank.

        Raises:
            ValueError: the tag is outside its range, or the tensor is not contiguous.
            ExecutionError: the other rank is gone.
        """
        _check(tensor, tag)
        words = torch.frombuffer(bytearray(_WORDS.pack(*_kind(tensor), self._sent[peer, tag])), dtype=torch.uint8)
        self._sent[peer, tag] += 1
        try:
            works = [self._gloo.send([words], peer, tag + _ANNOUNCED), self._gloo.send([tensor], peer, tag)]
        except RuntimeError as error:
            raise self._failed(error, peer) from error
        return SendWork(works, words, lambda error: self._failed(error, peer))

    def receive(self, tensor: torch.Tensor, peer: int | None, tag: int) -> ReceiveWork:
        """From one rank; None takes whichever sends first.

        Raises:
            ValueError: the tag is outside its range, or the tensor is not contiguous.
            ExecutionError: the other rank is gone.
        """
        _check(tensor, tag)
        words, at = torch.zeros(_WORDS.size, dtype=torch.uint8), tag + _ANNOUNCED
        try:
            told = self._gloo.recv_anysource([words], at) if peer is None else self._gloo.recv([words], peer, at)
        except RuntimeError as error:
            raise self._failed(error, peer) from error
        done: Future[None] = Future()
        work = ReceiveWork(done, [tensor], lambda: peer)

        def take() -> None:
            source = peer
            try:
                told.wait()
                sender: int = told._source_rank() if peer is None else peer
                source = work.source = sender
                dtype, count, number = _WORDS.unpack(bytes(words.tolist()))
                if (dtype, count) != _kind(tensor):
                    sent = f"{count} elements of {dtype.decode('ascii', 'replace').strip()}"
                    raise ExecutionError(
                        f"rank {sender} sent {sent}, rank {self._runner.placement.rank} receives {tensor.numel()} of "
                        f"{tensor.dtype}: both must be the same"
                    )
                with self._turn:  # in the order of the announcements
                    self._turn.wait_for(lambda: self._runner.failure or self._taken[sender, tag] == number)
                    if self._runner.failure is not None:  # of one before this, perhaps
                        raise self._runner.failure
                    data = self._gloo.recv([tensor], sender, tag)
                    self._taken[sender, tag] += 1
                    self._turn.notify_all()
                data.wait()
            except ExecutionError as error:
                self._give_up(done, self._runner.failed(error))
            except RuntimeError as error:
                self._give_up(done, self._failed(error, source))
            else:
                done.set_result(None)

        # one thread each: a send elsewhere may wait for this while the caller waits for something else
        threading.Thread(target=take, name="trainkit-receive", daemon=True).start()
        return work

    def _give_up(self, done: "Future[None]", error: ExecutionError) -> None:
        with self._turn:
            self._turn.notify_all()
        done.set_exception(error)

    def _failed(self, error: RuntimeError, peer: int | None) -> ExecutionError:
        lost = self._runner.lost()
        rank = peer if lost is None or peer is not None else lost.rank
        who = "another rank" if rank is None else f"rank {rank}"
        words = f"{who} is lost or late, as gloo says: {str(error).splitlines()[0][:300]}"
        return self._runner.failed(PeerLost(words, -1 if rank is None else rank))


def _kind(tensor: torch.Tensor) -> tuple[bytes, int]:
    return str(tensor.dtype).encode().ljust(24), tensor.numel()


def _check(tensor: torch.Tensor, tag: int) -> None:
    if not 0 <= tag < _ANNOUNCED:
        raise ValueError(f"a message's tag is from 0 to {_ANNOUNCED - 1}, got {tag}")
    if not tensor.is_contiguous():
        raise ValueError("a message needs a contiguous tensor: call contiguous() first")
