"""MSCCL's XML: thread blocks with one send peer and one receive peer each.

Every pair of ranks and channel has one sending and one receiving thread block, which issue the pair's ops in the
schedule's order. That order is common to all ranks, so the blocks cannot wait in a circle.
"""

import re
import xml.etree.ElementTree as ET
from collections import defaultdict
from dataclasses import dataclass, field
from math import ceil

from trainkit.collectives.schedule._form import Schedule
from trainkit.collectives.schedule.export._chunks import ExportError, grid, waits
from trainkit.collectives.schedule.export._msccl_parsers import MOST_NAME, PARSERS, Parser
from trainkit.collectives.schedule.export._msccl_run import run_msccl

_NO_LIMIT = 2**63 - 1  # "maxBytes" is 64 bits; 0 means no limit to two parsers and never to the third


@dataclass
class _Block:
    """A thread block being written."""

    send: int
    receive: int
    channel: int
    steps: list[dict[str, str]] = field(default_factory=list)


def msccl_xml(schedule: Schedule, *, runtime: str = "msccl", channels: int = 1, protocol: str = "Simple") -> str:
    """The schedule as an MSCCL algorithm file, checked by `run_msccl`.

    Args:
        schedule: a verified all-gather, reduce-scatter or all-reduce.
        runtime: "msccl", "azure" or "rccl", see `PARSERS`.
        channels: connections between each pair of ranks; trees are dealt over them.
        protocol: "Simple", "LL" or "LL128".

    Raises:
        ExportError: a limit of the runtime is exceeded; the message names it.
    """
    if protocol not in ("Simple", "LL", "LL128"):
        raise ValueError(f"protocol must be Simple, LL or LL128, got {protocol!r}")
    if runtime not in PARSERS:
        raise ValueError(f"runtime must be one of {', '.join(PARSERS)}, got {runtime!r}")
    parser = PARSERS[runtime]
    # A rank has at most 16 sending and 16 receiving blocks on a channel if its peers are dealt by their distance.
    ranks = len(schedule.ranks)
    bands = ceil((ranks - 1) / (parser.blocks_per_channel // 2))
    if not 1 <= channels * bands <= parser.channels:
        need = f"{channels} between each pair of {ranks} ranks need {channels * bands}"
        raise ExportError(f"{parser.name} has at most {parser.channels} channels, {need}")
    chunks = grid(schedule, parser.name)
    buffer = "i" if schedule.collective == "reduce_scatter" else "o"
    blocks: list[dict[tuple[int, int, int], _Block]] = [{} for _ in schedule.ranks]
    done: dict[tuple[int, int], tuple[_Block, int]] = {}  # (op, rank) -> its last step there
    needed: set[tuple[int, int, int]] = set()  # (rank, id of block, step) that another step waits for

    def block(rank: int, send: int, receive: int, channel: int) -> _Block:
        return blocks[rank].setdefault((send, receive, channel), _Block(send, receive, channel))

    def add(rank: int, target: _Block, kind: str, first: int, count: int, before: list[tuple[_Block, int]]) -> int:
        # One dependency a step: the others are waited for by steps that do nothing. A block's own steps are in order,
        # and of several steps of one block the last is enough.
        latest: dict[int, tuple[_Block, int]] = {}
        for other, step in before:
            if other is not target and latest.get(id(other), (other, -1))[1] < step:
                latest[id(other)] = (other, step)
        links = list(latest.values())
        for other, step in links[1:]:
            target.steps.append(_step(target, "nop", "i", -1, 0, (other, step)))
        target.steps.append(_step(target, kind, buffer, first, count, links[0] if links else None))
        needed.update((rank, id(other), step) for other, step in links)
        return len(target.steps) - 1

    earlier = waits(schedule)
    users: dict[tuple[int, int], set[int]] = defaultdict(set)  # (rank, chunk) -> ops so far that touched it there
    for op, before in zip(schedule.ops, earlier, strict=True):
        first, count = chunks.place(op)
        channel = first % channels * bands + ((op.dst - op.src) % ranks - 1) // (parser.blocks_per_channel // 2)
        out = block(op.src, op.dst, -1, channel)
        into = block(op.dst, -1, op.src, channel)
        at_source = [done[other, op.src] for other in before if (other, op.src) in done]
        at_target = [done[other, op.dst] for other in before if (other, op.dst) in done]
        # What the receiver has of the slice is complete and sent on before it is written again.
        touched = {other for chunk in range(first, first + count) for other in users[op.dst, chunk]}
        at_target += [done[other, op.dst] for other in sorted(touched)]
        for begin in range(first, first + count, parser.most_chunks):
            piece = min(parser.most_chunks, first + count - begin)
            sent = add(op.src, out, "s", begin, piece, at_source)
            got = add(op.dst, into, "rrc" if op.kind == "reduce" else "r", begin, piece, at_target)
        done[op.id, op.src] = (out, sent)
        done[op.id, op.dst] = (into, got)
        for chunk in range(first, first + count):
            users[op.src, chunk].add(op.id)
            users[op.dst, chunk].add(op.id)
    text = _write(schedule, blocks, needed, chunks.count, buffer, channels * bands, protocol, parser)
    run_msccl(text)
    return text


def _step(
    target: _Block, kind: str, buffer: str, first: int, count: int, after: tuple[_Block, int] | None
) -> dict[str, str]:
    step = {
        "s": str(len(target.steps)),
        "type": kind,
        "srcbuf": buffer,
        "srcoff": str(first),
        "dstbuf": buffer,
        "dstoff": str(first),
    }
    step |= {"cnt": str(count), "depid": "-1", "deps": "-1", "hasdep": "0"}
    if after is not None:
        step |= {"depid": str(id(after[0])), "deps": str(after[1])}
    return step


def _write(
    schedule: Schedule,
    blocks: list[dict[tuple[int, int, int], _Block]],
    needed: set[tuple[int, int, int]],
    count: int,
    buffer: str,
    channels: int,
    protocol: str,
    parser: Parser,
) -> str:
    size = len(schedule.ranks)
    algo = ET.Element(
        "algo",
        name=_plain(schedule.name),
        proto=protocol,
        nchannels=str(channels),
        nchunksperloop=str(count),
        ngpus=str(size),
    )
    algo.attrib |= {
        "coll": parser.collective(schedule.collective),
        "inplace": "1",
        "outofplace": "0",
        "minBytes": "0",
        "maxBytes": str(_NO_LIMIT),
    }
    if schedule.collective != "allgather":
        algo.set("redop", "sum")
    for rank, mine in enumerate(blocks):
        used = {"id": str(rank), "i_chunks": "0", "o_chunks": "0", "s_chunks": "0", f"{buffer}_chunks": str(count)}
        gpu = ET.SubElement(algo, "gpu", used)
        number = {str(id(block)): str(place) for place, block in enumerate(mine.values())}
        for place, block in enumerate(mine.values()):
            tb = ET.SubElement(
                gpu, "tb", id=str(place), send=str(block.send), recv=str(block.receive), chan=str(block.channel)
            )
            for at, step in enumerate(block.steps):
                step["depid"] = number.get(step["depid"], "-1")
                if (rank, id(block), at) in needed:
                    step["hasdep"] = "1"
                ET.SubElement(tb, "step", step)
        _check_limits(parser, rank, size, list(mine.values()))
    ET.indent(algo)
    return ET.tostring(algo, encoding="unicode") + "\n"


def _plain(name: str) -> str:
    """A name that needs no escapes and fits every parser's buffer: they decode nothing."""
    return re.sub(r"[^A-Za-z0-9 ._+-]", "_", name)[:MOST_NAME]


def _check_limits(parser: Parser, rank: int, size: int, blocks: list[_Block]) -> None:
    per_channel: dict[int, int] = defaultdict(int)
    for block in blocks:
        per_channel[block.channel] += 1
    steps = [len(block.steps) for block in blocks]
    figures = (
        ("thread blocks", len(blocks), parser.blocks),
        ("thread blocks per channel", max(per_channel.values(), default=0), parser.blocks_per_channel),
        ("steps per thread block", max(steps, default=0), parser.steps),
        # The file's own elements, those of other ranks without what is in them.
        ("XML nodes for a rank", 1 + size + len(blocks) + sum(steps), parser.nodes),
    )
    for what, value, limit in figures:
        if value > limit:
            raise ExportError(f"{parser.name} allows {limit} {what}, rank {rank} would need {value}")
