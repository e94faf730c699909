"""What ranks tell each other, as JSON in byte tensors: nothing that comes over the network is unpickled."""

import dataclasses
import json
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainkit.autolrs._forecast import Forecast

T = TypeVar("T")


def from_rank_zero(value: T) -> T:
    """Rank 0's None, bool, int, float or `Forecast` on every rank; `value` itself without a process group."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    mine = _packed(dataclasses.asdict(value) if isinstance(value, Forecast) else value)
    length = torch.tensor([len(mine)], device=mine.device)
    torch.distributed.broadcast(length, src=0)
    held = mine if torch.distributed.get_rank() == 0 else mine.new_empty(int(length))
    torch.distributed.broadcast(held, src=0)
    found = _unpacked(held)
    return Forecast(**found) if isinstance(found, dict) else found  # type: ignore[return-value]


def from_every_rank(value: Any) -> list[Any]:
    """Each rank's JSON-able value, by rank; byte tensors in it come back as byte tensors."""
    mine = _packed(value)
    lengths = [torch.zeros(1, dtype=torch.int64, device=mine.device) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(lengths, torch.tensor([len(mine)], device=mine.device))
    longest = max(int(n) for n in lengths)
    padded = torch.cat([mine, mine.new_zeros(longest - len(mine))])
    held = [torch.empty_like(padded) for _ in lengths]
    torch.distributed.all_gather(held, padded)
    return [_unpacked(part[: int(n)]) for part, n in zip(held, lengths, strict=True)]


def _packed(value: Any) -> Tensor:
    text = json.dumps(value, default=lambda tensor: {"bytes": tensor.tolist()})
    device = "cpu" if "gloo" in torch.distributed.get_backend() else "cuda"
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device)


def _unpacked(held: Tensor) -> Any:
    def tensors(found: dict[str, Any]) -> Any:
        return torch.tensor(found["bytes"], dtype=torch.uint8) if list(found) == ["bytes"] else found

    return json.loads(bytes(held.cpu().tolist()), object_hook=tensors)
