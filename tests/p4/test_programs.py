"""The P4 programs: what is shipped is what the sources compile to, and the headers are those of the packet table."""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from trainkit.p4 import _description, _entries, _pipeline, _resources
from trainkit.p4.deploy import DISPOSITIONS
from trainkit.switchml import _packet as packet

P4 = ROOT / "p4"
HEADERS = (P4 / "headers.p4").read_text()


def fields(header: str, text: str = HEADERS) -> list[tuple[str, int]]:
    """Name and width of a header's fields."""
    body = re.search(rf"header {header} \{{(.*?)\n\}}", text, re.DOTALL)
    assert body is not None
    return [(name, int(bits)) for bits, name in re.findall(r"bit<(\d+)> (\w+);", body[1])]


def constant(name: str, text: str = HEADERS) -> int:
    """Value of a constant."""
    found = re.search(rf"const \S+ {name} = (\w+);", text)
    assert found is not None
    return int(found[1], 0)


def test_header_is_the_packet_table() -> None:
    assert fields("switchml_t") == [(field.name, field.bits) for field in packet.HEADER]
    assert fields("bitmap_t") == [("seen", 64)]
    assert fields("block_t", (P4 / "block.p4").read_text()) == [(f"e{place}", 32) for place in range(32)]


def test_constants_are_the_packet_tables() -> None:
    said = {
        "SWITCHML_PORT": packet.DEFAULT_PORT, "SWITCHML_MAGIC": packet.MAGIC, "FROM_SWITCH": packet.FROM_SWITCH,
        "DATA": packet.Kind.DATA, "RESULT": packet.Kind.RESULT, "PROGRESS": packet.Kind.PROGRESS,
        "CONTROL": packet.Kind.CONTROL, "WIRE_INT32": packet.UP_BYTES["int32"],
        "LENGTH_EMPTY": 8 + packet.HEADER_BYTES, "LENGTH_PROGRESS": 16 + packet.HEADER_BYTES,
        "LENGTH_64": 8 + packet.HEADER_BYTES + 256, "LENGTH_256": 8 + packet.HEADER_BYTES + 1024,
    }  # fmt: skip
    assert {name: constant(name) for name in said} == said
    assert packet.CORE.elements == (64, 256) and packet.CORE.workers == 32


@pytest.mark.parametrize("name", ["bmv2_block.p4", "tofino/tofino_parser.p4"])
def test_control_plane_and_programs_agree_on_sizes(name: str) -> None:
    parser = (P4 / name.replace("bmv2_block", "parser")).read_text()
    assert constant("VERSIONS", (P4 / name).read_text()) == _description.VERSIONS
    assert constant("FLOOD_GROUP", parser) == _entries.FLOOD_GROUP
    assert constant("CPU_PORT", (P4 / "parser.p4").read_text()) == _description.PORTS
    fates = re.search(r"enum bit<8> fate_t \{(.*?)\n\}", (P4 / "parser.p4").read_text(), re.DOTALL)
    assert fates is not None
    assert len(re.findall(r"^    \w+ = \d", fates[1], re.MULTILINE)) == len(DISPOSITIONS)


def test_repeated_lines_are_what_the_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("generate", P4 / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for name, write in generate.FILES.items():
        assert (P4 / name).read_text() == write(), f"{name} is not what generate.py writes: run python p4/generate.py"


def test_artefacts_are_of_these_sources() -> None:
    assert _pipeline.HASH.read_text().strip() == _pipeline.source_hash(), "stale: run trainkit p4 compile"
    info, program = _pipeline.P4INFO.read_text(), _pipeline.JSON.read_text()
    for table in (*_entries.STATIC, *_entries.DYNAMIC):
        assert f'alias: "{table}"' in info
    assert '"actions"' in program and "/" not in re.sub(r"[^/]*\.p4", "", program.split('"filename"', 1)[-1][:200])


def test_the_folder_reads_the_packet_table_and_nothing_else_of_the_engines() -> None:
    for path in P4.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trainkit."):
                own = node.module.startswith("trainkit.p4")  # type: ignore[union-attr]
                assert own or node.module == "trainkit.switchml._packet", f"{path.name} imports {node.module}"


@pytest.mark.p4
def test_shipped_artefacts_are_what_the_compiler_writes(tmp_path: Path) -> None:
    _pipeline.compile_bmv2(tmp_path)  # raises at a warning
    assert (tmp_path / _pipeline.P4INFO.name).read_text() == _pipeline.P4INFO.read_text()
    assert (tmp_path / _pipeline.HASH.name).read_text() == _pipeline.HASH.read_text()


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(_pipeline.CompileError, match="p4c-bm2-ss is not on PATH"):
        _pipeline.compile_bmv2(tmp_path)


def test_a_warning_of_the_compiler_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "p4c-bm2-ss"
    fake.write_text("#!/bin/sh\necho 'warning: unused' >&2\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(_pipeline.CompileError, match="warning: unused"):
        _pipeline.compile_bmv2(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("program", ["switchml.p4", "tofino/switchml_tna.p4"])
def test_p4test_accepts(program: str) -> None:
    p4test = shutil.which("p4test")
    if p4test is None:
        pytest.skip("needs p4test on PATH")
    flags = ["-I", str(P4), "--Werror"]
    if "tofino" in program:
        found = [*Path(p4test).resolve().parents[1].rglob("tna.p4")]
        if not found:
            pytest.skip("needs tna.p4 of p4c's Tofino backend beside p4test")
        flags += ["-I", str(found[0].parent), "-I", str(P4 / "tofino"), "-D__TARGET_TOFINO__=1"]
    done = subprocess.run([p4test, *flags, str(P4 / program)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tofino_program_compiles_and_fits(tmp_path: Path) -> None:
    if shutil.which("p4c-barefoot") is None or shutil.which("bfas") is None:
        pytest.skip("needs p4c-barefoot and bfas on PATH")
    used = _resources.resources(_pipeline.compile_tofino(tmp_path, seconds=800))
    assert all(0 <= taken <= there for taken, there in used.values())
    assert used["stages"][1] == 12
    assert used["stateful ALUs"][0] > 32  # a register for each integer of a block, and those of the slots


def test_what_a_program_takes_is_read_from_the_compilers_reports(tmp_path: Path) -> None:
    stage = {
        "logical_tables": {"size": 16, "ids": [{"id": 0}, {"id": 3}]},
        "meter_alus": {"nAlus": 4, "meters": [{"row": 1}, {"row": 3}, {"row": 5}]},
        "rams": {"nRows": 8, "nColumns": 10, "srams": [{"row": 0}]},
        "map_rams": {"nRows": 8, "nUnits": 6, "maprams": []},
        "tcams": {"nRows": 12, "nColumns": 2, "tcams": [{"row": 0}, {"row": 1}]},
    }
    empty = json.loads(json.dumps(stage))
    for part, units in (("logical_tables", "ids"), ("meter_alus", "meters"), ("rams", "srams"), ("tcams", "tcams")):
        empty[part][units] = []
    normal = [{"width": 8, "units": 64}, {"width": 32, "units": 64}]
    there = {"normal": normal, "tagalong": [{"width": 32, "units": 32}]}
    report = {"resources": {"mau": {"nStages": 12, "mau_stages": [stage, empty]}, "phv_containers": there}}
    taken = [{"container_type": "normal", "bit_width": 32}] * 5 + [{"container_type": "tagalong", "bit_width": 32}]
    with pytest.raises(FileNotFoundError, match=r"no resources\.json.*-g"):
        _resources.resources(tmp_path)
    (tmp_path / "pipe" / "logs").mkdir(parents=True)
    (tmp_path / "pipe" / "logs" / "resources.json").write_text(json.dumps(report))
    (tmp_path / "pipe" / "logs" / "phv.json").write_text(json.dumps({"containers": taken}))
    assert _resources.resources(tmp_path) == {
        "stages": (1, 12), "stateful ALUs": (3, 48), "SRAMs": (1, 960), "map RAMs": (0, 576), "TCAMs": (2, 288),
        "logical tables": (2, 192), "PHV, 8 bits": (0, 64), "PHV, 32 bits": (5, 64), "tagalong PHV, 32 bits": (1, 32),
    }  # fmt: skip


def test_an_assembler_that_leaves_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("p4c-barefoot", "bfas"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 0\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(_pipeline.CompileError, match=r"left no tofino\.bin"):
        _pipeline.compile_tofino(tmp_path / "out")


def test_a_compiler_that_loses_the_parsers_conditions_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    lost = "parser ingress:\\n  match: [ ctr_neg, ctr_zero ]\\n    *:\\n      next: end\\n"
    (tmp_path / "p4c-barefoot").write_text(f"#!/bin/sh\nprintf '{lost}' > {out}/switchml_tna.bfa\n")
    (tmp_path / "bfas").write_text(f"#!/bin/sh\n: > {out}/tofino.bin\n")
    for name in ("p4c-barefoot", "bfas"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(_pipeline.CompileError, match="left every condition of the parser out"):
        _pipeline.compile_tofino(out)
    assert not (out / "tofino.bin").exists()
    (tmp_path / "p4c-barefoot").write_text(
        f"#!/bin/sh\nprintf 'parser ingress:\\n match: [ byte1 ]\\n 0x03:\\n' > {out}/switchml_tna.bfa\n"
    )
    assert _pipeline.compile_tofino(out) == out


def test_the_extra_beside_the_core_has_no_conflict() -> None:
    if importlib.util.find_spec("p4runtime_sh") is None:
        pytest.skip("needs the extra p4")
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
