"""The command line: one file a verb, one table of verbs."""

from trainkit.cli._main import main as main
