"""Exported files, run by interpreters that know only the files."""

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import Any

import pytest
from paths import DATA

from trainkit.collectives import Topology, allreduce_forest, fabrics, forest
from trainkit.collectives.schedule import export
from trainkit.collectives.schedule.export import ExportError
from trainkit.collectives.trees import RUNTIMES, fit

CASES = json.loads((DATA / "forest_cases.json").read_text())


def network(case: dict[str, Any]) -> Topology:
    return Topology.from_dict({key: case[key] for key in ("name", "nodes", "compute_nodes", "links")})


@pytest.mark.parametrize("collective", ["allgather", "reduce_scatter", "allreduce"])
@pytest.mark.parametrize("runtime", sorted(RUNTIMES))
@pytest.mark.parametrize("case", [c for c in CASES if len(c["compute_nodes"]) <= 12], ids=lambda case: case["name"])
def test_small_cases_fit(case: dict[str, Any], runtime: Any, collective: str) -> None:
    fitted = fit(network(case), collective, runtime)
    assert fitted.loss >= 0
    if case["name"] != "exactness_K6_caps_1e7":
        assert fitted.loss == 0
    if collective == "allreduce":
        fitted.schedule.verify()


def test_two_dgx_a100_allreduce_with_one_tree_fits_msccl() -> None:
    schedule = allreduce_forest(fabrics.dgx_a100(2), trees_per_root=1).schedule()
    text = export.msccl_xml(schedule)
    assert text.count("<gpu ") == 16
    export.run_msccl(text)
    export.msccl_xml(schedule, channels=4)
    export.run_mscclpp(export.mscclpp_json(schedule))


# What the parsers' sources say: coll, steps, thread blocks; a count below 72, 4096 elements, 256 bytes for all.
PARSED = {
    "msccl": ("reduce_scatter", 256, 216),
    "azure": ("reducescatter", 64, 1024),
    "rccl": ("reducescatter", 64, 64),
}


def two_ways(fast: int, slow: int) -> Topology:
    pairs = [("a", "b", fast), ("b", "c", fast), ("a", "c", slow)]
    return Topology(
        "two ways", list("abc"), list("abc"), [link for u, v, c in pairs for link in ((u, v, c), (v, u, c))]
    )


@pytest.mark.parametrize("runtime", sorted(PARSED))
def test_each_parser_takes_its_file(runtime: str) -> None:
    word, steps, blocks = PARSED[runtime]
    odd = replace(fabrics.ring(4), name="a\"b<c>&'d " + "x" * 300 + "\n机架")
    schedules = [
        forest(odd, "reduce_scatter").schedule(),
        *(forest(two_ways(fast, 1)).schedule() for fast in (71, 72, 73, 144)),
        allreduce_forest(fabrics.ring(4)).schedule(8),
        fit(fabrics.dgx_a100(1), "allreduce", runtime).schedule,  # type: ignore[arg-type]
    ]
    for schedule in schedules:
        text = export.msccl_xml(schedule, runtime=runtime)
        algo = ET.fromstring(text)
        assert algo.attrib["coll"] == (word if schedule.collective == "reduce_scatter" else schedule.collective)
        assert int(algo.attrib["minBytes"]) == 0 and 2**40 < int(algo.attrib["maxBytes"]) < 2**63
        # The parsers decode no escapes, and copy a value into 256 bytes, MSCCL a name into 64.
        assert "&" not in text and text.isascii()
        assert all(len(value) < 256 for element in algo.iter() for value in element.attrib.values())
        assert len(algo.attrib["name"]) < 64
        for gpu in algo.iter("gpu"):
            assert 1 + len(algo) + sum(1 for _ in gpu.iter()) - 1 < 4096
            assert len(gpu) <= blocks
            assert all(int(step.attrib["s"]) < steps for step in gpu.iter("step"))
            assert all(0 < int(step.attrib["cnt"]) < 72 for step in gpu.iter("step") if step.attrib["type"] != "nop")
            assert all(int(step.attrib["depid"]) < 128 for step in gpu.iter("step"))  # kept in 8 bits


def test_more_than_a_parser_takes_is_refused() -> None:
    long = forest(fabrics.ring(8)).schedule(16)
    export.msccl_xml(long, runtime="msccl")
    for runtime, name in (("azure", "MSCCL's executor for NCCL"), ("rccl", "RCCL")):
        with pytest.raises(ExportError, match=f"{name} allows 64 steps per thread block, rank 0 would need 112"):
            export.msccl_xml(long, runtime=runtime)
    with pytest.raises(ExportError, match="MSCCL allows 4095 XML nodes for a rank, rank 0 would need"):
        export.msccl_xml(forest(fabrics.star([1] * 16)).schedule(150), runtime="msccl")
    with pytest.raises(ExportError, match="RCCL allows 64 thread blocks, rank 0 would need 94"):
        export.msccl_xml(forest(fabrics.star([1] * 48)).schedule(), runtime="rccl")
    with pytest.raises(ValueError, match="runtime must be one of msccl, azure, rccl, got 'nccl'"):
        export.msccl_xml(long, runtime="nccl")


def test_capacities_of_millions_lose_something_and_say_so() -> None:
    case = next(case for case in CASES if case["name"] == "exactness_K6_caps_1e7")
    fitted = fit(network(case), "allgather", "msccl")
    assert fitted.trees_per_root is not None and 0 < fitted.loss < 0.1


def test_limits_are_named() -> None:
    large = forest(fabrics.boxes(1, 64, inside=1, uplink=1)).schedule()
    with pytest.raises(ExportError, match="MSCCL allows 108 thread blocks, rank 0 would need 126"):
        export.msccl_xml(large)
    with pytest.raises(ExportError, match="MSCCL allows 108 thread blocks"):
        fit(fabrics.boxes(1, 64, inside=1, uplink=1), "allgather", "msccl")
    with pytest.raises(ExportError, match="at most 32 channels, 33 between each pair of 64 ranks need 132"):
        export.msccl_xml(large, channels=33)
    with pytest.raises(
        ExportError, match=r"MSCCL\+\+ allows 16 memory channels per thread block, rank 0 would need 79"
    ):
        export.mscclpp_json(forest(fabrics.star([1] * 80)).schedule(), ranks_per_machine=80)
    with pytest.raises(ExportError, match="not broadcast"):
        export.msccl_xml(forest(fabrics.star([1] * 4), "broadcast", root="0").schedule())
    with pytest.raises(ExportError, match="equal shards"):
        export.msccl_xml(forest(fabrics.star([1] * 4), weights={"0": 2}).schedule())


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('type="rrc"', 'type="r"', "wrong"),
        ('chan="0"', 'chan="7"', "wait in a circle|ends with"),
        ('type="s"', 'type="nop"', "wrong|race|wait in a circle"),
        ('depid="0" deps="0"', 'depid="-1" deps="-1"', "race"),
        ('cnt="1"', 'cnt="2"', "sends 1 chunks|sends 2 chunks|receives"),
    ],
)
def test_the_msccl_interpreter_reads_the_file(old: str, new: str, words: str) -> None:
    text = export.msccl_xml(allreduce_forest(fabrics.star([1] * 3)).schedule())
    assert old in text
    with pytest.raises(ExportError, match=words):
        export.run_msccl(text.replace(old, new, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [c for c in CASES if 12 < len(c["compute_nodes"]) <= 64], ids=lambda case: case["name"]
)
def test_larger_cases_fit(case: dict[str, Any]) -> None:
    for runtime in ("msccl", "mscclpp"):
        for collective in ("allgather", "allreduce"):
            assert fit(network(case), collective, runtime).loss < 0.05  # type: ignore[arg-type]
