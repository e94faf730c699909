"""Which forest a runtime with limits can take: the fastest that fits, and what it loses."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from trainkit.collectives._topology import Topology
from trainkit.collectives.schedule import Schedule
from trainkit.collectives.schedule.export import PARSERS, ExportError, msccl_xml, mscclpp_json
from trainkit.collectives.trees._allreduce import allreduce_forest
from trainkit.collectives.trees._capacity import fixed_share
from trainkit.collectives.trees._forest import forest
from trainkit.collectives.trees._multicast import choose_multicast
from trainkit.collectives.trees._problem import problem

Runtime = Literal["msccl", "azure", "rccl", "mscclpp"]


def _msccl(runtime: str) -> Callable[[Schedule], str]:
    """On as few channels as its thread blocks' steps fit."""

    def export(schedule: Schedule) -> str:
        for channels in (1, 2, 4):
            try:
                return msccl_xml(schedule, runtime=runtime, channels=channels)
            except ExportError as error:
                if "steps per thread block" not in str(error):
                    raise
        return msccl_xml(schedule, runtime=runtime, channels=8)

    return export


RUNTIMES: dict[str, Callable[[Schedule], str]] = {name: _msccl(name) for name in PARSERS} | {"mscclpp": mscclpp_json}
_MOST_TREES = 16  # trees per root tried: more do not fit, or gain next to nothing


@dataclass(frozen=True)
class Fit:
    """A forest for a runtime."""

    trees_per_root: int | None
    """What was asked of the forest; None stands for the optimum's own number."""
    loss: Fraction
    """Time over the optimum's, less 1."""
    schedule: Schedule
    """The schedule behind the file."""
    text: str
    """The file."""


def fit(topology: Topology, collective: str, runtime: Runtime) -> Fit:
    """The fastest forest that fits a runtime's limits.

    Args:
        topology: the network.
        collective: "allgather", "reduce_scatter" or "allreduce".
        runtime: "msccl", "azure", "rccl" or "mscclpp".

    Raises:
        ExportError: not even one tree per root fits; the message names the limit.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime must be one of {', '.join(RUNTIMES)}, got {runtime!r}")
    refusal: ExportError | None = None
    for k, loss, schedule in _candidates(topology, collective):
        try:
            return Fit(k, loss, schedule, RUNTIMES[runtime](schedule))
        except ExportError as error:
            refusal = error
    raise refusal or ExportError("no forest was tried")


def _candidates(topology: Topology, collective: str) -> Iterator[tuple[int | None, Fraction, Schedule]]:
    """(trees per root, loss, schedule), fastest first; trees are built only when asked for."""

    def made(k: int | None) -> tuple[Fraction, Schedule]:
        if collective == "allreduce":
            both = allreduce_forest(topology, trees_per_root=k)
            return both.time_per_byte, both.schedule()
        one = forest(topology, collective, trees_per_root=k)  # type: ignore[arg-type]
        return one.inv_rate / len(topology.compute_nodes), one.schedule()

    best, schedule = made(None)
    yield None, Fraction(0), schedule
    for k in sorted(range(1, _MOST_TREES + 1), key=lambda k: (_time(topology, collective, k), -k)):
        time, schedule = made(k)
        yield k, time / best - 1, schedule


def _time(topology: Topology, collective: str, k: int) -> Fraction:
    """Time per byte with k trees per root, without building them."""
    halves = ("allgather", "reduce_scatter") if collective == "allreduce" else (collective,)
    shares = [fixed_share(choose_multicast(problem(topology, half)), k) for half in halves]  # type: ignore[arg-type]
    return sum((share.unit for share in shares), Fraction(0)) / k
