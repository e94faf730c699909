"""What a subcommand is: a frozen dataclass of options, an example, and a function that runs it."""

import argparse
import dataclasses
import re
import types
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser

_RULES = {int: "a whole number", float: "a number"}
_VALUE = re.compile(r"(?:Given value|Got value): (.*)")


@dataclasses.dataclass(frozen=True)
class Subcommand:
    """One subcommand of `trainkit`.

    `options` is a frozen dataclass whose fields each carry a docstring: the flags and their help are read from it
    (a field with the metadata `positional` is a word without a flag, or any number of words where it is a tuple).
    `run` takes an instance of it and returns the exit code; everything heavy is imported inside it, so that
    `--help` loads neither torch nor Lightning.
    """

    name: str
    summary: str
    options: type[Any]
    run: Callable[[Any], int]
    example: str

    def parser(self) -> ArgumentParser:
        """The parser of this subcommand, built from the option dataclass."""
        hints = get_type_hints(self.options)
        parser = _Parser(
            hints,
            prog=f"trainkit {self.name}",
            description=self.summary,
            epilog=f"Example:\n  {self.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        # a base class documents its own fields
        documented = [docstring_parser.parse_from_object(home).params for home in self.options.__mro__[:-1]]
        helps = {p.arg_name: p.description for params in reversed(documented) for p in params}
        for field in dataclasses.fields(self.options):
            flag, kind = "--" + field.name.replace("_", "-"), hints[field.name]
            about = (helps.get(field.name) or "").replace("%", "%%")
            if field.metadata.get("positional"):
                if get_origin(kind) is tuple:
                    parser.add_argument(field.name, type=get_args(kind)[0], nargs="*", help=about)
                elif field.default is None:
                    parser.add_argument(field.name, type=kind, nargs="?", help=about)
                else:
                    parser.add_argument(field.name, type=kind, help=about)
            elif kind is bool:
                parser.add_argument(flag, action="store_true", help=about)
            elif field.default is dataclasses.MISSING:
                parser.add_argument(flag, type=kind, required=True, help=about)
            else:
                shown = "" if field.default is None else f" (default: {field.default})"
                parser.add_argument(flag, type=kind, default=field.default, help=about + shown)
        return parser

    def main(self, argv: list[str]) -> int:
        """Parse `argv` and run; the exit code."""
        parsed = self.parser().parse_args(argv)
        given: dict[str, Any] = {}
        for field in dataclasses.fields(self.options):
            value = getattr(parsed, field.name)
            # a list of words comes as a list, or as None where there are none
            words = field.metadata.get("positional") and field.default == ()
            given[field.name] = tuple(value or ()) if words else value
        return self.run(self.options(**given))


def did_you_mean(word: str, known: list[str]) -> str:
    """What to add to an error about `word`: the known word that is most like it, or "" where none is."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


class _Parser(ArgumentParser):
    """Says in one line which option is wrong, what it must be and what it got."""

    def __init__(self, hints: dict[str, Any], **options: Any) -> None:
        super().__init__(**options)
        self._hints = hints

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with exit code 2."""
        self.exit(2, f"{self.prog}: {self._plain(message)} (`{self.prog} --help` shows the options)\n")

    def _plain(self, message: str) -> str:
        if unknown := re.search(r"[Uu]nrecognized arguments: (.*)", message):
            word = unknown[1].split()[0]
            what = "option" if word.startswith("-") else "argument"
            flags = [flag for action in self._actions for flag in action.option_strings]
            return f"there is no {what} {word}" + did_you_mean(word.split("=")[0], flags)
        if key := re.search(r'[Pp]arser key "([^"]+)"', message):
            value = _VALUE.findall(message)
            got = f", got {value[-1].strip()!r}" if value else ""
            if rule := _rule(self._hints.get(key[1])):
                return f"{self._flag(key[1])} must be {rule}{got}"
        if missing := re.search(r"arguments are required: (.*)", message):
            return "missing " + ", ".join(self._flag(name.strip()) for name in missing[1].split(","))
        return " ".join(message.split())

    def _flag(self, key: str) -> str:
        action = next((action for action in self._actions if action.dest == key), None)
        return action.option_strings[0] if action and action.option_strings else key.upper()


def _rule(kind: Any) -> str | None:
    """What a value of type `kind` must be, in words; None where no words are known."""
    if get_origin(kind) in (Union, types.UnionType):
        rules = [rule for part in get_args(kind) if (rule := _rule(part))]
        return rules[0] if len(rules) == 1 else None
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) in (list, tuple):
        rule = _rule(get_args(kind)[0])
        return rule and f"a list such as [1,2], each {rule}"
    return _RULES.get(kind)
