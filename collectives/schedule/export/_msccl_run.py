"""An interpreter of MSCCL's XML: what the file says, not what its writer meant."""

import xml.etree.ElementTree as ET
from collections import defaultdict

from trainkit.collectives.schedule.export._chunks import Buffers, ExportError, Races

_SENDS, _RECEIVES = ("s", "rcs", "rrs", "rrcs"), ("r", "rcs", "rrc", "rrs", "rrcs")


def run_msccl(text: str) -> None:
    """Run an algorithm file on symbolic data; each send meets its receive, so any buffering would do.

    Raises:
        ExportError: two blocks share a connection, a step is malformed, data is wrong, a dependency is missing that
            another timing would need, or the blocks wait in a circle.
    """
    algo = ET.fromstring(text)
    ranks, count = int(algo.attrib["ngpus"]), int(algo.attrib["nchunksperloop"])
    collective = {"reducescatter": "reduce_scatter"}.get(algo.attrib["coll"], algo.attrib["coll"])
    buffers = Buffers(collective, ranks, count)
    steps: dict[tuple[int, int], list[dict[str, str]]] = {}
    ends: dict[tuple[str, int, int, int], tuple[int, int]] = {}  # (side, from, to, channel) -> block
    peers: dict[tuple[int, int], tuple[int, int, int]] = {}
    for gpu in algo.iter("gpu"):
        rank = int(gpu.attrib["id"])
        for tb in gpu.iter("tb"):
            block = (rank, int(tb.attrib["id"]))
            send, receive, channel = (int(tb.attrib[key]) for key in ("send", "recv", "chan"))
            peers[block] = (send, receive, channel)
            steps[block] = [step.attrib for step in tb.iter("step")]
            sides = [("send", rank, send)] if send >= 0 else []
            sides += [("recv", receive, rank)] if receive >= 0 else []
            for side in sides:
                if (*side, channel) in ends:
                    raise ExportError(f"two thread blocks of rank {rank} {side[0]} on one connection")
                ends[*side, channel] = block
    at: dict[tuple[int, int], int] = defaultdict(int)

    def current(block: tuple[int, int]) -> dict[str, str] | None:
        """The step that a block is at, if what it depends on is done."""
        if at[block] >= len(steps[block]):
            return None
        step = steps[block][at[block]]
        depends = (block[0], int(step["depid"]))
        return step if depends[1] < 0 or at[depends] > int(step["deps"]) else None

    races = Races()
    last: dict[tuple[int, int], int] = {}  # block -> its latest event
    events: dict[tuple[int, int, int], int] = {}

    def happens(block: tuple[int, int], step: dict[str, str], *after: int) -> int:
        depends = events[block[0], int(step["depid"]), int(step["deps"])] if int(step["depid"]) >= 0 else None
        last[block] = events[block[0], block[1], at[block]] = races.event(last.get(block), depends, *after)
        return last[block]

    waiting = set(steps)
    moved = True
    while moved:
        moved = False
        for block in sorted(waiting):
            while (step := current(block)) is not None:
                kind = step["type"]
                if kind in _SENDS and kind not in _RECEIVES:
                    send, _, channel = peers[block]
                    other = ends.get(("recv", block[0], send, channel))
                    got = current(other) if other is not None else None
                    if other is None or got is None or got["type"] not in _RECEIVES:
                        break
                    sent = happens(block, step)
                    received = happens(other, got, sent)
                    for i in range(int(step["cnt"])):
                        races.read(sent, (block[0], step["srcbuf"], int(step["srcoff"]) + i))
                        races.write(received, (other[0], got["dstbuf"], int(got["dstoff"]) + i))
                    _transfer(buffers, block[0], other[0], step, got)
                    at[other] += 1
                elif kind == "nop":
                    happens(block, step)
                else:
                    break  # a receive moves when its sender does
                at[block] += 1
                moved = True
            if at[block] >= len(steps[block]):
                waiting.discard(block)
    stuck = [block for block in steps if at[block] < len(steps[block])]
    if stuck:
        rank, number = stuck[0]
        raise ExportError(f"thread blocks wait in a circle: rank {rank}, block {number} at step {at[stuck[0]]}")
    buffers.check()


def _transfer(buffers: Buffers, source: int, target: int, send: dict[str, str], receive: dict[str, str]) -> None:
    count = int(send["cnt"])
    if int(receive["cnt"]) != count:
        raise ExportError(f"rank {source} sends {count} chunks where rank {target} receives {receive['cnt']}")
    put = buffers.add if receive["type"] == "rrc" else buffers.store
    for i in range(count):
        put(target, int(receive["dstoff"]) + i, buffers.held[source][int(send["srcoff"]) + i])
