"""Packing prompts with their samples into trees, and reading the trees that others pack."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TypedDict

import torch
from torch import Tensor

from trainkit.kernels._cache import Cache, contents

IGNORED = -100
"""The label of a token that nothing is asked of, as PyTorch's cross-entropy has it."""


class Packed(TypedDict):
    """A row of T tokens in trees, with what a model and a loss need of it."""

    input_ids: Tensor
    """int64 `[1, T]`."""
    position_ids: Tensor
    """int64 `[1, T]`: each token's place in its own sequence."""
    labels: Tensor
    """int64 `[1, T]`: the next token, not shifted again; -100 where none is trained."""
    samples: Tensor
    """int64 `[1, T]`: which sample, counted over all prompts, a label is of; -1 without a label."""
    tree_parents: Tensor
    """int32 `[nodes]`: see `tree_attention`."""
    tree_indptr: Tensor
    """int32 `[nodes + 1]`."""


def pack_samples(groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> Packed:
    """Lay out prompts with their samples so that each prompt is computed once.

    The prompt's last token goes with each sample: what it predicts is another token in each.

    Args:
        groups: (prompt, its samples), tokens.

    Raises:
        ValueError: a prompt without tokens or without samples, or an empty sample.

    Example:
        >>> batch = pack_samples([([5, 6, 7], [[8, 9], [10]])])
        >>> batch["input_ids"]
        tensor([[ 5,  6,  7,  8,  9,  7, 10]])
    """
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    samples: list[int] = []
    parents: list[int] = []
    indptr = [0]
    number = 0
    for prompt, answers in groups:
        if not prompt or not answers or not all(answers):
            raise ValueError(
                f"a group must have a prompt and samples, none of them empty, got {len(prompt)} tokens and samples of"
                f" {[len(a) for a in answers]}"
            )
        root = len(parents)
        parents.append(-1)
        ids += prompt[:-1]
        positions += range(len(prompt) - 1)
        labels += [IGNORED] * (len(prompt) - 1)
        samples += [-1] * (len(prompt) - 1)
        indptr.append(len(ids))
        for answer in answers:
            parents.append(root)
            ids += [prompt[-1], *answer]
            positions += range(len(prompt) - 1, len(prompt) + len(answer))
            labels += [*answer, IGNORED]
            samples += [number] * len(answer) + [-1]
            indptr.append(len(ids))
            number += 1
    row = (torch.tensor([x]) for x in (ids, positions, labels, samples))
    input_ids, position_ids, said, of = row
    return Packed(
        input_ids=input_ids, position_ids=position_ids, labels=said, samples=of,
        tree_parents=torch.tensor(parents, dtype=torch.int32), tree_indptr=torch.tensor(indptr, dtype=torch.int32),
    )  # fmt: skip


_READ: Cache[tuple[Tensor, Tensor]] = Cache(64)


def tree_of_paths(kv_index: Tensor, cu_q: Tensor, cu_k: Tensor) -> tuple[Tensor, Tensor]:
    """The tree behind TRL's index: each segment's keys are listed from its root on (`TreeRow.pack`, TRL 1.16).

    Device tensors are read once a tensor, which waits.

    Args:
        kv_index: `[K]` rows of all segments' keys, end to end.
        cu_q: int32 `[segments + 1]`, bounds of segments among the tokens.
        cu_k: int32 `[segments + 1]`, bounds of their keys in `kv_index`.

    Returns:
        parents and node_indptr, as `tree_attention` takes them.

    Raises:
        ValueError: an index that is no tree's.
    """
    given = (kv_index, cu_q, cu_k)
    keys = [contents(x) for x in given]
    return _READ.get(None if None in keys else tuple(keys), lambda: _read(*(x.tolist() for x in given)), given)


def _read(kv_index: list[int], cu_q: list[int], cu_k: list[int]) -> tuple[Tensor, Tensor]:
    last = {b - 1: i for i, (a, b) in enumerate(pairwise(cu_q)) if b > a}
    parents: list[int] = []
    paths: list[list[int]] = []
    for i, (a, b) in enumerate(pairwise(cu_k)):
        path, own = kv_index[a:b], list(range(cu_q[i], cu_q[i + 1]))
        before = path[: len(path) - len(own)]
        parent = last.get(before[-1], -1) if before else -1
        if path != before + own or before != (paths[parent] if 0 <= parent < i else []):
            raise ValueError(
                f"tree_kv_index must list each segment's keys from its root on, got {path[:8]}... for segment {i}, rows"
                f" {cu_q[i]} to {cu_q[i + 1]}"
            )
        parents.append(parent)
        paths.append(path)
    return torch.tensor(parents, dtype=torch.int32), torch.tensor(cu_q, dtype=torch.int32)
