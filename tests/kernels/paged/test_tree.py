"""Attention in trees against the tree as a mask, against each path alone, and through transformers and TRL's arguments."""

import os
import subprocess
import sys

import pytest
import torch
from paths import ROOT

pytest.importorskip("triton", reason="Triton is not installed: pip install 'triton>=3.6'")

from kernels_interpreter import interpreter

from trainkit.kernels import attention, pack_samples, tree_attention
from trainkit.kernels.paged import _tree
from trainkit.kernels.paged._packing import tree_of_paths

TREES = {
    "samples": ([-1, 0, 0, 0], [20, 7, 33, 5]),
    "several roots, an empty node": ([-1, 0, 1, 1, 0, 4, -1, 6, 6], [20, 7, 3, 5, 0, 9, 11, 12, 40]),
    "five deep": ([-1, 0, 1, 2, 3, 3, 0], [5, 4, 3, 2, 40, 1, 6]),
}


@pytest.fixture
def interpreted():
    if torch.cuda.is_available():
        pytest.skip("on Triton's interpreter")
    with interpreter():
        yield


def tree(name, dtype=torch.float32):
    parents, lengths = TREES[name]
    indptr = torch.tensor([0, *lengths]).cumsum(0).int()
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, int(indptr[-1]), h, 16, generator=g, dtype=dtype) for h in (4, 2, 2))
    return torch.tensor(parents, dtype=torch.int32), indptr, q, k, v


def paths(parents, indptr):
    """Rows that each node's last token sees, in order."""
    found = []
    for i, parent in enumerate(parents.tolist()):
        own = list(range(int(indptr[i]), int(indptr[i + 1])))
        found.append((found[parent] if parent >= 0 else []) + own)
    return found


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("window", [None, 6])
def test_the_reference_is_each_path_alone(name, window):
    parents, indptr, q, k, v = tree(name, torch.float64)
    out = tree_attention(q, k, v, parents, indptr, window=window, backend="reference")
    for i, rows in enumerate(paths(parents, indptr)):
        alone = attention(q[:, rows], k[:, rows], v[:, rows], causal=True, window=window, backend="reference")
        own = int(indptr[i + 1] - indptr[i])
        torch.testing.assert_close(out[:, rows[len(rows) - own :]], alone[:, len(rows) - own :])


SOONER = {("samples", True), ("five deep", False)}


@pytest.mark.parametrize(
    "name, masked",
    [
        pytest.param(name, masked, marks=() if (name, masked) in SOONER else pytest.mark.slow)
        for name in TREES
        for masked in (True, False)
    ],
)
def test_kernels_and_gradients(name, masked, interpreted, monkeypatch):
    """Forward as one masked call, and level by level through the merge."""
    monkeypatch.setattr(_tree, "MASKED_PAIRS", 1 << 30 if masked else 0)
    _tree._PLANS.clear()
    parents, indptr, q, k, v = tree(name)
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(1))
    results = []
    for backend in ("triton", "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, sinks)]
        out, lse = tree_attention(
            *leaves[:3], parents, indptr, sinks=leaves[3], softcap=3.0, return_lse=True, backend=backend
        )  # fmt: skip
        g = torch.Generator().manual_seed(2)
        loss = (out * torch.randn(out.shape, generator=g)).sum() + (lse * torch.randn(lse.shape, generator=g)).sum()
        results.append((out, lse, *torch.autograd.grad(loss, leaves)))
    _tree._PLANS.clear()
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, atol=3e-5, rtol=1e-4)


def test_examples():
    """Through transformers: gradients and logits are those of repeated prompts."""
    files = [str(ROOT / "examples" / name) for name in ("shared_prompt.py", "trl_tree.py")]
    command = [sys.executable, "-P", "-c", "import runpy, sys; [runpy.run_path(f) for f in sys.argv[1:]]", *files]
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("below 1e-") == 2, done.stdout


def test_trees_that_are_none():
    _, indptr, q, k, v = tree("samples")
    for parents, bounds, rule in (
        ([-1, 0, 2, 0], indptr, "pre-order"),
        ([-1, 0, -1, 0], indptr, "pre-order: |pre-order, each"),
        ([-1, 0, 0], indptr, "node_indptr must rise"),
        ([-1, 0, 0, 0], indptr.flip(0), "node_indptr must rise"),
    ):
        with pytest.raises(ValueError, match=rule):
            tree_attention(q, k, v, torch.tensor(parents, dtype=torch.int32), bounds)
    with pytest.raises(ValueError, match="int32"):
        tree_attention(q, k, v, torch.tensor([-1, 0, 0, 0]), indptr)


def test_packing():
    packed = pack_samples([([5, 6, 7], [[8, 9], [10]]), ([1], [[2, 3]])])
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8, 9, 7, 10, 1, 2, 3]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3, 0, 1, 2]]
    assert packed["labels"].tolist() == [[-100, -100, 8, 9, -100, 10, -100, 2, 3, -100]]
    assert packed["samples"].tolist() == [[-1, -1, 0, 0, -1, 1, -1, 2, 2, -1]]
    assert packed["tree_parents"].tolist() == [-1, 0, 0, -1, 3]
    assert packed["tree_indptr"].tolist() == [0, 2, 5, 7, 7, 10]
    with pytest.raises(ValueError, match="a group must have"):
        pack_samples([([1], [[2], []])])


@pytest.mark.parametrize("name", TREES)
def test_indices_of_paths_are_read_back(name):
    parents, indptr, *_ = tree(name)
    if "empty" in name:
        pytest.skip("a path through an empty node does not say so")
    listed = paths(parents, indptr)
    cu_k = torch.tensor([0, *map(len, listed)]).cumsum(0).int()
    index = torch.tensor([x for path in listed for x in path])
    found = tree_of_paths(index, indptr, cu_k)
    assert torch.equal(found[0], parents) and torch.equal(found[1], indptr)
    index[2] += 1
    with pytest.raises(ValueError, match="from its root on"):
        tree_of_paths(index, indptr, cu_k)
