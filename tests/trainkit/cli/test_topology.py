"""`trainkit topology find` and `show`, cabling lists, quantities with units."""

import csv
import json
from collections import Counter
from io import StringIO
from pathlib import Path

import pytest

from trainkit.cli import _quantities
from trainkit.cli._main import main
from trainkit.collectives import Schedule, named_topology


def test_find_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["topology", "find", "--nodes", "12", "--degree", "4", "--bytes", "1KiB..1GiB", "--json"]
    assert main([*words, "--state", str(tmp_path / "search.json")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["least_t_l"], said["least_t_b"], said["proven"]) == (2, "11/12", True)
    assert [(one["t_l"], one["t_b"], one["t_b_reverse"]) for one in said["topologies"]] == [(2, "11/12", "11/12")]
    assert [choice["bytes"] for choice in said["choices"]] == [4**power * 1024 for power in range(11)]
    assert said["choices"][0]["seconds"] == pytest.approx(4e-5, rel=0.01)
    assert named_topology(said["best"]).t_l == 2
    assert (tmp_path / "search.json").exists()


def test_find_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["topology", "find", "--nodes", "10", "--degree", "3", "--bidirectional"]) == 0
    said = capsys.readouterr().out
    assert "both bounds are met" in said
    assert "see it: trainkit topology show" in said


def test_show_writes_what_it_is_asked_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("\n".join(f"node{at:02}" for at in range(12)))
    files = {
        what: str(tmp_path / name) for what, name in (("draw", "a.svg"), ("cabling", "a.csv"), ("schedule", "a.json"))
    }
    flags = [word for what, file in files.items() for word in (f"--{what}", file)]
    assert main(["topology", "show", "torus(3, 4)", "--hosts", str(hosts), *flags, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["nodes"], said["degree"], said["links"], said["t_l"], said["t_b"]) == (12, 4, "two-way", 3, "11/12")
    assert "<svg" in Path(files["draw"]).read_text()
    assert Path(files["cabling"]).read_text().startswith("host,port,peer,peer_port\nnode00,0,node")
    schedule = Schedule.load(files["schedule"])
    schedule.verify()
    assert schedule.collective == "allreduce"
    seconds = said["allreduce_seconds"]["1 MiB"]
    assert float(schedule.time(2**20, 1e-5)) == pytest.approx(seconds)


def test_show_as_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["topology", "show", "kautz(2, 6)", "--draw", str(tmp_path / "a.png")]) == 0
    said = capsys.readouterr().out
    assert "6 x 2, one-way links" in said
    assert "written: " in said


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["find", "--nodes", "9", "--degree", "3", "--bidirectional"], "odd number of ports"),
        (["find", "--nodes", "1", "--degree", "3"], "at least 2 hosts"),
        (
            ["find", "--nodes", "8", "--degree", "2", "--alpha", "10"],
            "a latency is a number and one of s, ms, us, ns, got '10'",
        ),
        (["find", "--nodes", "8", "--degree", "2", "--bandwidth", "fast"], "a bandwidth is a number"),
        (["find", "--nodes", "8", "--degree", "2", "--bytes", "1GiB..1KiB"], "from small to large"),
        (["show", "moebius(4)"], "no topology 'moebius'"),
        (["show", "torus(2, 3)", "--collective", "gather", "--schedule", "x.json"], "got 'gather'"),
        (["show", "torus(2, 3)", "--max-chunks", "0"], "max_chunks=0"),
    ],
)
def test_refused_input_is_one_line(
    words: list[str], what: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["topology", *words]) == 2
    said = capsys.readouterr().err
    assert what in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_hosts_must_be_as_many_as_the_topology_has() -> None:
    with pytest.raises(ValueError, match="has 6 hosts, got 2 names"):
        named_topology("torus(2, 3)").cabling_csv(["a", "b"])


@pytest.mark.parametrize(
    "name", ["torus(2, 3)", "biring(4, 5)", "kautz(4, 12)", "uniring(3, 4)", "cayley(metacyclic(4, 2, 3, 2), 1, 2)"]
)
def test_every_port_has_one_cable(name: str) -> None:
    one = named_topology(name)
    graph = one.bfb.digraph
    cables = one.cables()
    links = Counter(pair for pair in graph.pairs() if pair[0] != pair[1])
    if graph.symmetric:
        assert Counter(pair for c in cables for pair in ((c.host, c.peer), (c.peer, c.host))) == links
        used = [end for c in cables for end in ((c.host, c.port), (c.peer, c.peer_port))]
        assert len(set(used)) == len(used)
    else:
        assert Counter((c.host, c.peer) for c in cables) == links
        for ends in ([(c.host, c.port) for c in cables], [(c.peer, c.peer_port) for c in cables]):
            assert len(set(ends)) == len(ends)
    assert all(max(c.port, c.peer_port) < one.bfb.degree for c in cables)
    rows = list(csv.reader(StringIO(one.cabling_csv())))
    assert [tuple(map(int, row)) for row in rows[1:]] == [tuple(cable) for cable in cables]


def test_quantities() -> None:
    assert _quantities.seconds("10us") == pytest.approx(1e-5)
    assert _quantities.seconds(" 1.5 ms ") == pytest.approx(1.5e-3)
    assert _quantities.bytes_per_second("100Gbps") == pytest.approx(12.5e9)
    assert _quantities.bytes_per_second("12.5GB/s") == pytest.approx(12.5e9)
    assert _quantities.sizes("64MiB") == [64 * 2**20]
    assert _quantities.sizes("1KB..20KB") == [1000, 4000, 16000]
    assert [_quantities.size_text(size) for size in (1000, 1024, 3 * 2**30)] == ["1000 B", "1 KiB", "3 GiB"]
    assert [_quantities.time_text(value) for value in (2.0, 0.0031, 4.2e-5, 3e-9)] == ["2 s", "3.1 ms", "42 us", "3 ns"]
    for text in ("..", "1.2.3s", "5", "KiB", "1KiB..2KiB..3KiB", "0B"):
        with pytest.raises(ValueError, match="got"):
            _quantities.sizes(text)
