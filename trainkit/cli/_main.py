"""Entry point of `trainkit`: find the subcommand, run it, turn refused input into one line."""

import os
import select
import sys
from importlib import import_module

import trainkit
from trainkit.cli._requirements import pip_install
from trainkit.cli._subcommand import Subcommand, did_you_mean

# subcommand -> the module that holds it as SUBCOMMAND; two words are one subcommand of a group ("topology find")
_SUBCOMMANDS: dict[str, str] = {
    "check": "trainkit.cli._check",
    "demo": "trainkit.cli._demo",
    "docs": "trainkit.cli._docs",
    "doctor": "trainkit.cli._doctor",
    "order": "trainkit.cli._order",
    "p4 compile": "trainkit.cli._p4_compile",
    "p4 deploy": "trainkit.cli._p4_deploy",
    "p4 reset": "trainkit.cli._p4_reset",
    "p4 serve": "trainkit.cli._p4_serve",
    "p4 status": "trainkit.cli._p4_status",
    "plan": "trainkit.cli._plan",
    "probe": "trainkit.cli._probe",
    "report": "trainkit.cli._report",
    "serve": "trainkit.cli._serve",
    "serve profile": "trainkit.cli._serve_profile",
    "serve simulate": "trainkit.cli._serve_simulate",
    "switch": "trainkit.cli._switch",
    "topology find": "trainkit.cli._topology_find",
    "topology show": "trainkit.cli._topology_show",
}
_STDOUT = 1


def load(name: str) -> Subcommand:
    """The subcommand called `name`."""
    found: Subcommand = import_module(_SUBCOMMANDS[name]).SUBCOMMAND
    return found


def _overview(prefix: str = "") -> str:
    found = [load(name) for name in _SUBCOMMANDS if name.startswith(prefix)]
    width = max(len(one.name) for one in found)
    lines = [f"  {one.name:{width}}  {one.summary}" for one in found]
    return f"usage: trainkit {prefix or 'SUBCOMMAND '}[--help] ...\n\n" + "\n".join(lines) + "\n"


def _find(argv: list[str]) -> tuple[str, list[str]] | None:
    for words in (2, 1):
        name = " ".join(argv[:words])
        if len(argv) >= words and name in _SUBCOMMANDS:
            return name, argv[words:]
    return None


def _not_found(argv: list[str]) -> int:
    """Help where it was asked for; else what is like the words that were given, and the list."""
    group = f"{argv[0]} " if argv and any(name.startswith(f"{argv[0]} ") for name in _SUBCOMMANDS) else ""
    if not argv or argv[-1] in ("-h", "--help") or argv == ["help"]:
        print(_overview(group), end="")
        return 0
    if not group or len(argv) > 1:
        said = " ".join(argv[:2] if group else argv[:1])
        groups = {name.split()[0] for name in _SUBCOMMANDS}
        like = did_you_mean(said, sorted({*_SUBCOMMANDS, *groups}))
        print(f"trainkit: there is no subcommand {said!r}{like}", file=sys.stderr)
    print(_overview(group), end="", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """Run `trainkit`.

    Args:
        argv: the words after the program's name; None takes them from the process.

    Returns:
        0 on success, 2 where the input was refused or a package is missing, 130 when interrupted, 141 when the reader
        of a pipe has gone (as a shell has it), else what the subcommand returned.
    """
    try:
        try:
            return _main(sys.argv[1:] if argv is None else argv)
        finally:
            # here and not at the interpreter's end, where a reader that has gone could no longer be caught
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
        return 141


def _main(argv: list[str]) -> int:
    if argv[:1] == ["--version"]:
        print(f"trainkit {trainkit.__version__}")
        return 0
    found = _find(argv)
    if found is None:
        return _not_found(argv)
    name, rest = found
    try:
        return int(load(name).main(rest))
    except KeyboardInterrupt:
        print(f"trainkit {name}: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in ("", "trainkit"):
            raise
        print(
            f"trainkit {name}: needs the Python package {package}, which is not installed:"
            f" {pip_install(package)}; `trainkit doctor` shows what else is missing",
            file=sys.stderr,
        )
        return 2
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            raise
        # Refused input and our own named errors are one line; anything else is a bug and keeps its traceback.
        if not isinstance(error, ValueError | OSError) and not type(error).__module__.startswith("trainkit."):
            raise
        print(f"trainkit {name}: {error}", file=sys.stderr)
        return 2


def _reader_has_gone() -> bool:
    poll = select.poll()
    poll.register(_STDOUT, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
