"""Which worker of which job this process is: rank, world size and job id, agreed over torch.distributed."""

import secrets
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Place:
    """One worker's place in a session."""

    rank: int
    """Of this worker, in the session."""
    world: int
    """Workers of the session."""
    job: str = ""
    """What tells two jobs with one session name apart; empty where nothing could be agreed."""
    group: Any = None
    """Process group whose ranks the workers are; None: torch.distributed's own, or none."""

    def global_ranks(self) -> list[int]:
        """The workers as ranks of the default group."""
        return list(dist.get_process_group_ranks(self.group or dist.group.WORLD))


def agreed(rank: int | None, world: int | None, group: "dist.ProcessGroup | None") -> Place:
    """This worker's place; collective over the group where rank and world size come from torch.distributed.

    Args:
        rank: as the user says; None: of the group.
        world: as the user says; None: of the group.
        group: process group; None: the default one.

    Raises:
        ValueError: neither the user nor torch.distributed knows, or this process is not of the group.
    """
    if rank is not None and world is not None and group is None:
        return Place(rank, world)
    if not dist.is_initialized():
        raise ValueError("give rank= and world_size=, or call torch.distributed.init_process_group first")
    own, size = dist.get_rank(group), dist.get_world_size(group)
    if own < 0:
        raise ValueError("process_group is one of which this process is a member: give the one that DDP was given")
    if (rank, world) not in ((None, None), (own, size)):
        raise ValueError(
            f"rank {rank} of {world} was said, process_group says {own} of {size}: leave both to the group"
        )
    return Place(own, size, _drawn(group), group)


def _drawn(group: "dist.ProcessGroup | None") -> str:
    """An id that rank 0 of the group draws: 8 bytes in a tensor, since an object would be unpickled."""
    # NCCL broadcasts what is on the GPU alone
    on_gpu = dist.get_backend(group) == "nccl"
    drawn = torch.tensor(list(secrets.token_bytes(8)), dtype=torch.uint8, device="cuda" if on_gpu else "cpu")
    dist.broadcast(drawn, group=group, group_src=0)
    return bytes(drawn.tolist()).hex()
