"""A network that exists only as numbers: what flows get on it, with noise, for tests of what the probe infers."""

import random
from collections.abc import Sequence

import numpy as np

from trainkit.collectives._probe._infer import Declared, Tree, infer
from trainkit.collectives._probe._leader import _tests
from trainkit.collectives._probe._rounds import Plan, both_ways, tournament
from trainkit.collectives._probe._tree import Flows, crossings, shares


class Network:
    """Hosts in nested groups; `run` says what each of some flows gets."""

    def __init__(
        self, host: Sequence[float], groups: Sequence[Sequence[int]], uplink: Sequence[float], noise: float, seed: int
    ) -> None:
        """Rates of hosts and of the groups' uplinks in Mbit/s; 3 % of the flows also suffer a dip."""
        everyone = np.arange(len(host))
        self.hosts = len(host)
        rows = [np.isin(everyone, group) for group in groups]
        self._sets = np.vstack([np.eye(len(host), dtype=bool), *rows])
        self._capacity = 1e6 * np.tile([*host, *uplink], 2).astype(float)
        self._noise, self._random = noise, np.random.default_rng(seed)

    def run(self, pairs: Sequence[tuple[int, int]]) -> Flows:
        """The flows with noisy shares that fit into every link."""
        flows = Flows.of([(u, v, 0.0) for u, v in pairs])
        crossing = crossings(self._sets, flows)
        rate = shares(crossing, self._capacity) * np.exp(self._random.normal(0, self._noise, len(pairs)))
        dips = self._random.random(len(pairs)) < 0.03
        rate = np.where(dips, rate * self._random.uniform(0.3, 1, len(pairs)), rate)
        over = np.max(np.where(crossing, (crossing @ rate / self._capacity)[:, None], 0), axis=0)
        rate = rate / np.maximum(over, 1)
        return Flows.of([(u, v, one) for (u, v), one in zip(pairs, rate, strict=True)])

    def probed(self, declared: Sequence[Declared] = ()) -> Tree:
        """What the probe makes of it, by the rounds that it would run."""
        rng = random.Random(0)
        waves = [
            both_ways(pairs) for _ in range(Plan(self.hosts, 1, 1).repeats) for pairs in tournament(self.hosts, rng)
        ]
        measured = [self.run(wave) for wave in waves]
        tree = infer(measured, self.hosts, declared)
        for _ in range(2):
            measured += [self.run(wave) for wave in _tests(tree, rng)]
            tree = infer(measured, self.hosts, declared)
        return tree


def found(tree: Tree) -> list[list[int]]:
    """The groups, in an order that can be compared."""
    return sorted(sorted(group) for group in tree.groups)
