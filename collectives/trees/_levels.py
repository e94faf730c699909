"""The order of compute nodes in which symmetries are looked for.

Rotations of equal blocks are found where nodes are numbered level by level. Where a file numbers them otherwise, the
blocks are what the fastest links join, and every block is put in the order of the first one's nearest neighbours.
"""

from collections import deque

import numpy as np

import trainkit.collectives._native as _native
from trainkit.collectives._topology import Ints
from trainkit.collectives.trees._problem import Problem


def levelled(problem: Problem) -> Ints:
    """The compute nodes in the network's own order if that shows its symmetry, else block by block."""
    given = problem.topology.compute
    if len(rotations(problem, given)) == len(given):
        return given
    return _by_blocks(problem, given)


def rotations(problem: Problem, order: Ints) -> Ints:
    """[elements, vertices] a group of symmetries that holds no compute node still."""
    found = _native.free_rotations(*problem.graph, problem.colour, order, problem.progress)
    return np.array(found, dtype=np.int64)


def _by_blocks(problem: Problem, given: Ints) -> Ints:
    size, tail, head, cap = problem.graph
    compute = set(given.tolist())
    edges = list(zip(tail.tolist(), head.tolist(), cap.tolist(), strict=True))
    fastest = max((c for u, v, c in edges if u in compute or v in compute), default=0)
    fast = _neighbours(size, [(u, v) for u, v, c in edges if c == fastest])
    slow = _neighbours(size, [(u, v) for u, v, c in edges if c < fastest])
    block_of: dict[int, int] = {}
    blocks: list[list[int]] = []
    for v in given.tolist():
        if v not in block_of:
            blocks.append([w for w in _hops(fast, v) if w in compute])
            block_of.update(dict.fromkeys(blocks[-1], len(blocks) - 1))
    if not 1 < len(blocks) < len(given):
        return given
    place = {v: at for at, v in enumerate(given.tolist())}
    leader = int(given[0])
    near = _hops(slow, leader)
    first = sorted(blocks[block_of[leader]], key=lambda v: (v != leader, near.get(v, size), place[v]))
    hops = [_hops(slow, v) for v in first]

    def nearness(v: int) -> tuple[int, ...]:
        return (*(near_first.get(v, size) for near_first in hops), place[v])

    rest = [sorted(block, key=nearness) for block in blocks if leader not in block]
    rest.sort(key=lambda block: nearness(block[0]))
    return np.array([v for block in (first, *rest) for v in block], dtype=np.int64)


def _neighbours(size: int, edges: list[tuple[int, int]]) -> list[list[int]]:
    near: list[list[int]] = [[] for _ in range(size)]
    for u, v in edges:
        near[u].append(v)
    return near


def _hops(near: list[list[int]], start: int) -> dict[int, int]:
    """Vertex -> links from `start`, for all that it reaches."""
    seen, queue = {start: 0}, deque([start])
    while queue:
        v = queue.popleft()
        for other in near[v]:
            if other not in seen:
                seen[other] = seen[v] + 1
                queue.append(other)
    return seen
