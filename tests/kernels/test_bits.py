"""Packed bits of masks: what they show is the mask, and they never outlive it."""

import itertools
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'triton>=3.6'")

from kernels_interpreter import interpreter

from trainkit.kernels._attention import _block_lists
from trainkit.kernels._attention._block_lists import Blocks
from trainkit.kernels._attention._spec import Spec
from trainkit.kernels._attention._variant import build
from trainkit.kernels._cache import Cache

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.setattr(_block_lists, "KEPT", Cache(100, most_bytes=1 << 30))
    with nullcontext() if DEVICE.type == "cuda" else interpreter():
        yield


def table(B, H, Sq, Sk, seed, side=32):
    """A random mask with blocks unseen, whole, and seen in part; one row and one column of them see nothing."""
    g = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 4, (B, H, -(-Sq // side), -(-Sk // side)), generator=g)
    blocks[:, :, 1] = blocks[:, :, :, 2] = 0
    spread = blocks.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, :Sq, :Sk]
    noise = torch.rand(B, H, Sq, Sk, generator=g) < 0.5
    return ((spread == 1) | ((spread > 1) & noise)).to(DEVICE)


def arguments(mask_mod, B, H, Sq, Sk, BM, BN, by_keys, **options):
    spec = Spec(scale=1.0, mask_mod=mask_mod, **options)
    return Blocks(build(spec, DEVICE), spec, B, H, Sq, Sk, BM, BN, DEVICE, by_keys)


def shown(arguments):
    """The mask `[B, H, Sq, Sk]` that lists and bits describe, in the order that the kernels read."""
    _, _, B, H, Sq, Sk, BM, BN, _, by_keys = arguments
    blocks, counts, full, sb, sh, _ = _block_lists.lists(arguments)
    first, words = _block_lists.bits(arguments)
    tall, wide, lines, columns = (BN, BM, Sk, Sq) if by_keys else (BM, BN, Sq, Sk)
    bit, lane = torch.arange(wide // 4), torch.arange(4)
    place = (8 * (bit // 2) + bit % 2)[None, :] + 2 * lane[:, None]
    tiles = torch.empty(words.shape[0], tall, wide, dtype=torch.bool)
    tiles[:, :, place] = (words.cpu()[..., None] >> bit & 1).bool()
    assert tiles[0].all()
    rows, across = -(-lines // tall), -(-columns // wide)
    seen = torch.zeros(B, H, rows * tall, across * wide, dtype=torch.bool)
    states = [x.flatten(0, 1).tolist() for x in (blocks, counts, full, first)]
    for b, h, tile in itertools.product(range(B), range(H), range(rows)):
        order, count, whole, start = (x[b * sb + h * sh + tile] for x in states)
        for n in range(max(count, 1)):
            part = tiles[0 if n < whole else start + n - whole]
            seen[b, h, tile * tall : (tile + 1) * tall, order[n] * wide : (order[n] + 1) * wide] = part
    assert not seen[:, :, :, columns:].any() and not seen[:, :, lines:].any()
    seen = seen[:, :, :lines, :columns]
    return seen.mT if by_keys else seen


def wanted(seen, causal=False, window=None):
    Sq, Sk = seen.shape[2:]
    gap = torch.arange(Sq)[:, None] + Sk - Sq - torch.arange(Sk)
    if causal:
        seen = seen & (gap >= 0)
    return seen if window is None else seen & (gap.abs() < window)


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize(
    ("BM", "BN", "options"),
    [(32, 32, {}), (128, 128, {"causal": True}), (64, 128, {"window": 60}), (128, 64, {"causal": True, "window": 70})],
    ids=str,
)
def test_bits_of_a_mask(options, BM, BN, by_keys):
    size = (2, 2, 100, 170)
    seen = table(*size, BM + BN)
    mask = lambda b, h, q, k: seen[b, h, q, k]  # noqa: E731
    assert torch.equal(shown(arguments(mask, *size, BM, BN, by_keys, **options)), wanted(seen.cpu(), **options))


@pytest.mark.parametrize("varies", ["", "b", "h", "q", "k"])
def test_masks_that_vary_with_less(varies):
    seen = table(2 if varies == "b" else 1, 3 if varies == "h" else 1, 70, 130, 7)
    rows, columns = seen[0, 0, :, 3].clone(), seen[0, 0, 3].clone()
    columns[5] = True
    masks = {
        "": lambda b, h, q, k: seen[0, 0, q, k],
        "b": lambda b, h, q, k: seen[b, 0, q, k],
        "h": lambda b, h, q, k: seen[0, h, q, k],
        "q": lambda b, h, q, k: rows[q],
        "k": lambda b, h, q, k: columns[k],
    }
    want = {"q": rows[None, None, :, None], "k": columns[None, None, None]}.get(varies, seen)
    call = arguments(masks[varies], 2, 3, 70, 130, 32, 64, varies == "h")
    assert torch.equal(shown(call), want.cpu().expand(2, 3, 70, 130))


def test_what_changes_is_packed_anew():
    """As with the lists: by the version of what the mask captured (on the CPU its numbers)."""
    seen = table(1, 1, 40, 130, 1)
    call = arguments(lambda b, h, q, k: seen[0, 0, q, k], 1, 1, 40, 130, 32, 32, False)
    before = _block_lists.bits(call)
    assert _block_lists.bits(call) is before
    for seed in (2, 3):
        seen.copy_(table(1, 1, 40, 130, seed))
        assert torch.equal(shown(call), seen.cpu())


def test_too_many_are_not_made_and_old_ones_not_kept(monkeypatch):
    size = (1, 1, 40, 130, 32, 32, False)
    tables = [table(*size[:4], seed) for seed in range(3)]
    calls = [arguments(lambda b, h, q, k, t=t: t[0, 0, q, k], *size) for t in tables]
    made = [_block_lists.bits(call) for call in calls]
    total = sum(x.nbytes + _block_lists.lists(call).nbytes for x, call in zip(made, calls, strict=True))
    assert _block_lists.KEPT.nbytes == total
    assert all(_block_lists.bits(call) is x for x, call in zip(made, calls, strict=True))
    monkeypatch.setattr(_block_lists.KEPT, "most_bytes", total)
    _block_lists.bits(arguments(lambda b, h, q, k: tables[0][0, 0, q, k], 1, 1, 40, 130, 32, 64, False))
    assert _block_lists.KEPT.nbytes <= total and _block_lists.bits(calls[2]) is made[2]
    assert _block_lists.bits(calls[0]) is not made[0]
    for call in calls:
        assert torch.equal(shown(call), tables[calls.index(call)].cpu())
    monkeypatch.setattr(_block_lists, "LARGEST", made[0].words.nbytes - 1)
    monkeypatch.setattr(_block_lists, "KEPT", Cache(100))
    assert _block_lists.bits(calls[0]) is None
