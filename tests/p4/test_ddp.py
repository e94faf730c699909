"""Training through bmv2, deployed and served by the command line's own verbs, ends in the software switch's bits."""

import importlib.util

import pytest
from paths import BENCHMARKS

pytest.importorskip("p4runtime_sh", reason="needs the extra p4")


@pytest.mark.p4
@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_20_steps_of_the_tiny_model_have_the_same_parameters_bit_for_bit() -> None:
    path = BENCHMARKS / "p4" / "run.py"
    spec = importlib.util.spec_from_file_location("p4_benchmark", path)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    hardware = benchmark.through_bmv2(64, 20)
    software = benchmark.through_software(64, 20)
    assert len({rank["digest"] for rank in (*hardware, *software)}) == 1
    assert all(rank["chunks"] > 0 for rank in hardware)
