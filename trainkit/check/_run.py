"""Which checks there are, and how one is run: in processes of its own, which a fault or a hang ends with them."""

import time
from dataclasses import dataclass
from pathlib import Path

from trainkit._processes import WorkerFailed, Workers

_GRACE_S = 2.0


@dataclass(frozen=True)
class Check:
    """One check: what it shows, in how many processes, and the parts that `trainkit doctor` must find for it."""

    shows: str
    processes: int
    needs: tuple[str, ...]


CHECKS = {
    "switch": Check("the software switch counts a packet that is none of its own", 1, ("switchml",)),
    "collectives": Check("the optimum of a star of four is its cut, and a forest meets it", 1, ("collectives",)),
    "switchml": Check("gradients through a switch on loopback are their fp64 mean", 2, ("torch", "switchml")),
    "forest": Check("gradients along a forest are their fp64 mean", 2, ("torch", "collectives")),
    "attention": Check("attention and its gradients are those of the formula in fp64", 1, ("torch",)),
    "autolrs": Check("the forecast of a curve meets the curve", 1, ("torch",)),
    "p4": Check("bmv2 holds what was deployed, and resets", 1, ("p4", "p4-lab")),
}
"""Name -> check, in the order in which they run."""


def check(name: str, folder: Path, timeout_s: float) -> tuple[str, float]:
    """Run one check.

    Args:
        name: of `CHECKS`.
        folder: for the logs of its processes.
        timeout_s: after which it has failed.

    Returns:
        Why it failed, "" where it passed; and the seconds that it took.
    """
    began = time.monotonic()
    logs = folder / name
    try:
        with Workers(
            "trainkit.check._work", {"check": name, "logs": str(logs)},
            count=CHECKS[name].processes, logs=logs, grace_s=_GRACE_S, shown=False,
        ) as workers:  # fmt: skip
            workers.wait(timeout_s)
    except WorkerFailed as error:
        return str(error), time.monotonic() - began
    return "", time.monotonic() - began
