"""Finite groups as multiplication tables, and their Cayley digraphs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import gcd

import numpy as np
from numpy.typing import NDArray

from trainkit.collectives.direct._digraph import Digraph


@dataclass(frozen=True)
class Metacyclic:
    """Z_m extended by Z_k: pairs (a, b) with (a, b)(c, e) = (a + r^b c + s [b + e >= k], b + e).

    With s = 0 the semidirect product of Z_m and Z_k, with r = 1 besides the direct product; `Metacyclic(4, 2, 3, 2)`
    is the quaternion group. Element (a, b) is number a * k + b.
    """

    m: int
    """Order of the normal cyclic subgroup."""
    k: int
    """Order of the quotient."""
    r: int = 1
    """How the quotient's generator acts on Z_m: by multiplication."""
    s: int = 0
    """The k-th power of the quotient's generator, an element of Z_m."""

    def __post_init__(self) -> None:
        """Refuse what is not a group."""
        m, k, r, s = self.m, self.k, self.r, self.s
        if m < 1 or k < 1 or pow(r, k, m) != 1 % m or s * (r - 1) % m != 0:
            raise ValueError(f"{self} is no group: it takes m, k >= 1, r^k = 1 and s (r - 1) = 0 modulo m")

    def __str__(self) -> str:
        """As `topology show` reads it."""
        return f"metacyclic({', '.join(map(str, (self.m, self.k, self.r, self.s)[: 4 if self.s else 3]))})"

    @property
    def order(self) -> int:
        """Number of elements."""
        return self.m * self.k

    def translation(self, element: int) -> NDArray[np.int64]:
        """[order]: x -> x * element."""
        a, b = np.divmod(np.arange(self.order), self.k)
        c, e = divmod(element, self.k)
        power = np.array([pow(self.r, at, self.m) for at in range(self.k)], dtype=np.int64)
        moved = a + power[b] * c + self.s * (b + e >= self.k)
        return np.asarray(moved % self.m * self.k + (b + e) % self.k)


@lru_cache(maxsize=4)
def table(group: Metacyclic) -> NDArray[np.uint16]:
    """[order, order]: row g is x -> x * g. 2 MB at 1024 elements, 32 MB at 4096."""
    m, k = group.m, group.k
    a, b = np.divmod(np.arange(group.order, dtype=np.int32), np.int32(k))
    power = np.array([pow(group.r, at, m) for at in range(k)], dtype=np.int32)
    second = b[None, :] + b[:, None]
    moved = (a[None, :] + power[b][None, :] * a[:, None] + group.s * (second >= k)) % m
    return np.ascontiguousarray(moved * k + second % k, dtype=np.uint16)


def cayley(group: Metacyclic, *generators: int) -> Digraph:
    """The Cayley digraph: a link x -> x * g for every element x and every generator g (a repeated one is repeated).

    Raises:
        ValueError: a generator is not an element of the group.
    """
    wrong = [g for g in generators if not 0 <= g < group.order]
    if wrong or not generators:
        raise ValueError(f"generators are elements 0 .. {group.order - 1} of {group}, got {generators}")
    heads = np.stack([group.translation(g) for g in generators], axis=1)
    return Digraph.of_arrays(group.order, np.repeat(np.arange(group.order), len(generators)), heads.reshape(-1))


@cache
def multiplicative_order(r: int, m: int) -> int:
    """The least j > 0 with r^j = 1 modulo m."""
    power, order = r % m, 1
    while power != 1 % m:
        power, order = power * r % m, order + 1
    return order


@cache
def groups(order: int) -> Sequence[Sequence[Metacyclic]]:
    """The metacyclic groups of an order, by their normal subgroup; not up to isomorphism."""
    found = [list(_with(m, order // m)) for m in range(1, order + 1) if order % m == 0]
    return [family for family in found if family]


def _with(m: int, k: int) -> Iterator[Metacyclic]:
    for r in range(1, m + 1):
        if gcd(r, m) == 1 and pow(r, k, m) == 1 % m:
            # powers of the quotient's generator up to the choice of that generator: the divisors are enough
            tails = [s for s in range(m) if s * (r - 1) % m == 0 and (s == 0 or m % s == 0)]
            yield from (Metacyclic(m, k, r, s) for s in tails)
