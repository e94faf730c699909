"""The compiled programs: where they are, what they were compiled from, and how to compile them."""

import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BUILD = HERE / "build"
P4INFO = BUILD / "switchml.p4info.txtpb"
JSON = BUILD / "switchml.json"
HASH = BUILD / "sources.sha256"


class CompileError(RuntimeError):
    """The compiler is not there, or refuses the program."""


def sources() -> list[Path]:
    """The v1model program and all that it includes."""
    return sorted(HERE.glob("*.p4"))


def source_hash() -> str:
    """SHA-256 over the names and texts of the sources."""
    digest = hashlib.sha256()
    for path in sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def cookie() -> int:
    """What a switch that runs this program says of it: 64 bits of the hash of its sources."""
    return int(HASH.read_text()[:16], 16)


def compile_bmv2(into: Path = BUILD) -> Path:
    """Compile the v1model program with p4c-bm2-ss; the folder with p4info, JSON and the hash of the sources.

    Raises:
        CompileError: p4c-bm2-ss is not on PATH, fails, or has a warning.
    """
    with tempfile.TemporaryDirectory() as scratch:
        info, program = (Path(scratch) / path.name for path in (P4INFO, JSON))
        command = ["--p4v", "16", "-I", str(HERE), "--p4runtime-files", str(info), "-o", str(program)]
        _run("p4c-bm2-ss", [*command, str(HERE / "switchml.p4")], 600)
        return keep(info.read_text(), program.read_text(), into)


def keep(info: str, program: str, into: Path) -> Path:
    """Write what the compiler made, without where it was made, and the hash of the sources."""
    compiled = _without_sources(json.loads(program))
    compiled["program"] = "switchml.p4"
    into.mkdir(parents=True, exist_ok=True)
    (into / P4INFO.name).write_text(info)
    (into / JSON.name).write_text(json.dumps(compiled, separators=(",", ":")) + "\n")
    (into / HASH.name).write_text(source_hash() + "\n")
    return into


def _without_sources(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without_sources(value) for key, value in node.items() if key != "source_info"}
    return [_without_sources(value) for value in node] if isinstance(node, list) else node


def compile_tofino(into: Path, seconds: float = 600) -> Path:
    """Compile the TNA program with p4c-barefoot and bfas; the folder with tofino.bin and the resource reports.

    Raises:
        CompileError: p4c-barefoot or bfas is not on PATH, fails, takes longer than `seconds`, leaves no program, or
            one whose parser looks at nothing.
    """
    into.mkdir(parents=True, exist_ok=True)
    program = HERE / "tofino" / "switchml_tna.p4"
    flags = ["--target", "tofino", "--arch", "tna", "-g", "-D__TARGET_TOFINO__=1"]
    flags += ["-I", str(HERE), "-I", str(program.parent)]
    info = into / f"{program.stem}.p4info.txtpb"
    _run("p4c-barefoot", [*flags, "--p4runtime-files", str(info), "-o", str(into), str(program)], seconds, strict=False)
    for assembly in into.rglob("*.bfa"):
        # p4c from February to September 2026 silently leaves out what a Tofino parser's select looks at.
        if not re.search(r"match: \[[^]]*\b(half|byte[01])\b", assembly.read_text()):
            raise CompileError(
                f"p4c-barefoot left every condition of the parser out of {assembly}, so that all packets would go the "
                "same way: build p4c with its pull request 5753 (September 2026) or from before February 2026"
            )
        offset = ["--target", "tofino", "--table-handle-offset0"]
        _run("bfas", [*offset, "-o", str(assembly.parent), str(assembly)], seconds, strict=False)
    if not any(into.rglob("tofino.bin")):
        raise CompileError(f"p4c-barefoot and bfas left no tofino.bin in {into}: are both of one version of p4c?")
    return into


def _run(name: str, arguments: list[str], seconds: float, strict: bool = True) -> None:
    program = shutil.which(name)
    if program is None:
        raise CompileError(f"{name} is not on PATH: docs/how-it-works/p4.md says how to get it")
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise CompileError(f"{name} gave no verdict in {seconds:g} s") from None
    said = done.stderr.strip()
    if done.returncode != 0 or (strict and said):
        raise CompileError(f"{name} ended with {done.returncode}: {said or done.stdout.strip()}")
