"""What a verb is: a frozen dataclass of options, an example, and a function that runs it."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser


@dataclasses.dataclass(frozen=True)
class Verb:
    """One `trainkit` verb.

    `options` is a frozen dataclass whose fields each carry a docstring: the flags and their help are read from it
    (a field with the metadata `positional` is a word without a flag).
    `run` takes an instance of it and returns the exit code; everything heavy is imported inside it, so that
    `--help` loads neither torch nor Lightning.
    """

    name: str
    summary: str
    options: type[Any]
    run: Callable[[Any], int]
    example: str

    def parser(self) -> ArgumentParser:
        """The parser of this verb, built from the option dataclass."""
        parser = ArgumentParser(
            prog=f"trainkit {self.name}",
            description=self.summary,
            epilog=f"Example: {self.example}",
            formatter_class=argparse.HelpFormatter,
        )
        helps = {p.arg_name: p.description for p in docstring_parser.parse_from_object(self.options).params}
        hints = get_type_hints(self.options)
        for field in dataclasses.fields(self.options):
            flag = "--" + field.name.replace("_", "-")
            about = (helps.get(field.name) or "").replace("%", "%%")
            if field.metadata.get("positional"):
                parser.add_argument(field.name, type=hints[field.name], help=about)
            elif hints[field.name] is bool:
                parser.add_argument(flag, action="store_true", help=about)
            elif field.default is dataclasses.MISSING:
                parser.add_argument(flag, type=hints[field.name], required=True, help=about)
            else:
                shown = "" if field.default is None else f" (default: {field.default})"
                parser.add_argument(flag, type=hints[field.name], default=field.default, help=about + shown)
        return parser

    def main(self, argv: list[str]) -> int:
        """Parse `argv` and run; the exit code."""
        parsed = self.parser().parse_args(argv)
        names = [field.name for field in dataclasses.fields(self.options)]
        return self.run(self.options(**{name: getattr(parsed, name) for name in names}))
