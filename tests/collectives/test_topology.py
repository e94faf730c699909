"""Networks: what is accepted, what is refused and with which words, and the named fabrics."""

import json
import os
from fractions import Fraction
from pathlib import Path

import pytest
from paths import DATA

from trainkit.collectives import Topology, TopologyError, allreduce_forest, optimum
from trainkit.collectives import fabrics as fb

CASES = {case["name"]: case for case in json.loads((DATA / "forest_cases.json").read_text())}


def network(**change: object) -> dict[str, object]:
    data: dict[str, object] = {
        "name": "pair",
        "nodes": ["a", "b", "s"],
        "compute_nodes": ["a", "b"],
        "links": [["a", "s", 3], ["s", "a", 3], ["b", "s", 3], ["s", "b", 3]],
    }
    return {key: value for key, value in (data | change).items() if value is not ...}


def links_with(*link: object) -> list[list[object]]:
    return [*network()["links"], list(link)]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"links": links_with("a", "b", 0)}, "must be positive, got 0"),
        ({"links": links_with("a", "b", -4)}, "must be positive, got -4"),
        ({"links": links_with("a", "b", 2.5)}, 'decimal string such as "12.5", got 2.5'),
        ({"links": links_with("a", "b", True)}, "got True"),
        ({"links": links_with("a", "b", "fast")}, "got 'fast'"),
        ({"links": links_with("a", "x", 1)}, "names 'x', which is not among the nodes"),
        ({"links": links_with("a", "a", 1)}, "self-loop"),
        ({"links": links_with("a", "b")}, r"\[from, to, capacity\]"),
        ({"links": [["a", "s", 3], ["s", "b", 3], ["b", "s", 3]]}, "'a' has no in-links"),
        ({"links": [["s", "a", 3], ["s", "b", 3], ["b", "s", 3]]}, "'a' has no out-links"),
        ({"links": links_with("a", "b", "0.00000000000000001")}, "53 bits"),
        ({"compute_nodes": ["a", "z"]}, "'z' is not among the nodes"),
        ({"compute_nodes": ["a"]}, "at least 2 compute nodes, got 1"),
        ({"nodes": ["a", "b", "s", "a"]}, "'a' appears 2 times"),
        ({"nodes": ["a", "b", "s", 4]}, "got 4"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"links": ...}, "key 'links' is missing"),
        ({"unit": "furlong"}, "unit must be one of"),
        ({"latency": {"a->b": 1e-6}}, "'a' -> 'b' is none"),
        ({"latency": {"a-s": 1e-6}}, '"from->to"'),
        ({"latency": {"a->s": -1}}, "seconds >= 0, got -1"),
        ({"multicast": ["a"]}, "'a' is a compute node"),
        ({"aggregate": ["t"]}, "'t' is unknown"),
        ({"aggregate": [["s"]]}, r"\['s'\] is unknown"),
        ({"name": 5}, "the name of a network is text, got 5"),
        ({"nodes": 5}, "nodes must be a list, got 5"),
        ({"links": None}, "links must be a list, got None"),
        ({"links": [5]}, r"\[from, to, capacity\], got 5"),
        ({"links": [[["a"], "b", 1]]}, r"names \['a'\], which is not"),
        ({"unit": ["GB/s"]}, "unit must be one of"),
        ({"latency": []}, r"latency must be an object, got \[\]"),
        ({"latency": {"a->s": "soon"}}, "seconds >= 0, got 'soon'"),
        ({"devices": ["a"]}, r"devices must be an object, got \['a'\]"),
    ],
)
def test_refusals_state_the_rule(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Topology.from_dict(network(**change))


def test_disconnected_halves_are_named() -> None:
    nodes = list("abcd")
    links = [["a", "b", 1], ["b", "a", 1], ["c", "d", 1], ["d", "c", 1]]
    with pytest.raises(TopologyError, match="disconnected: compute node 'c' cannot be reached from 'a'"):
        Topology.from_dict({"name": "halves", "nodes": nodes, "compute_nodes": nodes, "links": links})
    with pytest.raises(TopologyError, match="'c' cannot reach 'a'"):
        Topology.from_dict(
            {"name": "one way", "nodes": nodes, "compute_nodes": nodes, "links": [*links, ["a", "c", 1]]}
        )


def test_decimal_capacities_scale_exactly(tmp_path: Path) -> None:
    path = tmp_path / "net.json"
    path.write_text(json.dumps(network(links=[["a", "b", "12.5"], ["b", "a", "0.1"]], unit="GB/s")))
    pair = Topology.load(path)
    assert pair.links == (("a", "b", Fraction(25, 2)), ("b", "a", Fraction(1, 10)))
    assert optimum(pair).inv_rate == 10
    # A number with a point in the file is read by its digits, never as a float.
    path.write_text(json.dumps(network()).replace('["a", "s", 3]', '["a", "s", 0.3]'))
    assert Topology.load(path).links[0][2] == Fraction(3, 10)


def test_round_trip_keeps_everything(tmp_path: Path) -> None:
    data = network(
        links=[["a", "s", "1.25"], ["s", "a", 3], ["b", "s", 3], ["s", "b", 3]],
        unit="Mbit/s",
        latency={"a->s": 1e-6},
        multicast=["s"],
        aggregate=["s"],
        confidence={"a->s": 0.9},
        devices={"a": "10.0.0.1"},
    )
    once = Topology.from_dict(data)
    assert once.to_dict() == data
    once.save(tmp_path / "net.json")
    assert Topology.load(tmp_path / "net.json") == once


def test_parallel_links_add_up_and_transposition_swaps_roles() -> None:
    twice = Topology.from_dict(network(links=links_with("a", "s", 2), multicast=["s"]))
    assert dict(((u, v), c) for u, v, c in twice.links)["a", "s"] == 5
    assert twice.transposed().aggregate == {"s"}
    assert twice.transposed().transposed() == twice
    with pytest.raises(TopologyError, match="not a link"):
        twice.with_links({("a", "b"): 1})


def test_not_json_is_said(tmp_path: Path) -> None:
    (tmp_path / "net.json").write_text("{")
    with pytest.raises(TopologyError, match="not JSON"):
        Topology.load(tmp_path / "net.json")


@pytest.mark.parametrize(
    ("name", "fabric"),
    [
        ("bi_ring8", fb.ring(8)),
        ("uni_ring8", fb.ring(8, both_ways=False)),
        ("star8_switch", fb.star([1] * 8)),
        ("star8_one_slow", fb.star([25] + [100] * 7)),
        ("mesh3x3", fb.mesh([3, 3])),
        ("torus4x4", fb.torus([4, 4])),
        ("hypercube3", fb.hypercube(3)),
        ("kautz_d2_n12_unidir", fb.kautz(2, 2)),
        ("dgx_a100_1x8", fb.dgx_a100(1)),
        ("dgx_a100_2x8", fb.dgx_a100(2)),
        ("dgx_a100_8x8_64", fb.dgx_a100(8)),
        ("dgx_h100_2x8", fb.dgx_h100(2)),
        ("dgx_h100_16x8_128", fb.dgx_h100(16)),
        ("mi250_1x16", fb.mi250(1)),
        ("mi250_2x16", fb.mi250(2)),
        ("emu_E1_two_islands_2x4_200_25", fb.boxes(2, 4, inside=200, uplink=25)),
    ],
)
def test_fabrics_are_the_cases(name: str, fabric: Topology) -> None:
    case = CASES[name]
    assert len(fabric.compute_nodes) == len(case["compute_nodes"])
    assert sorted(c for _, _, c in fabric.links) == sorted(Fraction(c) for _, _, c in case["links"])
    assert optimum(fabric).inv_rate == Fraction(case["inv_x_star"])


def test_oversubscription_and_dragonfly() -> None:
    # All hosts of a leaf must be heard through a spine link of half their rate.
    tree = fb.fat_tree(4, 4, uplink=10, oversubscription=8)
    assert optimum(tree).inv_rate == Fraction(12, 5)
    with pytest.raises(ValueError, match="do not divide"):
        fb.fat_tree(4, 3, uplink=10, oversubscription=4)
    fly = fb.dragonfly(5, 2, 2)
    crossing = [(u, v) for u, v, _ in fly.links if u[0] == v[0] == "r" and u[1] != v[1]]
    assert len(crossing) == 5 * 4 and len(set(crossing)) == len(crossing)
    fly.draw()


SMI_H100 = """
        GPU0    GPU1    GPU2    GPU3    NIC0    NIC1    CPU Affinity    NUMA Affinity   GPU NUMA ID
GPU0     X      NV18    NV18    NV18    PIX     SYS     0-47    0               N/A
GPU1    NV18     X      NV18    NV18    PIX     SYS     0-47    0               N/A
GPU2    NV18    NV18     X      NV18    SYS     PIX     48-95   1               N/A
GPU3    NV18    NV18    NV18     X      SYS     PIX     48-95   1               N/A
NIC0    PIX     PIX     SYS     SYS      X      SYS
NIC1    SYS     SYS     PIX     PIX     SYS      X

Legend:

  X    = Self
  NV#  = Connection traversing a bonded set of # NVLinks

NIC Legend:

  NIC0: mlx5_0
"""


def test_nvidia_smi_matrix() -> None:
    box = fb.from_nvidia_smi(SMI_H100)
    assert box.switches == ("NVSwitch",)
    assert {c for _, _, c in box.links} == {450}
    two = fb.from_nvidia_smi(SMI_H100, count=2)
    # Two GPUs share each 50 GB/s adapter: 4 GPUs leave a box over 100 GB/s.
    assert optimum(two).inv_rate == Fraction(4, 100)
    thin = SMI_H100.replace("NV18", "NV4 ")
    meshed = thin.replace("GPU0     X      NV4     NV4 ", "GPU0     X      NV4     NV2 ").replace(
        "GPU2    NV4     NV4      X", "GPU2    NV2     NV4      X"
    )
    direct = fb.from_nvidia_smi(meshed)
    assert not direct.switches
    assert ("GPU0", "GPU2", Fraction(50)) in direct.links
    with pytest.raises(TopologyError, match="not the output"):
        fb.from_nvidia_smi("nothing here")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "net.json"
    old = fb.star([1, 2], unit="GB/s")
    old.save(file)

    def full(file: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        fb.star([3, 4, 5], unit="GB/s").save(file)
    assert Topology.load(file) == old
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deep"),
        ('{"a": ' * 100_000, "nested too deep"),
        (
            '{"name": "n", "nodes": ["a", "b"], "nodes": ["c"], "compute_nodes": [], "links": []}',
            "'nodes' is there twice",
        ),
        ('{"name": "n", "nodes": "ab", "compute_nodes": ["a", "b"], "links": []}', "nodes must be a list, got 'ab'"),
        ('{"name": "n", "nodes": ["a", "b"], "compute_nodes": "ab", "links": []}', "compute_nodes must be a list"),
        ('{"name": "n", "nodes": ["a", "b"], "compute_nodes": ["a", "b"], "links": "abc"}', "links must be a list"),
        (
            '{"name": "n", "nodes": ["a", "b"], "compute_nodes": ["a", "b"], "links": ["ab1"]}',
            "a link is .*, got 'ab1'",
        ),
        (
            '{"name": "n", "nodes": ["a", "b", "s"], "compute_nodes": ["a", "b"], "links": [], "multicast": "s"}',
            "multicast must be a list of switches, got 's'",
        ),
    ],
)
def test_files_that_mean_something_else(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "net.json").write_text(text)
    with pytest.raises(TopologyError, match=words):
        Topology.load(tmp_path / "net.json")


def test_pictures_say_what_is_in_them() -> None:
    network = fb.boxes(2, 4, inside=200, uplink=25, unit="Mbit/s")
    words = [text.get_text() for text in network.draw().axes[0].get_legend().get_texts()]
    assert words == ["compute node", "switch", "200 Mbit/s", "25 Mbit/s"]
    both = allreduce_forest(network)
    figure = both.draw({network.links[0][:2]})
    titles = [axes.get_title() for axes in figure.axes]
    assert any(title.startswith("to g0_0") for title in titles) and any(title.startswith("from ") for title in titles)
    assert all("% of the message" in title for title in titles)
    said = figure.get_suptitle()
    assert "all-reduce, reduction" in said and "then broadcast" in said
    assert "bottleneck" in [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("written", ["9" * 5000, '"1e999999999999"', '"1E-9999999999"'])
def test_numbers_without_end_are_refused_at_once(tmp_path: Path, written: str) -> None:
    file = tmp_path / "network.json"
    links = f'[["a", "b", {written}], ["b", "a", 1]]'
    file.write_text('{"name": "n", "nodes": ["a", "b"], "compute_nodes": ["a", "b"], "links": ' + links + "}")
    with pytest.raises(TopologyError):
        Topology.load(file)
