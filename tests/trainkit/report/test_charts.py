"""Charts and pages, without a browser: what is drawn is what was given."""

import json
import math
import random
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.report._chart import Line, Mark, chart, number, thin, ticks
from trainkit.report._page import page, section, table

VOID = {"meta", "link", "br", "input", "path", "line", "circle", "rect"}


class Tags(HTMLParser):
    """Every tag is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def carried(figure: str) -> dict[str, object]:
    found = re.search(r'<script type="application/json">(.*?)</script>', figure)
    assert found
    data = json.loads(found[1])
    assert isinstance(data, dict)
    return data


@given(st.lists(st.floats(-1e6, 1e6), max_size=60))
def test_a_short_curve_is_carried_whole(values: list[float]) -> None:
    x, y = thin(range(len(values)), values)
    assert (x, y) == (list(range(len(values))), values)


@given(st.integers(1300, 30_000), st.integers(0, 2**32))
def test_a_long_curve_keeps_its_ends_and_every_extreme_value(length: int, seed: int) -> None:
    dice = random.Random(seed)
    values = [dice.gauss(0, 1) for _ in range(length)]
    x, y = thin(range(length), values)
    assert len(x) <= 1200 and x == sorted(x)
    assert all(values[int(at)] == value for at, value in zip(x, y, strict=True))
    assert (x[0], x[-1]) == (0, length - 1) and max(y) == max(values) and min(y) == min(values)


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9))
def test_ticks_are_few_and_inside(low: float, width: float) -> None:
    if low + width == low or width < abs(low) * 1e-6:
        return
    found = ticks(low, low + width)
    assert 2 <= len(found) <= 7
    assert all(low - 1e-6 * width <= tick <= low + width * (1 + 1e-6) for tick in found)


@given(st.floats(1e-12, 1e6), st.floats(3, 1e12))
def test_logarithmic_ticks_are_few_and_inside(low: float, ratio: float) -> None:
    found = ticks(low, low * ratio, log=True)
    assert 1 <= len(found) <= 12
    assert all(low <= tick <= low * ratio for tick in found)


def test_numbers_are_short() -> None:
    assert [number(v) for v in (0, 0.00012345, 12345, 2.5e6, 3e9, -1500.0)] == [
        "0",
        "0.0001234",
        "12.35k",
        "2.5M",
        "3G",
        "-1500",
    ]


def test_a_line_stands_where_its_values_say() -> None:
    figure = chart("Loss", [Line("run", [0, 10], [1.0, 3.0])], x="step", y="loss", y_range=(1.0, 3.0))
    assert 'd="M0 1000L1000 0"' in figure
    assert carried(figure)["series"] == [{"name": "run", "x": [0, 10], "y": [1, 3]}]


def test_areas_lie_on_each_other() -> None:
    lines = [Line("a", [0, 1], [1.0, 1.0], "area"), Line("b", [0, 1], [3.0, 1.0], "area", 1)]
    figure = chart("Time", lines, x="step", y="ms", y_range=(0.0, 4.0))
    assert 'c1" d="M0 0L1000 500V1000H0Z"' in figure and 'c0" d="M0 750L1000 750V1000H0Z"' in figure
    assert [one["y"] for one in carried(figure)["series"]] == [[1, 1], [3, 1]]  # type: ignore[attr-defined]


@pytest.mark.parametrize("log", [False, True])
def test_values_that_cannot_be_drawn_are_left_out(log: bool) -> None:
    y = [math.nan, math.inf, -1.0, 0.0, 2.0]
    figure = chart("x", [Line("run", range(5), y)], x="step", y="loss", log_y=log)
    assert carried(figure)["series"] == [
        {"name": "run", "x": [4] if log else [2, 3, 4], "y": [2] if log else [-1, 0, 2]}
    ]
    assert "nan" not in figure and "inf" not in figure


def test_nothing_to_draw_is_said() -> None:
    assert "nothing was recorded" in chart("Loss", [Line("run", [], [])], x="step", y="loss")


@given(st.text())
def test_text_stays_text(text: str) -> None:
    hostile = text + '</script><script>alert(1)</script>"><img src=x>'
    line = Line(hostile, [0, 1], [1, 2])
    figure = chart(hostile, [line], x=hostile, y=hostile, marks=[Mark(0, 1, hostile, name=hostile)])
    whole = page(
        hostile,
        hostile,
        [section(hostile, hostile, table([hostile, "b"], [[hostile, hostile]], caption=hostile), figure)],
    )
    assert "<img" not in whole and "<script>alert" not in whole
    tags = Tags()
    tags.feed(whole)
    assert tags.open == []
    assert carried(figure)["series"][0]["name"] == hostile  # type: ignore[index]
