"""Who sends to whom, round by round, and what that costs before it is done."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

Pair = tuple[int, int]

PINGS = 20
"""Round trips of a pair."""
_ROUND_OVERHEAD_S = 0.5  # seen where 32 hosts shared a busy core
_PING_S = 0.05
_LEAST_LOAD_ROUNDS = 40
_MOST_REPEATS = 6


def tournament(hosts: int, rng: random.Random) -> list[list[Pair]]:
    """Rounds of disjoint pairs in which each pair meets once (round robin, circle method).

    Who is paired with whom at the same time depends on `rng`; with an odd number one host rests each round.
    """
    ring: list[int | None] = list(range(hosts))
    rng.shuffle(ring)
    if hosts % 2:
        ring.append(None)
    half = len(ring) // 2
    rounds = []
    for _ in range(len(ring) - 1):
        pairs = zip(ring[:half], reversed(ring[half:]), strict=True)
        rounds.append([(u, v) for u, v in pairs if u is not None and v is not None])
        ring[1:] = [ring[-1], *ring[1:-1]]
    return rounds


def both_ways(pairs: Sequence[Pair]) -> list[Pair]:
    """Each pair and its reverse."""
    return [flow for u, v in pairs for flow in ((u, v), (v, u))]


def outward(group: Sequence[int], others: Sequence[Sequence[int]], rng: random.Random) -> list[Pair]:
    """Flows that fill the uplink of `group`, out and in: each member with a host outside, dealt over the other groups."""
    decks = [rng.sample(list(other), len(other)) for other in others]
    rng.shuffle(decks)
    outside = [deck[turn] for turn in range(max(map(len, decks))) for deck in decks if turn < len(deck)]
    return both_ways([(member, outside[turn % len(outside)]) for turn, member in enumerate(group)])


def inward(groups: Sequence[Sequence[int]], rng: random.Random) -> list[Pair]:
    """One flow out of and into every host, none leaving its group: what no uplink can slow down."""
    flows: list[Pair] = []
    for group in groups:
        if len(group) > 1:
            ring = rng.sample(list(group), len(group))
            flows += zip(ring, [*ring[1:], ring[0]], strict=True)
    return flows


@dataclass(frozen=True)
class Plan:
    """What a probe will do; printed by `--dry-run`."""

    hosts: int
    """Number of hosts."""
    warm_s: float
    """Seconds of a load round before it is measured."""
    measure_s: float
    """Seconds that are measured."""

    @property
    def repeats(self) -> int:
        """Tournaments under load: each with another company for every pair."""
        rounds = max(1, self.hosts - 1 + self.hosts % 2)
        return max(2, min(_MOST_REPEATS, -(-_LEAST_LOAD_ROUNDS // rounds)))

    @property
    def ping_rounds(self) -> int:
        """Rounds of round trips."""
        return self.hosts - 1 + self.hosts % 2

    @property
    def load_rounds(self) -> int:
        """Rounds of the tournaments under load."""
        return self.repeats * self.ping_rounds

    @property
    def group_rounds(self) -> int:
        """Most rounds of tests of the groups that are found."""
        return 2 * (self.hosts // 2 + 2)

    @property
    def seconds(self) -> float:
        """Most time that it takes."""
        load = (self.load_rounds + self.group_rounds) * (self.warm_s + self.measure_s + _ROUND_OVERHEAD_S)
        return 1.0 + self.ping_rounds * (_PING_S + _ROUND_OVERHEAD_S) + load

    def bytes_per_host(self, bits_per_second: float) -> int:
        """Most bytes that a host with this rate sends, and as many that it receives."""
        busy = (self.load_rounds + self.group_rounds) * (self.warm_s + self.measure_s)
        return int(busy * bits_per_second / 8)

    def __str__(self) -> str:
        return (
            f"{self.ping_rounds} rounds of round trips, {self.load_rounds} of load ({self.repeats} tournaments), "
            f"at most {self.group_rounds} of the groups found; at most {self.seconds:.0f} s"
        )
