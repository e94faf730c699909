"""Options are said once: the state's and the strategy's arguments and the documentation's table come from one dataclass."""

import dataclasses
import inspect
import re

import pytest
from paths import ROOT

from trainkit import SwitchMLStrategy
from trainkit.switchml import Options, SwitchMLState

FIELDS = {field.name: field.default for field in dataclasses.fields(Options)}


def test_the_strategy_hands_every_option_on() -> None:
    given = {name: value for name, value in FIELDS.items() if value is not dataclasses.MISSING}
    changed = {**given, "channels": 2, "timeout_s": 7.0, "wire": "int16", "fallback": "allreduce"}
    assert SwitchMLStrategy("127.0.0.1:1", **changed).switchml_state.options == Options("127.0.0.1:1", **changed)


def test_arguments_and_defaults_are_those_of_the_options() -> None:
    given = {
        p.name: p.default for p in inspect.signature(SwitchMLState).parameters.values() if p.kind is not p.VAR_KEYWORD
    }
    given.pop("self", None)
    beside = {"rank", "world_size", "process_group"}
    assert {name: value for name, value in given.items() if name not in beside} == {
        name: inspect.Parameter.empty if value is dataclasses.MISSING else value for name, value in FIELDS.items()
    }
    described = re.findall(r"^        (\w+): ", str(SwitchMLState.__doc__), re.M)
    assert set(FIELDS) <= set(described)


def test_the_documentation_names_every_option() -> None:
    page = (ROOT / "docs" / "how-it-works" / "switchml.md").read_text()
    table = page.split("| argument | meaning | default |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.M)) == {*FIELDS, "process_group"}


def test_names_of_the_last_release_are_taken_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="timeout_s"):
        assert SwitchMLState("127.0.0.1:1", deadline_s=3.0).options.timeout_s == 3.0
    with pytest.warns(DeprecationWarning, match="channels"):
        assert SwitchMLStrategy("127.0.0.1:1", lanes=2).switchml_state.options.channels == 2
    with pytest.warns(DeprecationWarning, match="'error'"):
        assert SwitchMLState("127.0.0.1:1", fallback=None).options.fallback == "error"  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no option 'deadlines'"):
        SwitchMLState("127.0.0.1:1", deadlines=3)
