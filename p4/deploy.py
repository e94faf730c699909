"""Programs a switch as a description says: shows the difference, makes it, reads it back, tries it.

Also a program of its own: `python p4/deploy.py workers.yaml --grpc 127.0.0.1:9559`.
"""

import contextlib
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trainkit.p4 import _pipeline
from trainkit.p4._description import Description, load
from trainkit.p4._entries import DYNAMIC, FIRST_GROUP, Change, Entry, Item, difference, wanted
from trainkit.p4._frames import arp_reply, arp_request

if TYPE_CHECKING:
    from trainkit.p4._client import Connection

_PROBES, _PROBE_WAIT = 3, 0.7
DISPOSITIONS = ("added", "chunks", "retransmissions", "stale", "foreign", "malformed", "control")
"""What the program counts, in the order of its counter."""
Target = Literal["bmv2", "tofino"]


class DeployError(RuntimeError):
    """The switch could not be brought to what was asked, and is as it was before."""


@dataclass(frozen=True)
class Outcome:
    """What a deployment did."""

    programmed: bool
    """The program itself was loaded."""
    changes: tuple[Change, ...]
    """What was changed, or with `dry_run` would be."""
    unseen: tuple[str, ...]
    """What the probe found: a line for each worker that is not where it should be."""


def deploy(
    path: str | Path,
    *,
    grpc: str = "127.0.0.1:9559",
    device: int = 0,
    election: int = 1,
    target: Target = "bmv2",
    artefacts: str | Path | None = None,
    dry_run: bool = False,
    replace: bool = False,
    probe: bool = True,
) -> Outcome:
    """Bring a switch to what the file at `path` describes. Doing it again changes nothing.

    Args:
        path: YAML of the switch's address, the workers and the sessions; see docs/how-it-works/p4.md.
        grpc: "host:port" of the switch's P4Runtime server.
        device: its device id.
        election: election id; the greatest is primary.
        target: "bmv2", or "tofino" with the `artefacts` of `trainkit p4 compile --target tofino`.
        artefacts: folder of the compiled program; None takes the one that is shipped, for bmv2.
        dry_run: show the difference and change nothing.
        replace: overwrite another program that the switch runs.
        probe: ask every worker for its address by ARP afterwards.

    Raises:
        ValueError: the file says something that no switch can do.
        SwitchError: the switch is unreachable, another's, or refuses.
        DeployError: another program runs there, or what was written does not read back.
    """
    description = load(path)
    p4info, config, cookie = _program(target, artefacts)
    with connected(grpc, device, election) as switch:
        programmed = not switch.runs(p4info, cookie)
        if programmed and not switch.empty and not replace:
            raise DeployError(f"switch {grpc} runs another program: give --replace to overwrite it")
        there = [] if programmed else switch.read()
        changes = [*_outdated(there, description), *difference(_static(there), wanted(description))]
        if programmed:
            print(f"+ the program, {target}, cookie {cookie:016x}")
        for change in changes:
            print(str(change))
        if not programmed and not changes:
            print("nothing to change")
        if dry_run:
            return Outcome(programmed, tuple(changes), ())
        if programmed:
            switch.push(p4info, config, cookie)
        _make(switch, changes, wanted(description))
        if changes or programmed:
            print(f"{len(changes)} changes made and read back")
        unseen = tuple(probe_workers(switch, description)) if probe else ()
        for line in unseen:
            print(line)
        if probe and not unseen:
            print(f"all {len(description.workers)} workers answer at their ports")
        return Outcome(programmed, tuple(changes), unseen)


@dataclass(frozen=True)
class Status:
    """What a switch holds and has counted."""

    as_described: bool
    sessions: dict[str, dict[str, int]]
    """By name: workers, how many have joined, packets and bytes received."""
    packets: dict[str, int]
    """SwitchML packets by what became of them."""


def status(path: str | Path, *, grpc: str = "127.0.0.1:9559", device: int = 0) -> Status:
    """What the switch of a description holds and has counted, whoever is primary; errors are `deploy`'s."""
    description = load(path)
    with connected(grpc, device, None) as switch:
        held = switch.read()
        traffic = switch.traffic("session")
        sessions = {}
        for session in description.sessions:
            joined = [i for i in held if isinstance(i, Entry) and i.table == "member" and i.key[0] == session.number]
            packets, size = traffic.get((session.number,), (0, 0))
            sessions[session.name] = {
                "workers": len(session.workers), "joined": len(joined), "packets": packets, "bytes": size
            }  # fmt: skip
        counted = dict(zip(DISPOSITIONS, switch.counters("packets"), strict=True))
        return Status(not difference(_static(held), wanted(description)), sessions, counted)


def reset(
    path: str | Path, session: str | None = None, *, grpc: str = "127.0.0.1:9559", device: int = 0, election: int = 1
) -> list[str]:
    """End the epoch of a session, or of all, and empty their slots; their names. Errors are `deploy`'s."""
    from trainkit.p4._plane import Plane

    description = load(path)
    chosen = [one for one in description.sessions if session in (None, one.name)]
    if not chosen:
        raise ValueError(f"{path} has no session {session!r}: it has {', '.join(s.name for s in description.sessions)}")
    with deployed(path, grpc, device, election) as (switch, _):
        plane = Plane(switch, description)
        for one in chosen:
            plane.reset(one.number)
    return [one.name for one in chosen]


@contextlib.contextmanager
def deployed(
    path: str | Path, grpc: str = "127.0.0.1:9559", device: int = 0, election: int = 1
) -> Iterator[tuple["Connection", Description]]:
    """A session with a switch that holds what a description says.

    Raises:
        DeployError: it does not.
    """
    description = load(path)
    with connected(grpc, device, election) as switch:
        left = [] if switch.empty else difference(_static(switch.read()), wanted(description))
        if switch.empty or left:
            raise DeployError(f"switch {grpc} does not hold what {path} says: run `trainkit p4 deploy {path}` first")
        yield switch, description


@contextlib.contextmanager
def connected(grpc: str, device: int = 0, election: int | None = 1) -> Iterator["Connection"]:
    """A session with a switch; needs the extra `p4`."""
    try:
        from trainkit.p4._client import Connection
    except ImportError as error:
        raise DeployError(f"{error}: P4Runtime is missing: pip install 'p4runtime-shell>=0.0.6'") from error
    with Connection(grpc, device, election) as connection:
        yield connection


def probe_workers(switch: "Connection", description: Description) -> list[str]:
    """Ask every worker for its MAC by ARP, out of its port; a line for each that does not answer rightly from there."""
    missing = {worker.ip: worker for worker in description.workers}
    seen: dict[int, tuple[int, int]] = {}
    for _ in range(_PROBES):
        for worker in missing.values():
            switch.send(arp_request(description.mac, description.ip, worker.ip), port=worker.port)
        until = time.monotonic() + _PROBE_WAIT
        while missing and (left := until - time.monotonic()) > 0:
            packet = switch.receive(left)
            answer = arp_reply(packet.payload) if packet else None
            if packet is None or answer is None:
                continue
            seen[answer.ip] = answer.mac, packet.fields["port"]
            asked = missing.get(answer.ip)
            if asked and seen[answer.ip] == (asked.mac, asked.port):
                del missing[answer.ip]
    lines = []
    for worker in missing.values():
        if worker.ip in seen:
            mac, port = seen[worker.ip]
            lines.append(
                f"{worker} answers from port {port} with {mac.to_bytes(6, 'big').hex(':')}: correct the file or the cable"
            )
        else:
            lines.append(
                f"{worker} is not seen: is its cable at this port, is its address up? (bmv2 needs --cpu-port 510)"
            )
    return lines


def _program(target: Target, artefacts: str | Path | None) -> tuple[str, bytes, int]:
    """P4info, what the device loads, and the cookie of a compiled program."""
    if target == "bmv2":
        folder = Path(artefacts) if artefacts else _pipeline.BUILD
        paths = [folder / _pipeline.P4INFO.name, folder / _pipeline.JSON.name]
    elif artefacts is None:
        raise DeployError(
            "a Tofino's program is not shipped: give --artefacts, what `trainkit p4 compile --target tofino` wrote"
        )
    else:
        folder = Path(artefacts)
        paths = [folder / "switchml_tna.p4info.txtpb", folder / "pipe" / "tofino.bin", folder / "pipe" / "context.json"]
    try:
        p4info, *parts = (path.read_bytes() for path in paths)
    except OSError as error:
        raise DeployError(f"{error.filename}: {error.strerror}: compile it with `trainkit p4 compile`") from error
    config = parts[0]
    if target == "tofino":  # what bf_switchd takes: name, binary and context, each behind its length
        config = b"".join(struct.pack("<i", len(part)) + part for part in (b"switchml_tna", *parts))
    return p4info.decode(), config, _pipeline.cookie()


def _static(there: list[Item]) -> list[Item]:
    """What is compared with a description: not what joins have written."""
    return [item for item in there if not (isinstance(item, Entry) and item.table in DYNAMIC)]


def _outdated(there: list[Item], description: Description) -> list[Change]:
    """What joins have written for sessions that are no longer the same."""
    same = {item.place for item in wanted(description) if item in there}
    joined = [item for item in there if isinstance(item, Entry) and item.table in DYNAMIC]

    def stands(item: Entry) -> bool:
        number = item.key[0]
        if not {("session", (number,)), ("multicast group", (FIRST_GROUP + number,))} <= same:
            return False
        worker = description.sessions[number].workers[item.key[1] - 1] if item.table == "receiver" else None
        return worker is None or item.params[:2] == (worker.mac, worker.ip)

    ended = {item.key[0] for item in joined if not stands(item)}
    return [Change(item, None) for item in joined if item.key[0] in ended]


def _make(switch: "Connection", changes: list[Change], target: list[Item]) -> None:
    """Make changes and read them back; where that fails, undo what was made."""
    before = switch.read()
    try:
        switch.write(changes)
        left = difference(_static(switch.read()), target)
        if left:
            raise DeployError(f"the switch does not hold what was written: {left[0]}")
    except Exception as error:
        with contextlib.suppress(RuntimeError):
            switch.write(difference(switch.read(), before))
            raise type(error)(f"{error}; what was changed before it is undone") from None
        raise type(error)(f"{error}; and it could not be undone: run `trainkit p4 deploy` again") from None


if __name__ == "__main__":
    from jsonargparse import auto_cli

    try:
        sys.exit(1 if auto_cli(deploy).unseen else 0)
    except (ValueError, RuntimeError) as error:
        print(f"deploy: {error}", file=sys.stderr)
        sys.exit(2)
