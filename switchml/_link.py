"""One worker's connection to its switch: a socket, a thread, the worker's state machine, and time limits."""

import contextlib
import logging
import os
import secrets
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainkit.switchml import _control as control
from trainkit.switchml._at_exit import close_at_exit
from trainkit.switchml._bounded import Bounded
from trainkit.switchml._errors import SessionLost, SwitchMLError, SwitchUnreachable, WorkerMissing
from trainkit.switchml._fixed_point import Floats
from trainkit.switchml._join import join
from trainkit.switchml._native import Port, Worker
from trainkit.switchml._options import Options
from trainkit.switchml._packet import FROM_SWITCH
from trainkit.switchml._place import Place
from trainkit.switchml._reach import reached
from trainkit.switchml._text import shown

_log = logging.getLogger(__name__)

_PING = 0.25
_GUESSES = 4096
"""Buckets of a step whose exponents are remembered."""
_NUMBERS = 2**32
"""Chunk numbers of an epoch."""
COUNTED = (
    "sent_bytes", "received_bytes", "sent_packets", "received_packets",
    "buckets", "chunks", "retransmissions", "stale", "foreign", "malformed",
)  # fmt: skip


class _Order(NamedTuple):
    values: Floats
    out: Floats
    residual: Floats | None
    bucket: int | None
    done: "Future[None]"


class Link:
    """Joins on construction; `submit` hands over a bucket and returns at once.

    Args:
        options: what the user asked for.
        place: this worker's.
        channel: which of the session's independent streams this is.

    Attributes:
        member: what the join agreed.
        ports: the switch's port for each channel.
        acknowledged: buckets that are known to be finished on all workers.
        error: why the session failed; None while it works.

    Raises:
        SwitchMLError: the session could not be joined; the subclass tells why.
    """

    def __init__(self, options: Options, place: Place, channel: int = 0) -> None:
        self.options, self.place, self.rank, self.channel = options, place, place.rank, channel
        self._token = options.token()
        self._key = control.control_key(self._token)
        self._socket, self._buffer = reached(options, self._key)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._past: Counter[str] = Counter()
        self._done = self._done_before = self._chunks = self.acknowledged = 0
        self._joined_packets = True
        # numbers of pings: none is ever used by another connection, so that no answer is another's
        self._first_ping = self._ping = secrets.randbits(62)
        # chunk numbers after the buckets that are not acknowledged
        self._ends: deque[int] = deque()
        try:
            self._join()
        except BaseException:
            self._socket.close()
            os.close(self._wake)
            raise
        self.error: SwitchMLError | None = None
        self._lock = threading.Lock()
        self._arrivals: deque[_Order] = deque()
        # the arrays are kept here while the native core reads and writes them
        self._waiting: deque[_Order] = deque()
        self._stopping = False
        self._status: control.Message = {}
        self._began = self._next_ping = 0.0
        self._answered, self._ponged = self._ping, time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"switchml-{self.rank}", daemon=True)
        self._thread.start()
        close_at_exit(self)

    def submit(
        self, values: Floats, out: Floats, residual: Floats | None = None, index: int | None = None
    ) -> "Future[None]":
        """Average `values` (fp32 `[N]`) over the workers into `out` (fp32 `[N]`, may be the same memory).

        Buckets are worked on in the order of submission, which must be the same on all ranks.

        Args:
            values: what is averaged.
            out: gets the average.
            residual: fp32 `[N]`, gets what rounding took from `values`.
            index: which bucket of a step this is, the same on all ranks: its exponents are guessed from the step before.
        """
        done: Future[None] = Future()
        with self._lock:
            if self.error is None and not self._stopping:
                self._arrivals.append(_Order(values, out, residual, index, done))
                os.eventfd_write(self._wake, 1)
                return done
        done.set_exception(self.error or SwitchMLError("the session was closed: make a new SwitchMLState"))
        return done

    def counters(self) -> dict[str, int]:
        """What has travelled and what became of it: the names of `COUNTED`."""
        return {"buckets": self._done, **(self._past + Counter(self._worker.counters))}

    def close(self) -> None:
        """Leave the session and end the thread; what was not finished fails."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._fail(SwitchMLError("the session was closed before the bucket was finished"))
        os.close(self._wake)
        self._socket.close()

    def _join(self) -> None:
        self.member, self.ports = join(self._socket, self._buffer, self.options, self.place, self._token, self.channel)
        # exponents agreed at the last time by index and length: equal on all ranks, which all begin the epoch without
        self._known: Bounded[tuple[int, int], NDArray[np.uint8]] = Bounded(_GUESSES)
        self._worker = Worker(self.member)
        self._port = Port(self._socket.fileno(), self._wake, self._worker)

    def _renew(self) -> None:
        """Meet anew before chunk numbers run out: a number of an epoch, and with it a tag's nonce, is never reused."""
        self._past += Counter(self._worker.counters)
        self._done_before = self.acknowledged = self._done
        self._ends.clear()
        self._join()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except SwitchMLError as error:
            self._fail(error)
            self._tell({"op": "abort", "why": f"rank {self.rank}: {error}", "ranks": list(getattr(error, "ranks", ()))})
        except Exception as error:  # a bug must not become a hang of the training
            self._fail(SwitchMLError(f"internal error of the session: {error!r}"))
            raise
        finally:
            self._tell({"op": "leave"})

    def _turn(self) -> None:
        now = time.monotonic()
        if now >= self._next_ping:
            self._next_ping = now + _PING
            self._ping += 1
            # as long as lets the answer, which has every rank's silence, be no more than three times it
            self._tell({"op": "ping", "n": self._ping}, 120 + 8 * self.member.world)
        heard = self._worker.drive(self._port, self._next_ping)
        now = time.monotonic()
        self._finish()
        while self._arrivals:
            arrival = self._arrivals[0]
            if arrival.bucket is not None and any(order.bucket == arrival.bucket for order in self._waiting):
                break  # its exponents are guessed from those that are still on their way
            # at most twice its chunks: all ranks come to this at the same bucket
            if self._worker.next_number + 2 * -(-arrival.values.size // self.member.elements) > _NUMBERS:
                if self._waiting:
                    break
                self._renew()
                now = time.monotonic()
            self._arrivals.popleft()
            if not self._waiting:
                self._began = now
            self._waiting.append(arrival)
            known = self._guess(arrival)
            self._worker.submit(arrival.values, arrival.out, now, arrival.residual, known, self._port)
            self._ends.append(self._worker.next_number)
        self._finish()
        for data, _ in heard:
            self._hear(data, now)
        if self._joined_packets and not self._worker.joins:
            self._joined_packets = False
            _log.warning(
                "the path to switch %s loses packets that segmentation offload joins: they are sent one by one from now on",
                self.options.switch,
            )
        chunks = self._worker.chunks
        if chunks != self._chunks:
            self._chunks, self._began = chunks, now
        elif self._waiting and now - self._began > self.options.timeout_s:
            raise self._stalled(now)

    def _guess(self, order: _Order) -> NDArray[np.uint8] | None:
        if order.bucket is None or self.options.wire != "int32":  # a narrow wire has no bit to spare for coarse units
            return None
        chunks = -(-order.values.size // self.member.elements)
        key = order.bucket, order.values.size
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = np.zeros(chunks, np.uint8)
        return known

    def _finish(self) -> None:
        """Hand over the buckets that are done."""
        finished = self._worker.finished
        # whoever has a result has had what all workers needed to send it
        proven = self._worker.low_water_mark - self.member.slots
        while self._ends and self._ends[0] <= proven:
            self._ends.popleft()
            self.acknowledged += 1
        while self._done - self._done_before < finished:
            self._done += 1
            self._waiting.popleft().done.set_result(None)

    def _hear(self, data: bytes, now: float) -> None:
        of, member = control.place(data), self.member
        if of == (member.session, member.epoch, FROM_SWITCH):
            self._hear_of_epoch(control.decode(data, member.control), now)
        elif of == control.SWITCH:
            message = control.decode(data, self._key) or {}
            # for this epoch, and in answer to a ping of this connection
            if message.get("op") == "lost" and message.get("epoch") == member.epoch and self._is_ours(message.get("n")):
                raise SessionLost(
                    f"switch {self.options.switch} no longer knows this epoch of session {self.options.session!r}: it was "
                    "restarted, or the session was joined anew by other processes"
                )

    def _hear_of_epoch(self, message: control.Message | None, now: float) -> None:
        if message is None:
            return
        op = message["op"]
        if op == "pong" and self._is_ours(message.get("n")) and message["n"] > self._answered:
            self._status, self._ponged, self._answered = message, now, message["n"]
            if message.get("mismatched"):
                raise SwitchMLError(
                    f"the bucket of rank {', '.join(map(str, message['mismatched']))} is not that of the other ranks: all "
                    "must average buckets of the same sizes in the same order"
                )
            self._see_who_left(message)
        elif op == "moved" and self._is_ours(message.get("n")):
            _log.warning(
                "switch %s hears rank %d from another address: a NAT forgot it", self.options.switch, self.rank
            )
            self._tell({"op": "move", "cookie": message.get("cookie")})
        elif op in ("aborted", "refused"):
            ranks = message.get("ranks")
            named = tuple(rank for rank in ranks if type(rank) is int) if isinstance(ranks, list) else ()
            raise WorkerMissing(shown(message.get("why"), 500), named)

    def _see_who_left(self, status: control.Message) -> None:
        """A rank that has closed its state will never send what the others wait for: no need to wait out the time limit."""
        missing = status.get("missing", [])
        gone = tuple(rank for rank in status.get("left", []) if rank in missing and rank != self.rank)
        if gone and self._waiting:
            ranks = f"rank{'s' if len(gone) > 1 else ''} {', '.join(map(str, gone))}"
            raise WorkerMissing(
                f"{ranks} left the session without sending this bucket: do all make the same steps?", gone
            )

    def _is_ours(self, number: object) -> bool:
        return type(number) is int and self._first_ping < number <= self._ping

    def _stalled(self, now: float) -> SwitchMLError:
        limit = f"{self.options.timeout_s:g} s"
        if now - self._ponged > max(4 * _PING, self.options.timeout_s / 2):
            return SwitchUnreachable(
                f"switch {self.options.switch} has not answered for {now - self._ponged:.1f} s (limit {limit}): "
                "is it still running, is the network up?"
            )
        missing = [rank for rank in self._status.get("missing", []) if rank != self.rank]
        silent = self._status.get("silent", [])
        if missing:
            states = ", ".join(f"rank {r} (last heard {silent[r]:.1f} s ago)" for r in missing if r < len(silent))
            return WorkerMissing(
                f"no progress for {limit}: {states} did not send this bucket; dead, paused or in another "
                "step? A longer timeout_s waits longer",
                tuple(missing),
            )
        return SwitchMLError(
            f"no progress for {limit} though switch {self.options.switch} answers: do packets of "
            f"{self.member.elements} elements pass the path? Try elements=64"
        )

    def _tell(self, message: control.Message, size: int = 0) -> None:
        member = self.member
        of = control.Place(member.session, member.epoch, self.rank)
        with contextlib.suppress(OSError):
            self._socket.send(control.encode(message, member.control, size, of))

    def _fail(self, error: SwitchMLError) -> None:
        with self._lock:
            self.error = self.error or error
            pending = [*self._waiting, *self._arrivals]
            self._waiting.clear()
            self._arrivals.clear()
        for order in pending:
            order.done.set_exception(error)
