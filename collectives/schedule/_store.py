"""Schedules on disk: one versioned JSON, read by the executor and by people's own tools."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

from trainkit._files import write_text_atomically
from trainkit.collectives.schedule._form import Schedule
from trainkit.collectives.schedule._op import Op

FORMAT = "trainkit.schedule"
VERSION = 1


def to_dict(schedule: Schedule) -> dict[str, Any]:
    """The schedule as plain JSON values; fractions are strings, paths are numbered."""
    paths: dict[tuple[str, ...], int] = {}
    ops = []
    for op in schedule.ops:
        row: list[Any] = [op.kind, op.src, op.dst, str(op.start), str(op.stop)]
        row += [paths.setdefault(op.path, len(paths)), list(op.depends), op.step]
        ops.append(row if op.source is None else [*row, str(op.source)])
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": schedule.name,
        "collective": schedule.collective,
        "mode": schedule.mode,
        "ranks": list(schedule.ranks),
        "root": schedule.root,
        "shards": [[str(start), str(stop)] for start, stop in schedule.shards],
        "unit": schedule.unit,
        "links": [[u, v, str(capacity)] for (u, v), capacity in schedule.links.items()],
        "latency": [[u, v, delay] for (u, v), delay in schedule.latency.items()],
        "combining": sorted(schedule.combining),
        "paths": [list(path) for path in paths],
        "ops": ops,
        "order": [list(program) for program in schedule.order],
    }


def from_dict(data: dict[str, Any]) -> Schedule:
    """The schedule behind `to_dict`.

    Raises:
        ValueError: the data is of another format or version, or breaks a rule of `Schedule`.
    """
    if data.get("format") != FORMAT or data.get("version") != VERSION:
        raise ValueError(
            f"a schedule file says format {FORMAT!r}, version {VERSION}; "
            f"got {data.get('format')!r}, {data.get('version')!r}"
        )
    paths = [tuple(path) for path in data["paths"]]
    ops = []
    for op_id, (kind, src, dst, start, stop, path, depends, step, *source) in enumerate(data["ops"]):
        origin = Fraction(source[0]) if source else None
        ops.append(
            Op(op_id, kind, src, dst, Fraction(start), Fraction(stop), paths[path], tuple(depends), step, origin)
        )
    return Schedule(
        name=data["name"],
        collective=data["collective"],
        ranks=tuple(data["ranks"]),
        ops=ops,
        mode=data["mode"],
        shards=[(Fraction(start), Fraction(stop)) for start, stop in data["shards"]],
        links={(u, v): Fraction(capacity) for u, v, capacity in data["links"]},
        unit=data["unit"],
        latency={(u, v): delay for u, v, delay in data["latency"]},
        root=data["root"],
        order=[list(program) for program in data["order"]],
        combining=frozenset(data["combining"]),
    )


def save(schedule: Schedule, path: str | Path) -> None:
    """Write `to_dict` to `path`, whole or not at all."""
    write_text_atomically(Path(path), json.dumps(to_dict(schedule)) + "\n")


def load(path: str | Path) -> Schedule:
    """Read what `save` wrote."""
    try:
        data = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return from_dict(data)
