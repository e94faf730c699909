"""Entry point of `trainkit`: find the verb, run it, turn refused input into one line."""

import sys
from importlib import import_module

import trainkit

# verb -> the module that holds it as VERB; two words are one verb of a group ("topology find")
_VERBS: dict[str, str] = {
    "demo": "trainkit.cli._demo",
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


def _overview(prefix: str = "") -> str:
    verbs = [import_module(home).VERB for name, home in _VERBS.items() if name.startswith(prefix)]
    width = max(len(verb.name) for verb in verbs)
    lines = [f"  {verb.name:{width}}  {verb.summary}" for verb in verbs]
    return f"usage: trainkit {prefix or 'VERB '}[--help] ...\n\n" + "\n".join(lines) + "\n"


def _find(argv: list[str]) -> tuple[str, list[str]] | None:
    for words in (2, 1):
        name = " ".join(argv[:words])
        if len(argv) >= words and name in _VERBS:
            return name, argv[words:]
    return None


def main(argv: list[str] | None = None) -> int:
    """Run `trainkit`.

    Args:
        argv: the words after the program's name; None takes them from the process.

    Returns:
        0 on success, 2 where the input was refused, else what the verb returned.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--version"]:
        print(f"trainkit {trainkit.__version__}")
        return 0
    found = _find(argv)
    if found is None:
        group = f"{argv[0]} " if argv and any(name.startswith(f"{argv[0]} ") for name in _VERBS) else ""
        asked_for_help = not argv or argv[-1] in ("-h", "--help")
        if not asked_for_help and (not group or len(argv) > 1):
            print(f"trainkit: no verb {' '.join(argv[:2] if group else argv[:1])!r}", file=sys.stderr)
        print(_overview(group), end="", file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else 2
    name, rest = found
    try:
        return int(import_module(_VERBS[name]).VERB.main(rest))
    except KeyboardInterrupt:
        print(f"trainkit {name}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        # Refused input and our own named errors are one line; anything else is a bug and keeps its traceback.
        if not isinstance(error, ValueError | OSError) and not type(error).__module__.startswith("trainkit."):
            raise
        print(f"trainkit {name}: {error}", file=sys.stderr)
        return 2
