"""What the compiled TNA program takes of the chip, read from the reports that `p4c-barefoot -g` writes."""

import json
from math import prod
from pathlib import Path
from typing import Any

_OF_A_STAGE = {
    "stateful ALUs": ("meter_alus", "meters", ("nAlus",)),
    "SRAMs": ("rams", "srams", ("nRows", "nColumns")),
    "map RAMs": ("map_rams", "maprams", ("nRows", "nUnits")),
    "TCAMs": ("tcams", "tcams", ("nRows", "nColumns")),
    "logical tables": ("logical_tables", "ids", ("size",)),
}
"""Where resources.json has what is used of a stage, and what there is."""

_CONTAINERS = {"normal": "PHV", "tagalong": "tagalong PHV"}


def resources(folder: Path) -> dict[str, tuple[int, int]]:
    """(used, there) of the stages, of what is in them, and of the containers of the packet header vector.

    Args:
        folder: A compiled program, with `resources.json` and `phv.json` somewhere in it.

    Raises:
        FileNotFoundError: A report is not there.
    """
    report = _report(folder, "resources.json")["resources"]
    stages, count = report["mau"]["mau_stages"], report["mau"]["nStages"]  # only stages that are used are listed
    used = {"stages": (sum(bool(stage["logical_tables"]["ids"]) for stage in stages), count)}
    for name, (part, units, sides) in _OF_A_STAGE.items():
        there = prod(stages[0][part][side] for side in sides) * count
        used[name] = (sum(len(stage[part][units]) for stage in stages), there)
    taken = [(one["container_type"], one["bit_width"]) for one in _report(folder, "phv.json")["containers"]]
    for kind, name in _CONTAINERS.items():
        for group in report["phv_containers"][kind]:
            used[f"{name}, {group['width']} bits"] = (taken.count((kind, group["width"])), group["units"])
    return used


def _report(folder: Path, name: str) -> Any:
    found = next(iter(sorted(folder.rglob(name))), None)
    if found is None:
        raise FileNotFoundError(f"{folder} has no {name}, which p4c-barefoot writes with -g")
    return json.loads(found.read_text())
