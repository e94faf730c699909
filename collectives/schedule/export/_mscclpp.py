"""MSCCL++'s execution plan: one-sided puts, signals and waits.

Ops that depend on each other stay in one thread block of a rank, so blocks need no semaphores between them: a tree's
chunk arrives, is added, and is put on by the same block. Reductions land in scratch memory of their own, never reused.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from trainkit.collectives.schedule._form import Op, Schedule
from trainkit.collectives.schedule.export._chunks import ExportError, Grid, grid, waits
from trainkit.collectives.schedule.export._mscclpp_run import run_mscclpp

# microsoft/mscclpp, the executor's execution_common: per thread block
LIMITS = {"ops per thread block": 64, "channels per thread block": 16}


@dataclass
class _Block:
    """A thread block being written."""

    ops: list[dict[str, Any]] = field(default_factory=list)
    peers: dict[tuple[str, int], int] = field(default_factory=dict)
    """(channel type, peer) -> place in the block's channels."""
    remotes: dict[tuple[str, int], int] = field(default_factory=dict)
    """(channel type, index into the rank's remote buffers) -> place in the block's references."""


def mscclpp_json(schedule: Schedule, *, ranks_per_machine: int = 8, protocol: str = "Simple") -> str:
    """The schedule as an MSCCL++ execution plan, checked by `run_mscclpp`.

    Args:
        schedule: a verified all-gather, reduce-scatter or all-reduce.
        ranks_per_machine: ranks r and s share a machine, and so memory channels, if r // this == s // this.
        protocol: "Simple" or "LL".

    Raises:
        ExportError: a limit of the runtime is exceeded; the message names it.
    """
    if protocol not in ("Simple", "LL"):
        raise ValueError(f"protocol must be Simple or LL, got {protocol!r}")
    chunks = grid(schedule, "MSCCL++")
    plan = _Plan(chunks, ranks_per_machine)
    for group, members in enumerate(_groups(schedule)):
        for op in members:
            plan.transfer(group, op)
    text = plan.text(protocol)
    run_mscclpp(text)
    return text


def _groups(schedule: Schedule) -> list[list[Op]]:
    """Ops that depend on each other, packed into as few thread blocks as the limits allow."""
    parent = list(range(len(schedule.ops)))

    def find(x: int) -> int:
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    last: dict[tuple[int, Any], int] = {}
    for op, before in zip(schedule.ops, waits(schedule), strict=True):
        for other in before:
            parent[find(op.id)] = find(other)
        # Ops on one slice of one rank belong together even where none waits for another.
        for rank in (op.src, op.dst):
            parent[find(op.id)] = find(last.setdefault((rank, op.start), op.id))
    component: dict[int, list[Op]] = defaultdict(list)
    for op in schedule.ops:
        component[find(op.id)].append(op)
    packed: list[tuple[dict[int, int], dict[int, set[int]], list[Op]]] = []
    for ops in component.values():
        cost, peers = _cost(ops)
        for what, figures in (("ops", cost), ("channels", {rank: len(names) for rank, names in peers.items()})):
            limit = LIMITS[f"{what} per thread block"]
            for rank, value in figures.items():
                if value > limit:
                    raise ExportError(f"MSCCL++ allows {limit} {what} per thread block, rank {rank} would need {value}")
        for have_cost, have_peers, have in packed:
            fits = all(have_cost.get(r, 0) + c <= LIMITS["ops per thread block"] for r, c in cost.items())
            if fits and all(len(have_peers[r] | p) <= LIMITS["channels per thread block"] for r, p in peers.items()):
                for r, c in cost.items():
                    have_cost[r] = have_cost.get(r, 0) + c
                for r, p in peers.items():
                    have_peers[r] |= p
                have.extend(ops)
                break
        else:
            packed.append((dict(cost), defaultdict(set, {r: set(p) for r, p in peers.items()}), list(ops)))
    return [sorted(ops) for _, _, ops in packed]


def _cost(ops: list[Op]) -> tuple[dict[int, int], dict[int, set[int]]]:
    cost: dict[int, int] = defaultdict(int)
    peers: dict[int, set[int]] = defaultdict(set)
    for op in ops:
        cost[op.src] += 1
        cost[op.dst] += 2 if op.kind == "reduce" else 1
        peers[op.src].add(op.dst)
        peers[op.dst].add(op.src)
    return cost, peers


class _Plan:
    def __init__(self, chunks: Grid, machine: int) -> None:
        self.chunks, self.machine = chunks, machine
        size = len(chunks.schedule.ranks)
        self.main = "i" if chunks.schedule.collective == "reduce_scatter" else "o"
        self.blocks: list[dict[int, _Block]] = [{} for _ in range(size)]
        self.scratch = [0] * size
        self.remote: list[dict[tuple[int, str, str], int]] = [{} for _ in range(size)]
        # (type, peer) in the order of the blocks: the j-th channel to a peer pairs with the peer's j-th back
        self.channels: list[dict[str, list[int]]] = [defaultdict(list) for _ in range(size)]

    def kind(self, one: int, other: int) -> str:
        return "memory" if one // self.machine == other // self.machine else "port"

    def channel(self, group: int, rank: int, peer: int) -> tuple[_Block, str, int]:
        block, kind = self.blocks[rank].setdefault(group, _Block()), self.kind(rank, peer)
        return block, kind, block.peers.setdefault((kind, peer), len(block.peers))

    def transfer(self, group: int, op: Op) -> None:
        first, count = self.chunks.place(op)
        out, kind, channel = self.channel(group, op.src, op.dst)
        into, _, back = self.channel(group, op.dst, op.src)
        where, place = self.main, first
        if op.kind == "reduce":
            where, place = "s", self.scratch[op.dst]
            self.scratch[op.dst] += count
        key = (op.dst, where, kind)
        remote = self.remote[op.src].setdefault(key, len(self.remote[op.src]))
        reference = out.remotes.setdefault((kind, remote), len(out.remotes))
        out.ops.append(
            {
                "name": "pws",
                "src_buff": [{"type": self.main, "index": first, "size": count}],
                "dst_buff": [{"buffer_id": reference, "index": place, "size": count}],
                "channel_ids": [channel],
                "channel_type": kind,
            }
        )
        into.ops.append({"name": "wait", "channel_ids": [back], "channel_type": kind})
        if op.kind == "reduce":
            mine = {"type": self.main, "index": first, "size": count}
            landed = {"type": "s", "index": place, "size": count}
            into.ops.append({"name": "re", "src_buff": [mine, landed], "dst_buff": [mine], "reduce_op": "sum"})

    def text(self, protocol: str) -> str:
        schedule = self.chunks.schedule
        plan = {
            "name": schedule.name,
            "collective": schedule.collective.replace("_", ""),
            "protocol": protocol,
            "inplace": True,
            "reuse_resources": False,
            "gpus": [self._gpu(rank) for rank in range(len(schedule.ranks))],
            "num_threads_per_block": 1024,
            "use_double_scratch_buffer": False,
            "buffer_alignment": 16,
            "min_message_size": 0,
            "max_message_size": 2**64 - 1,
        }
        return json.dumps(plan, indent=1) + "\n"

    def _gpu(self, rank: int) -> dict[str, Any]:
        connected: dict[str, list[int]] = {"memory": [], "port": []}
        blocks = []
        for number, (_, block) in enumerate(sorted(self.blocks[rank].items())):
            # A block's channels in its own order of peers; in the rank's list the blocks follow each other by group.
            ids: dict[str, list[int]] = {"memory": [], "port": []}
            place: dict[tuple[str, int], int] = {}
            for kind, peer in block.peers:
                place[kind, peer] = len(ids[kind])
                ids[kind].append(len(connected[kind]))
                connected[kind].append(peer)
            local = {own: place[key] for key, own in block.peers.items()}
            references: dict[str, list[int]] = {"memory": [], "port": []}
            buffer = {}
            for (kind, remote), own in block.remotes.items():
                buffer[own] = len(references[kind])
                references[kind].append(remote)
            ops = [self._located(op, local, buffer) for op in block.ops]
            blocks.append(
                {
                    "id": number,
                    "ops": ops,
                    "channels": [{"channel_type": kind, "channel_ids": own} for kind, own in ids.items() if own],
                    "remote_buffer_refs": [
                        {"access_channel_type": kind, "remote_buffer_ids": own}
                        for kind, own in references.items()
                        if own
                    ],
                }
            )
        count = self.chunks.count
        return {
            "id": rank,
            "input_chunks": count if self.main == "i" else self.chunks.per_rank if self._gathers else count,
            "output_chunks": self.chunks.per_rank if self.main == "i" else count,
            "scratch_chunks": self.scratch[rank],
            "threadblocks": blocks,
            "channels": [{"channel_type": kind, "connected_to": peers} for kind, peers in connected.items() if peers],
            "remote_buffers": [
                {"rank": peer, "type": where, "access_channel_types": [kind]} for peer, where, kind in self.remote[rank]
            ],
            "semaphores": [],
        }

    @property
    def _gathers(self) -> bool:
        return self.chunks.schedule.collective == "allgather"

    @staticmethod
    def _located(op: dict[str, Any], channel: dict[int, int], buffer: dict[int, int]) -> dict[str, Any]:
        located = dict(op)
        if "channel_ids" in op:
            located["channel_ids"] = [channel[own] for own in op["channel_ids"]]
        if op["name"] == "pws":
            located["dst_buff"] = [{**part, "buffer_id": buffer[part["buffer_id"]]} for part in op["dst_buff"]]
        return located
