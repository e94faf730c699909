"""Machines as their own tools print them: the right network, or an error that names the cell."""

from fractions import Fraction
from pathlib import Path

import pytest
from paths import DATA

from trainkit.cli import main
from trainkit.collectives import TopologyError, optimum
from trainkit.collectives.fabrics import from_ibnetdiscover, from_nvidia_smi, from_rocm_smi, from_slurm, read_network

MACHINES = DATA / "machines"

# text -> (machines, shares over GB/s at the narrowest place by hand, which place)
RIGHT = {
    "h100_nv18_9nics": (2, Fraction(15, 450 + 50), "a GPU hears of fifteen over NVSwitch and its slot"),
    "dgx2_nv6_mlx5": (2, None, ""),
    "pcie8_no_nic": (1, Fraction(7, 25), "a GPU hears of seven over its one slot"),
    "dgx1_mixed": (2, None, ""),
    "bridged_pairs_4": (1, Fraction(2, 50), "a pair's two slots"),
    "bridged_pairs_8_nic": (2, None, ""),
    "mesh4_nv6": (1, Fraction(3, 3 * 150), "three bundles of six links of 25"),
    "mesh4_nv4": (1, Fraction(3, 3 * 100), "three bundles of four"),
    "odd3_pcie": (1, Fraction(2, 25), "a slot"),
    "two_nv3": (1, Fraction(1, 75), "three links"),
    "one_gpu_nic": (4, Fraction(3, 25), "a slot, not slot and adapter"),
    "bond_nic": (2, None, ""),
    "roce_names": (2, None, ""),
    "spaces": (2, Fraction(8, 2 * 50), "two adapters between boxes"),
    "ansi": (1, Fraction(1, 100), "four links"),
    "ansi_lost": (1, Fraction(1, 100), "four links"),
    "prompt_before": (1, Fraction(3, 25), "a slot"),
    "soc_old": (1, Fraction(3, 25), "a slot"),
    "glued_cells": (1, Fraction(3, 300), "twelve links to a switch: 36 are more than a GPU has"),
    "asym_pair_counts": (1, Fraction(3, 4 * 25), "four links of 25"),
    "sys_only_two_numa_2box": (2, Fraction(7, 25), "a slot, not slot and adapter"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_nvidia_smi_texts(name: str) -> None:
    count, rate, _ = RIGHT[name]
    network = read_network(MACHINES / f"{name}.txt", machines=count)
    best = optimum(network)
    assert best.exact
    if rate is not None:
        assert best.inv_rate == rate
    # Whatever a GPU does over PCIe passes one slot.
    for gpu in network.compute_nodes:
        slots = [v for u, v, _ in network.links if u == gpu and "GPU" not in v and "NVSwitch" not in v]
        assert len(slots) <= 1


def test_every_text_plans_or_names_its_cell(capsys: pytest.CaptureFixture[str]) -> None:
    for path in sorted(MACHINES.glob("*.txt")):
        count = RIGHT.get(path.stem, (1, None, ""))[0]
        code = main(["plan", "--topology", str(path), "--machines", str(count), "--collective", "allgather"])
        said = capsys.readouterr()
        if path.stem in RIGHT:
            assert code == 0 and "bandwidth" in said.out
        else:
            assert code != 0 and said.err
            assert path.stem == "one_gpu" or "row GPU0, column GPU1 says 'NV#'" in said.err
    assert {p.stem for p in MACHINES.glob("*.txt")} - set(RIGHT) == {"one_gpu", "err_nvlink_off"}


def test_the_networks_behind_some() -> None:
    mesh = read_network(MACHINES / "mesh4_nv6.txt")
    assert not mesh.switches and ("GPU0", "GPU3", Fraction(150)) in mesh.links
    pairs = read_network(MACHINES / "bridged_pairs_4.txt")
    assert ("GPU0", "GPU2", Fraction(100)) in pairs.links
    assert ("GPU0", "host bridge 0", Fraction(25)) in pairs.links
    bond = read_network(MACHINES / "bond_nic.txt", machines=2)
    assert {"0.mlx5_0", "0.mlx5_bond_0", "0.mlx5_1", "0.mlx5_2"} >= {s for s in bond.switches if s.startswith("0.mlx")}
    assert "0.rocep80s0" in read_network(MACHINES / "roce_names.txt", machines=2).nodes
    # GPUs of a fifth-generation slot, and each adapter at the GPU that it is next to.
    h100 = read_network(MACHINES / "h100_nv18_9nics.txt", machines=2)
    assert "0.NIC0" not in h100.nodes and ("0.GPU0", "0.PCIe switch 0", Fraction(50)) in h100.links


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("GPU2\tNV6\tNV6", "GPU2\tNV6\tNVX", "row GPU2, column GPU1 must be X, NV4, PIX, .* got 'NVX'"),
        ("GPU2\tNV6\tNV6", "GPU2\tNV6\tNV5", "row GPU1, column GPU2 says 'NV6', row GPU2, column GPU1 'NV5'"),
        ("GPU0\t X \tNV6", "GPU0\tNV6\tNV6", "row GPU0, column GPU0 says 'NV6': only a device and itself are X"),
        ("NV6", "NV9", "pass"),
    ],
)
def test_cells_that_say_nothing_are_named(old: str, new: str, words: str) -> None:
    text = (MACHINES / "mesh4_nv6.txt").read_text()
    assert old in text
    if words == "pass":
        # Three times nine links are more than a GPU has: a switch.
        assert from_nvidia_smi(text.replace(old, new)).switches == ("NVSwitch",)
        return
    with pytest.raises(TopologyError, match=words):
        from_nvidia_smi(text.replace(old, new))


def test_more_links_than_a_gpu_has_must_be_a_switch() -> None:
    text = (MACHINES / "mesh4_nv6.txt").read_text().replace("NV6", "NV12")
    odd = text.replace("GPU0\t X \tNV12", "GPU0\t X \tNV4").replace("GPU1\tNV12", "GPU1\tNV4")
    with pytest.raises(
        TopologyError, match=r"row GPU0 counts 28 NVLinks, a GPU has at most 18: .* row GPU0, column GPU1"
    ):
        from_nvidia_smi(odd)
    cut = "\n".join(line for line in text.splitlines() if not line.startswith("GPU3"))
    with pytest.raises(TopologyError, match="row GPU3 has no cell for GPU3"):
        from_nvidia_smi(cut)


def test_rocm_smi() -> None:
    ring = read_network(MACHINES / "rocm_ring4.out")
    assert sorted(v for u, v, _ in ring.links if u == "GPU0") == ["GPU1", "GPU3"]
    assert {rate for _, _, rate in ring.links} == {50}
    rated = read_network(MACHINES / "rocm_ring4_rates.out")
    assert {(u, v): rate for u, v, rate in rated.links if u == "GPU0"} == {("GPU0", "GPU1"): 200, ("GPU0", "GPU3"): 50}
    slots = read_network(MACHINES / "rocm_pcie4.out")
    assert optimum(slots).inv_rate == max(Fraction(3, 25), Fraction(2, 20))
    text = (MACHINES / "rocm_ring4.out").read_text()
    with pytest.raises(TopologyError, match="row GPU1, column GPU0: a link is XGMI or PCIE"):
        from_rocm_smi(text.replace("GPU1   XGMI", "GPU1   WHAT"))
    with pytest.raises(TopologyError, match="not the output of `rocm-smi --showtopo`"):
        from_rocm_smi("Hops between two GPUs\n")


@pytest.mark.parametrize("name", ["topology.conf", "topology.yaml"])
def test_slurm_trees(name: str) -> None:
    network = from_slurm((MACHINES / name).read_text(), nic=10)
    assert network.compute_nodes == ("n00", "n01", "n02", "n07", "m1", "m2")
    assert ("leaf0", "spine", Fraction(40)) in network.links and ("m1", "leaf1", Fraction(10)) in network.links
    assert read_network(MACHINES / name).compute_nodes == network.compute_nodes
    thin = from_slurm((MACHINES / name).read_text(), nic=10, oversubscription=4)
    assert ("leaf0", "spine", Fraction(10)) in thin.links


@pytest.mark.parametrize("name", ["blocks.conf", "blocks.yaml"])
def test_slurm_blocks(name: str) -> None:
    network = read_network(MACHINES / name)
    assert network.compute_nodes == ("node01", "node02", "node03", "node04")
    assert set(network.switches) == {"b1", "b2", "core"}


def test_a_leaf_under_two_spines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match="switch 'leaf0' is below 'spine0' and below 'spine1'"):
        read_network(MACHINES / "two_spines.conf")
    with pytest.raises(TopologyError, match="host 'a' is below 'x' and below 'y'"):
        from_slurm("SwitchName=x Nodes=a,b\nSwitchName=y Nodes=a\n")
    with pytest.raises(TopologyError, match="each with its switch"):
        from_slurm("- topology: t\n  tree:\n    switches: [3]\n")


def test_ibnetdiscover() -> None:
    network = read_network(MACHINES / "ibnetdiscover.out")
    assert network.compute_nodes == ("h0", "h1", "h2") and network.unit == "Gbit/s"
    leaf, spine = network.switches
    rates = {(u, v): rate for u, v, rate in network.links}
    assert leaf.startswith("MF0") and rates["h0", leaf] == 400 and rates["h1", leaf] == 200
    assert rates[leaf, spine] == rates[spine, leaf] == 400 and rates[spine, "h2"] == 100
    text = (MACHINES / "ibnetdiscover.out").read_text()
    with pytest.raises(TopologyError, match="no width and speed such as 4xHDR"):
        from_ibnetdiscover(text.replace("lid 6 4xHDR", "lid 6"))
    with pytest.raises(TopologyError, match="leads to no device of the file"):
        from_ibnetdiscover(text.replace('[3]	"H-0002c9030002cad0"', '[3]	"H-0002c90300000000"'))
    with pytest.raises(TopologyError, match="fewer than two hosts"):
        from_ibnetdiscover("Switch 3")


def test_machines_are_made_of_a_matrix() -> None:
    with pytest.raises(TopologyError, match="2 machines are made of one machine's `nvidia-smi topo -m`"):
        read_network(MACHINES / "topology.conf", machines=2)
