"""Charts as inline SVG with text as text: readable at any width, by mouse, by keyboard and by a screen reader.

The curves are drawn here, in a box of 1000 by 1000 that the page stretches; labels are HTML beside it, so that letters keep
their size. The page's script (`_page.py`) moves a cursor over the numbers that the chart carries with it.
"""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

COLOURS = 8
"""Number of colours that the page's style defines, `--c0` and so on; each has 3:1 against the ground in both schemes."""
_BUCKETS = 300
"""Most of what a chart of 360 to 1440 pixels can show: each bucket keeps its first, least, greatest and last point."""


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: in the legend and under the cursor.
        x: positions, ascending.
        y: values; nan where there is none.
        kind: "line", "steps" (holds until the next x), "dots" (a line through dots) or "area" (stacked on the areas before).
        colour: number of the colour.
        faint: drawn thin, as the ground of other curves.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    kind: Literal["line", "steps", "dots", "area"] = "line"
    colour: int = 0
    faint: bool = False


@dataclass(frozen=True)
class Mark:
    """One point that can be pointed at or tabbed to, and then tells its text.

    Attributes:
        x: position.
        y: value.
        text: what it tells.
        colour: number of the colour.
        low: lower end of a bar, with `high` the upper one.
        high: see `low`.
        name: in the legend.
    """

    x: float
    y: float
    text: str
    colour: int = 0
    low: float | None = None
    high: float | None = None
    name: str = ""


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """The points that a picture needs: every bucket's first, least, greatest and last; points without a value go."""
    points = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    if len(points) > 4 * _BUCKETS:
        kept: list[tuple[float, float]] = []
        for bucket in range(_BUCKETS):
            part = points[len(points) * bucket // _BUCKETS : len(points) * (bucket + 1) // _BUCKETS]
            values = [b for _, b in part]
            chosen = {0, values.index(min(values)), values.index(max(values)), len(part) - 1}
            kept += [part[index] for index in sorted(chosen)]
        points = kept
    return [a for a, _ in points], [b for _, b in points]


def ticks(low: float, high: float, *, log: bool = False) -> list[float]:
    """Three to seven round numbers from `low` to `high`; powers of ten (and 2 and 5 times them in a short range) if `log`."""
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        every = max(1, round((last - first) / 6))
        tens = [10.0**power for power in range(first, last + 1, every)]
        if len(tens) < 4:
            tens = [m * 10.0**power for power in range(first, last + 1) for m in (1, 2, 5)]
        return [t for t in tens if low <= t <= high]
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= rough)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A number as a reader wants it: four digits at most, k and M for large counts."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit and abs(value) < 1e12:
            return f"{value / (limit if letter != 'k' else 1e3):.4g}{letter}"
    return f"{value:.4g}"


class _Scale:
    """Values to thousandths of an axis."""

    def __init__(self, values: Sequence[float], *, log: bool, zero: bool) -> None:
        low, high = min(values), max(values)
        if zero:
            low = min(low, 0.0)
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - abs(low or 1) / 2, high + abs(high or 1) / 2)
        self.low, self.high, self._log = low, high, log

    def padded(self, share: float) -> "_Scale":
        a, b = self._of(self.low), self._of(self.high)
        room = share * (b - a)
        self.low, self.high = self._back(a - room if self.low != 0 or self._log else a), self._back(b + room)
        return self

    def _of(self, value: float) -> float:
        return math.log10(value) if self._log else value

    def _back(self, value: float) -> float:
        return 10.0**value if self._log else value

    def __call__(self, value: float) -> float:
        a, b = self._of(self.low), self._of(self.high)
        return round(1000 * (self._of(value) - a) / (b - a), 1)


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    marks: Sequence[Mark] = (),
    y_range: tuple[float, float] | None = None,
) -> str:
    """A chart as HTML.

    Args:
        title: above it, and its name for a screen reader.
        lines: curves; the first is drawn first.
        x: what the horizontal axis is, with its unit.
        y: the vertical one.
        log_x: logarithmic; values must be positive.
        log_y: the same for the other axis; values that are not positive are left out.
        marks: points with a text.
        y_range: what to show of the vertical axis, None: everything.

    Returns:
        A `<figure>`; a paragraph that says so where there is nothing to draw.
    """
    stacked = any(line.kind == "area" for line in lines)
    shown = _stack(lines) if stacked else [(line, *_positive(line, log_x, log_y)) for line in lines]
    shown = [(line, xs, ys) for line, xs, ys in shown if xs]
    marks = [m for m in marks if math.isfinite(m.y) and not (log_y and m.y <= 0)]
    every_x = [value for _, xs, _ in shown for value in xs] + [mark.x for mark in marks]
    every_y = [value for _, _, ys in shown for value in ys] + [mark.y for mark in marks]
    if not every_x:
        return f'<p class="muted">{html.escape(title)}: nothing was recorded.</p>'
    across = _Scale(every_x, log=log_x, zero=False)
    up = _Scale(y_range or every_y, log=log_y, zero=stacked).padded(0 if y_range else 0.05)

    curves = "".join(_curve(line, xs, ys, across, up) for line, xs, ys in shown)
    bars = "".join(_bar(mark, across, up) for mark in marks if mark.low is not None and mark.high is not None)
    rules = "".join(f'<path class="rule" d="M0 {1000 - up(t)}H1000"/>' for t in ticks(up.low, up.high, log=log_y))
    y_labels = "".join(
        f'<span class="y" style="bottom:{up(t) / 10:.2f}%">{number(t)}</span>'
        for t in ticks(up.low, up.high, log=log_y)
    )
    x_ticks = ticks(across.low, across.high, log=log_x)
    x_labels = "".join(f'<span class="x" style="left:{across(t) / 10:.2f}%">{number(t)}</span>' for t in x_ticks)
    buttons = "".join(
        f'<button type="button" class="mark c{m.colour % COLOURS}" '
        f'style="left:{across(m.x) / 10:.2f}%;bottom:{_inside(up(m.y)) / 10:.2f}%" '
        f'aria-label="{html.escape(m.text)}"></button>'
        for m in marks
    )
    named = [(line.name, line.colour) for line, _, _ in shown] + [(mark.name, mark.colour) for mark in marks]
    legend = "".join(
        f'<li class="c{colour % COLOURS}">{html.escape(name)}</li>' for name, colour in dict.fromkeys(named) if name
    )
    numbers = {
        "x": x,
        "log": log_x,
        "from": across.low,
        "to": across.high,
        "series": [
            {"name": line.name, "x": _short(line.x), "y": _short(line.y)} for line in _carried(lines, log_x, log_y)
        ],
    }
    name = html.escape(title)
    return (
        f'<figure class="chart"><figcaption>{name}</figcaption>'
        + (f'<ul class="legend">{legend}</ul>' if legend else "")
        + f'<p class="axis">{html.escape(y)}</p><div class="plot">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{rules}{curves}{bars}</svg>'
        f"{y_labels}{x_labels}"
        f'<div class="cursor" role="slider" tabindex="0" aria-label="{name}: position" aria-valuemin="0" aria-valuemax="1000" '
        f'aria-valuenow="0" aria-valuetext="arrow keys move"><i></i></div>{buttons}</div>'
        f'<p class="axis under">{html.escape(x)}</p><output></output>'
        f"{data(numbers)}</figure>"
    )


def data(value: object) -> str:
    """JSON for the page's script; no text in it can end the element."""
    text = json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'


def _positive(line: Line, log_x: bool, log_y: bool) -> tuple[list[float], list[float]]:
    keep = [
        (a, b)
        for a, b in zip(line.x, line.y, strict=True)
        if math.isfinite(a) and (a > 0 or not log_x) and (b > 0 or not log_y)
    ]
    return thin([a for a, _ in keep], [b for _, b in keep])


def _carried(lines: Sequence[Line], log_x: bool, log_y: bool) -> list[Line]:
    """The numbers under the cursor: what was measured, thinned, not the sums of a stack."""
    return [Line(line.name, *_positive(line, log_x, log_y)) for line in lines]


def _stack(lines: Sequence[Line]) -> list[tuple[Line, list[float], list[float]]]:
    """Areas on top of each other over the first one's positions, each bucket the mean of its points."""
    x = list(lines[0].x)
    size = max(1, math.ceil(len(x) / _BUCKETS))
    below = [0.0] * len(x)
    stacked = []
    for line in lines:
        below = [base + (value if math.isfinite(value) else 0.0) for base, value in zip(below, line.y, strict=True)]
        means = [math.fsum(below[i : i + size]) / len(below[i : i + size]) for i in range(0, len(x), size)]
        stacked.append((line, [x[i] for i in range(0, len(x), size)], means))
    # the tallest first: what is drawn later covers its lower part
    return stacked[::-1]


def _curve(line: Line, xs: Sequence[float], ys: Sequence[float], across: _Scale, up: _Scale) -> str:
    points = [(across(a), round(1000 - up(b), 1)) for a, b in zip(xs, ys, strict=True)]
    parts = [f"M{points[0][0]:g} {points[0][1]:g}"]
    parts += [f"H{at:g}V{height:g}" if line.kind == "steps" else f"L{at:g} {height:g}" for at, height in points[1:]]
    path = "".join(parts)
    colour = f"c{line.colour % COLOURS}"
    if line.kind == "area":
        ground = round(1000 - up(0.0), 1)
        return f'<path class="area {colour}" d="{path}V{ground:g}H{points[0][0]:g}Z"/>'
    curve = f'<path class="{"faint " if line.faint else ""}line {colour}" d="{path}"/>'
    if line.kind == "dots" or len(points) == 1:
        curve += f'<path class="dots {colour}" d="{"".join(f"M{a:g} {b:g}h0" for a, b in points)}"/>'
    return curve


def _bar(mark: Mark, across: _Scale, up: _Scale) -> str:
    assert mark.low is not None and mark.high is not None
    low = max(mark.low, up.low)
    high = min(mark.high, up.high)
    if low > high:
        return ""
    return (
        f'<path class="bar c{mark.colour % COLOURS}" d="M{across(mark.x):g} {1000 - up(low):g}V{1000 - up(high):g}"/>'
    )


def _inside(thousandths: float) -> float:
    return min(max(thousandths, 0.0), 1000.0)


def _short(values: Sequence[float]) -> list[float]:
    return [int(v) if float(v).is_integer() and abs(v) < 1e15 else float(f"{v:.5g}") for v in values]
