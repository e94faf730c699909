"""An interpreter of MSCCL++ execution plans: what the file says, not what its writer meant."""

import json
from collections import defaultdict, deque
from typing import Any

from trainkit.collectives.schedule.export._chunks import Buffers, ExportError, Races

_COLLECTIVES = {"allgather": "allgather", "reducescatter": "reduce_scatter", "allreduce": "allreduce"}
_OPS, _CHANNELS = 64, 16


class _Machine:
    """All ranks of one plan."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.gpus = plan["gpus"]
        collective = _COLLECTIVES[plan["collective"]]
        self.main = "i" if collective == "reduce_scatter" else "o"
        count = self.gpus[0]["input_chunks" if self.main == "i" else "output_chunks"]
        self.buffers = Buffers(collective, len(self.gpus), count)
        self.scratch = [[0] * gpu["scratch_chunks"] for gpu in self.gpus]
        # (rank, type, channel of the rank) -> the puts that signalled and were not yet waited for
        self.signals: dict[tuple[int, str, int], deque[int]] = defaultdict(deque)
        self.races = Races()
        self.last: dict[tuple[int, int], int] = {}  # (rank, block) -> its latest event
        self.partner = self._pair()

    def _pair(self) -> dict[tuple[int, str, int], tuple[int, str, int]]:
        """The j-th channel of a type from a to b belongs to the j-th from b to a."""
        ends: dict[tuple[int, int, str], list[int]] = defaultdict(list)
        for gpu in self.gpus:
            for entry in gpu["channels"]:
                for own, peer in enumerate(entry["connected_to"]):
                    ends[gpu["id"], peer, entry["channel_type"]].append(own)
        partner = {}
        for (rank, peer, kind), here in ends.items():
            there = ends.get((peer, rank, kind), [])
            if len(here) != len(there):
                raise ExportError(
                    f"ranks {rank} and {peer} have {len(here)} and {len(there)} {kind} channels to each other"
                )
            for a, b in zip(here, there, strict=True):
                partner[rank, kind, a] = (peer, kind, b)
        return partner

    def run(self) -> None:
        programs = [(gpu, block) for gpu in self.gpus for block in gpu["threadblocks"]]
        for gpu, block in programs:
            channels = sum(len(entry["channel_ids"]) for entry in block["channels"])
            for what, value, limit in (("ops", len(block["ops"]), _OPS), ("channels", channels, _CHANNELS)):
                if value > limit:
                    raise ExportError(f"MSCCL++ allows {limit} {what} per thread block, rank {gpu['id']} has {value}")
        at = [0] * len(programs)
        moved = True
        while moved:
            moved = False
            for number, (gpu, block) in enumerate(programs):
                while at[number] < len(block["ops"]) and self._step(gpu, block, block["ops"][at[number]]):
                    at[number] += 1
                    moved = True
        for (gpu, block), done in zip(programs, at, strict=True):
            if done < len(block["ops"]):
                raise ExportError(f"rank {gpu['id']}, thread block {block['id']} waits for ever at op {done}")
        left = [key for key, pending in self.signals.items() if pending]
        if left:
            raise ExportError(f"rank {left[0][0]} was signalled more often than it waits")
        self.buffers.check()

    def _channel(self, gpu: dict[str, Any], block: dict[str, Any], op: dict[str, Any]) -> tuple[int, str, int]:
        kind = op["channel_type"]
        ids = next(entry["channel_ids"] for entry in block["channels"] if entry["channel_type"] == kind)
        return gpu["id"], kind, ids[op["channel_ids"][0]]

    def _happens(self, rank: int, block: dict[str, Any], *after: int) -> int:
        key = (rank, block["id"])
        self.last[key] = self.races.event(self.last.get(key), *after)
        return self.last[key]

    def _step(self, gpu: dict[str, Any], block: dict[str, Any], op: dict[str, Any]) -> bool:
        rank = gpu["id"]
        if op["name"] == "wait":
            channel = self._channel(gpu, block, op)
            if not self.signals[channel]:
                return False
            self._happens(rank, block, self.signals[channel].popleft())
        elif op["name"] == "pws":
            channel = self._channel(gpu, block, op)
            peer, _, _ = self.partner[channel]
            (source,), (target,) = op["src_buff"], op["dst_buff"]
            ids = next(
                r["remote_buffer_ids"] for r in block["remote_buffer_refs"] if r["access_channel_type"] == channel[1]
            )
            remote = gpu["remote_buffers"][ids[target["buffer_id"]]]
            if remote["rank"] != peer:
                raise ExportError(f"rank {rank} puts into rank {remote['rank']} over a channel to rank {peer}")
            event = self._happens(rank, block)
            for i in range(source["size"]):
                value = self.buffers.held[rank][source["index"] + i]
                self.races.read(event, (rank, source["type"], source["index"] + i))
                self.races.write(event, (peer, remote["type"], target["index"] + i))
                if remote["type"] == self.main:
                    self.buffers.store(peer, target["index"] + i, value)
                else:
                    self.scratch[peer][target["index"] + i] = value
            self.signals[self.partner[channel]].append(event)
        elif op["name"] == "re":
            mine, landed = op["src_buff"]
            event = self._happens(rank, block)
            for i in range(mine["size"]):
                self.races.read(event, (rank, landed["type"], landed["index"] + i))
                self.races.write(event, (rank, mine["type"], mine["index"] + i))
                self.buffers.add(rank, mine["index"] + i, self.scratch[rank][landed["index"] + i])
        else:
            raise ExportError(f"op {op['name']!r} is not one that these plans use")
        return True


def run_mscclpp(text: str) -> None:
    """Run a plan on symbolic data.

    Raises:
        ExportError: a limit is exceeded, channels do not pair, data is wrong or only right by luck, or a wait never ends.
    """
    _Machine(json.loads(text)).run()
