"""The worker as a pure state machine: packets and time in, packets out.

The stream of an epoch is one sequence of chunk numbers. A bucket of C chunks takes `lead + C` of them, lead =
min(slots, C): number j of the bucket carries the exponent byte of chunk j (j < C) and the data of chunk j - lead
(j >= lead). So the result of number j tells the scale for number j + lead: exponents travel one window ahead of
their data, and where a bucket follows another without a pause its exponents fill the slots that the other leaves.

Where the bucket comes with a guess of its agreed exponents (those of the step before), the first `lead` numbers carry
data too, in the guessed units. If the unit of the agreed exponent is the guessed one, that sum is the sum, the chunk
needs no second round, and number j + lead carries nothing; else it is sent again. The bits are the same either way.

A number is sent when its slot is free (the result of `number - slots` is in) and its exponent is known. The result
is the acknowledgement and the clock, so that at most `slots` chunks are ever unacknowledged (SwitchML, NSDI 2021,
algorithms 2 and 4). Differing from the paper, every packet carries its chunk number and its epoch, and a retransmission
carries no payload unless the switch has said that it is missing.
"""

from collections import Counter, deque

import numpy as np
from numpy.typing import NDArray

from trainkit.switchml import _packet as packet
from trainkit.switchml._fixed_point import (
    SENT_TYPE,
    SUM_TYPE,
    Floats,
    block_exponents,
    dequantise,
    quantise,
    restore,
    unit_exponent,
)
from trainkit.switchml._membership import Membership
from trainkit.switchml._packet import Header, Kind
from trainkit.switchml._tag import open_tagged, tagged
from trainkit.switchml.reference._round_trip import RoundTrip

Bytes = NDArray[np.uint8]

_PASSED = 3
"""Results of later packets after which a missing result is asked for."""


class _Bucket:
    def __init__(
        self,
        base: int,
        slots: int,
        elements: int,
        values: Floats,
        out: Floats,
        residual: Floats | None,
        known: Bytes | None,
        lane: int,
    ) -> None:
        self.lane = lane
        self.base, self.elements, self.values, self.out, self.residual = base, elements, values, out, residual
        self.exponents = block_exponents(values, elements)
        self.chunks = len(self.exponents)
        self.agreed = np.zeros_like(self.exponents) if known is None else known
        self.guess = self.agreed.copy()
        self.solved = np.zeros(self.chunks, bool)
        self.lead = min(slots, self.chunks)
        self.end = base + self.lead + self.chunks
        self.left = self.lead + self.chunks
        self.unsolved = self.chunks

    def span(self, chunk: int) -> slice:
        return slice(chunk * self.elements, (chunk + 1) * self.elements)

    def carried(self, place: int) -> tuple[int, int] | None:
        """Which chunk's data number `base + place` carries and the exponent byte of their unit; None: no data."""
        if place >= self.lead:
            chunk = place - self.lead
            return None if self.solved[chunk] else (chunk, int(self.agreed[chunk]))
        return (place, int(self.guess[place])) if 0 < self.guess[place] < packet.NON_FINITE else None


class _Flight:
    """A chunk number on its way.

    Attributes:
        sent, due: when it was last sent or asked for, when it will be; seconds.
        data_sent: when its data were last sent; `asked` since then.
        tries: times sent or asked for, of which `data_tries` with data.
        passed: by so many results of what was sent later.
    """

    def __init__(self, number: int, sent: float, due: float) -> None:
        self.number, self.sent, self.data_sent, self.due = number, sent, sent, due
        self.tries = self.data_tries = 1
        self.passed = 0
        self.asked = False


class Worker:
    """One worker's half of the protocol.

    Args:
        member: what the join agreed.

    Attributes:
        finished: buckets done so far.
        counters: packets by what became of them.
    """

    def __init__(self, member: Membership) -> None:
        self.member = member
        self.counters: Counter[str] = Counter()
        self.finished = 0
        self._profile = packet.PROFILES[member.profile]
        self._buckets: deque[_Bucket] = deque()
        self._counted = 0
        self._end = self._taken = 0
        self._next = list(range(member.slots))
        # in the order of sending: the head is the oldest
        self._flights: dict[int, _Flight] = {}
        self._round_trip = RoundTrip()

    def submit(
        self, values: Floats, out: Floats, now: float, residual: Floats | None = None, known: Bytes | None = None
    ) -> list[bytes]:
        """Take a bucket into the stream.

        Args:
            values: gradients, fp32 `[N]`, unchanged until the bucket is finished unless `out` is the same memory.
            out: fp32 `[N]`, gets the average.
            now: seconds.
            residual: fp32 `[N]`, gets what rounding took from `values` (0 in chunks that are not finite).
            known: uint8 `[chunks]`, a guess of the agreed exponent bytes, the same on all workers; 0 where there is
                none. Gets what was agreed.

        Returns:
            Packets to send.
        """
        lane = self.member.channel
        if self.member.profile == "full":
            lane |= self._taken % 4 << packet.BUCKET_SHIFT
        self._taken += 1
        bucket = _Bucket(self._end, self.member.slots, self.member.elements, values, out, residual, known, lane)
        self._end = bucket.end
        self._buckets.append(bucket)
        self._retire()
        first = range(bucket.base, min(bucket.end, bucket.base + self.member.slots))
        return [sent for number in first for sent in self._try(number, now)]

    def receive(self, data: bytes, now: float) -> list[bytes]:
        """Take a packet in; the packets to send. Whatever does not belong here changes only a counter."""
        opened = open_tagged(data, self.member.key)
        parsed = packet.decode(opened) if opened is not None else None
        if parsed is None:
            self.counters["malformed"] += 1
            return []
        header, payload = parsed
        mine = (self.member.session, self.member.epoch, self.member.channel, packet.FROM_SWITCH)
        if (header.session, header.epoch, header.lane & packet.CHANNEL_MASK, header.worker) != mine:
            self.counters["foreign"] += 1
            return []
        if header.slot != packet.slot_field(header.chunk, self.member.slots):
            self.counters["malformed"] += 1
            return []
        if header.kind == Kind.RESULT:
            return self._result(header, payload, now)
        if header.kind == Kind.PROGRESS:
            return self._progress(header, int.from_bytes(payload, "big"), now)
        self.counters["foreign"] += 1
        return []

    def poll(self, now: float) -> list[bytes]:
        """Send again what is overdue; the packets to send."""
        late = [flight for flight in self._flights.values() if flight.due <= now]
        return [self._repeat(flight, now) for flight in late]

    def due(self) -> float | None:
        """When `poll` has something to do; None with nothing on its way."""
        return min((flight.due for flight in self._flights.values()), default=None)

    @property
    def in_flight(self) -> int:
        """Chunks sent and not acknowledged."""
        return len(self._flights)

    @property
    def next_number(self) -> int:
        """First chunk number after all buckets taken so far."""
        return self._end

    @property
    def low_water_mark(self) -> int:
        """Lowest chunk number without a result: every worker has all results up to `slots` before it."""
        return min(self._next)

    def _bucket(self, number: int) -> _Bucket | None:
        return next((bucket for bucket in self._buckets if bucket.base <= number < bucket.end), None)

    def _done(self, number: int) -> bool:
        return self._next[number % self.member.slots] > number

    def _try(self, number: int, now: float) -> list[bytes]:
        """Send `number` if it is its turn: its slot free, its exponent known, its bucket here."""
        bucket = self._bucket(number)
        if bucket is None or number in self._flights or self._next[number % self.member.slots] != number:
            return []
        if number - bucket.base >= bucket.lead and not self._done(number - bucket.lead):
            return []
        self._flights[number] = _Flight(number, now, now + self._round_trip.timeout(1))
        return [self._data(bucket, number)]

    def _data(self, bucket: _Bucket, number: int) -> bytes:
        member, place = self.member, number - bucket.base
        exponent = int(bucket.exponents[place]) if place < bucket.chunks else 0
        carried = bucket.carried(place)
        if carried is None:
            return self._packet(Kind.DATA, number, exponent)
        chunk, unit = carried
        span = bucket.span(chunk)
        world, wire, largest = member.world, member.wire, int(bucket.exponents[chunk])
        # beyond the guess the sum will not be used, whatever is sent
        fits = self._same_unit(unit, max(unit, largest))
        values = bucket.values[span] if fits else np.zeros_like(bucket.values[span])
        integers = quantise(values, unit, world, wire)
        if bucket.residual is not None:
            own = restore(integers, unit, world, wire)
            bucket.residual[span] = 0 if unit == packet.NON_FINITE else bucket.values[span] - own
        if member.profile == "core" and integers.size < member.elements:  # hardware knows one size
            integers = np.pad(integers, (0, member.elements - integers.size))
        return self._packet(
            Kind.DATA, number, exponent, integers.size, integers.astype(SENT_TYPE[member.wire]).tobytes()
        )

    def _packet(self, kind: Kind, number: int, exponent: int = 0, elements: int = 0, payload: bytes = b"") -> bytes:
        member = self.member
        slot = packet.slot_field(number, member.slots)
        wire = packet.UP_BYTES[member.wire]
        bucket = self._bucket(number)
        assert bucket is not None
        fields = Header(
            packet.MAGIC, kind, member.session, member.epoch, number, slot, member.worker,
            exponent, elements, wire, bucket.lane,
        )  # fmt: skip
        self.counters["sent_packets"] += 1
        return tagged(packet.encode(fields, payload), member.key)

    def _result(self, header: Header, payload: memoryview, now: float) -> list[bytes]:
        number = header.chunk
        flight, bucket = self._flights.get(number), self._bucket(number)
        if flight is None or bucket is None:
            self.counters["stale"] += 1
            return []
        place, member = number - bucket.base, self.member
        carried = bucket.carried(place)
        out = bucket.out[bucket.span(carried[0])] if carried else bucket.out[:0]
        expected = member.elements if carried and member.profile == "core" else out.size
        smaller = place < bucket.chunks and header.exponent < bucket.exponents[place]
        if (
            header.elements != expected
            or header.wire != packet.DOWN_BYTES[member.wire]
            or smaller
            or header.lane != bucket.lane
        ):
            self.counters["malformed"] += 1
            return []
        del self._flights[number]
        self._next[number % member.slots] = number + member.slots
        if place < bucket.chunks:
            bucket.agreed[place] = header.exponent
        if carried and self._same_unit(carried[1], int(bucket.agreed[carried[0]])):
            sums = np.frombuffer(payload, SUM_TYPE[member.wire])[: out.size].astype(np.int32)
            out[:] = dequantise(sums, carried[1], member.world, member.wire)
            bucket.solved[carried[0]] = True
            bucket.unsolved -= 1
        # the first round waits for the slowest worker's computation: only later data tells the network's time
        if carried and place >= bucket.lead and flight.data_tries == 1:
            self._round_trip.sample(now - flight.data_sent, asked=flight.tries > 1)
        self.counters["chunks"] += 1
        bucket.left -= 1
        self._retire()
        packets = self._try(number + member.slots, now)
        if bucket.lead != member.slots:
            packets += self._try(number + bucket.lead, now)
        return packets + self._early(flight.sent, now)

    def _same_unit(self, guess: int, agreed: int) -> bool:
        if packet.NON_FINITE in (guess, agreed):
            return guess == agreed
        world, wire = self.member.world, self.member.wire
        return unit_exponent(guess, world, wire) == unit_exponent(agreed, world, wire)

    def _retire(self) -> None:
        """Count the buckets that have all their sums, in order; forget those of which no number is on its way."""
        while self._counted < len(self._buckets) and self._buckets[self._counted].unsolved == 0:
            self._counted += 1
            self.finished += 1
        while self._buckets and self._buckets[0].left == 0:
            self._buckets.popleft()
            self._counted -= 1

    def _early(self, sent: float, now: float) -> list[bytes]:
        """Ask for results that several packets sent later have overtaken: their loss is all but sure."""
        if not self._profile.queries:
            return []
        lost = []
        for flight in self._flights.values():
            if flight.sent >= sent:
                break
            flight.passed += 1
            if flight.passed >= _PASSED and now - flight.sent >= self._round_trip.smoothed:
                lost.append(flight)
        return [self._repeat(flight, now) for flight in lost]

    def _progress(self, header: Header, seen: int, now: float) -> list[bytes]:
        """The others wait for this worker: send what was lost, or ask for the result that was.

        An answer to this worker's own question, which went the way of the data, proves their loss; a hint set off by
        another worker may have crossed them.
        """
        number = header.chunk
        if seen >> self.member.worker & 1:
            self.counters["stale"] += 1
            return []
        flight = self._flights.get(number)
        if flight is not None:
            if (flight.asked and header.exponent) or now - flight.data_sent >= self._round_trip.smoothed:
                return [self._repeat(flight, now, payload=True)]
            return []
        behind = self._flights.get(number - self.member.slots)
        if behind is not None and now - behind.sent >= self._round_trip.smoothed / 2:
            return [self._repeat(behind, now)]
        self.counters["stale"] += 1
        return []

    def _repeat(self, flight: _Flight, now: float, payload: bool = False) -> bytes:
        flight.tries += 1
        flight.sent, flight.passed = now, 0
        flight.due = now + self._round_trip.timeout(flight.tries)
        self._flights[flight.number] = self._flights.pop(flight.number)
        self.counters["retransmissions"] += 1
        bucket = self._bucket(flight.number)
        assert bucket is not None
        flight.asked = self._profile.queries and not payload
        if flight.asked:
            return self._packet(Kind.QUERY, flight.number)
        flight.data_sent, flight.data_tries = now, flight.data_tries + 1
        return self._data(bucket, flight.number)
