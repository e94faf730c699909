"""Declared topologies, and what the driver says of GPUs."""

from fractions import Fraction
from pathlib import Path

import pytest

from trainkit.collectives._probe import Prior, PriorError, ProbeError, read_prior
from trainkit.collectives._probe import _devices as devices
from trainkit.collectives._probe._devices import inside, read_devices
from trainkit.collectives._probe._result import one_host

SLURM = """# two pods
SwitchName=r0 Nodes=n[00-02,07] LinkSpeed=1
switchname=r1 nodes=m1,m[2-3]x
SwitchName=spine Switches=r[0-1]
"""
TREE = "core:\n  pod0:\n    r0: [a, b]\n    r1: [c]\n  pod1:\n    r0: [d, e]\n"
MATRIX = """\tGPU0\tGPU1\tGPU2\tGPU3\tCPU Affinity
GPU0\t X \tNV18\tNV18\tNV18\t0-15
GPU1\tNV18\t X \tNV18\tNV18\t0-15
GPU2\tNV18\tNV18\t X \tNV18\t0-15
GPU3\tNV18\tNV18\tNV18\t X \t0-15
"""


def written(tmp_path: Path, text: str) -> Prior:
    path = tmp_path / "declared"
    path.write_text(text)
    return read_prior(path)


def test_slurm_switches(tmp_path: Path) -> None:
    prior = written(tmp_path, SLURM)
    assert prior.paths["n02"] == ("spine", "r0")
    assert set(prior.paths) == {"n00", "n01", "n02", "n07", "m1", "m2x", "m3x"}
    racks, top = prior.levels(["n07", "m1", "n00", "stranger"])
    assert racks.label == ["r0", "r1", "r0", None]
    assert top.label == ["spine", "spine", "spine", None]


def test_a_tree_whose_racks_have_the_same_name_in_two_pods(tmp_path: Path) -> None:
    racks, pods, _ = written(tmp_path, TREE).levels(["a.example.org", "b", "c", "d", "e"])
    assert racks.label == ["core/pod0/r0", "core/pod0/r0", "core/pod0/r1", "core/pod1/r0", "core/pod1/r0"]
    assert pods.label == ["pod0", "pod0", "pod0", "pod1", "pod1"]


def test_labels_of_a_cloud(tmp_path: Path) -> None:
    prior = written(tmp_path, "labels:\n  a: [nn-1, nn-2]\n  b: /nn-1/nn-3\n")
    assert prior.levels(["a", "b"])[0].label == ["nn-2", "nn-3"]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("core: {r0: [a], r1: [a]}", "'a' is in core/r0 and in core/r1"),
        ("- a\n- b", "must hold a mapping"),
        ("core: 3", "must be a mapping of groups or a list of hosts"),
        ("core: [[a]]", "must list names"),
        ("labels: {a: 3}", "labels of host 'a'"),
        ("a: [", "is not YAML"),
        ("SwitchName=a Nodes=n[3-]", "like 0-7, got '3-'"),
        ("SwitchName=a Nodes=n[0-99999999]", "like 0-7"),
        ("SwitchName=a Switches=b Nodes=x\nSwitchName=b Switches=a", "is above itself"),
    ],
)
def test_declarations_that_are_refused(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(PriorError, match=what):
        written(tmp_path, text)


def test_a_declaration_of_other_hosts(tmp_path: Path) -> None:
    with pytest.raises(PriorError, match=r"none of these hosts \(x, ...\): it has a, b, c"):
        written(tmp_path, TREE).levels(["x", "y"])


def test_gpus_hang_on_the_nvswitch_and_on_their_host() -> None:
    names, links = inside("h", 2, {"topology": MATRIX, "nvlink": 26_562, "pcie": 63_008}, None)
    assert names == ["h.GPU0", "h.GPU1"]
    rates = {(u, v): rate for u, v, rate in links}
    assert rates["h.GPU0", "h.NVSwitch"] == 18 * 16_468 * 8  # 62 % of it
    assert rates["h", "h.GPU1"] == 63_008 * 8
    assert not any("GPU3" in end for link in rates for end in link)


def test_one_host_alone_is_what_its_driver_says() -> None:
    network = one_host("h", 4, {"topology": MATRIX, "nvlink": 26_562})
    assert network.compute_nodes == tuple(f"h.GPU{i}" for i in range(4))
    assert set(network.switches) == {"h", "h.NVSwitch"}
    with pytest.raises(ProbeError, match="all 2 ranks are on host 'h', which has no GPUs"):
        one_host("h", 2, {})


def test_ranks_without_gpus_share_their_host_at_the_rate_of_its_loopback() -> None:
    assert inside("h", 1, {}, None) == (["h"], [])
    names, links = inside("h", 2, {}, 5e9)
    assert names == ["h.0", "h.1"]
    assert ("h.1", "h", Fraction(5000)) in links
    assert inside("h", 2, {"topology": "garbage", "pcie": "much"}, 5e9) == (names, links)


def test_the_driver_is_asked_for_links_and_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\ncase $1 in\n"
        f"topo) printf '{MATRIX}' ;;\n"
        "nvlink) printf 'GPU 0: H200\\n\\t Link 0: 26.562 GB/s\\n' ;;\n"
        "*) echo '5, 16' ;;\nesac\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    said = read_devices()
    assert said["topology"].startswith("\tGPU0")
    assert (said["nvlink"], said["pcie"]) == (26_562, 63_008)
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert read_devices() == {}
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    assert read_devices() == {}
