"""One self-contained HTML page: figures as inline SVG, no script, nothing fetched."""

import html
import io
from collections.abc import Sequence

from matplotlib.figure import Figure

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1c2530;background:#fff}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin:2.2rem 0 .4rem}p{margin:.3rem 0;max-width:48rem}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .9rem;border-bottom:1px solid #d8dee6;text-align:right}
td:first-child,th:first-child{text-align:left}th{font-weight:600;color:#4a5765}tr.best td{font-weight:700}
svg{width:100%;height:auto}.muted{color:#66727f}
"""


def figure(drawing: Figure) -> str:
    """A matplotlib figure as an SVG element."""
    text = io.StringIO()
    drawing.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], best: int | None = None) -> str:
    """An HTML table; the row `best` stands out."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = []
    for index, row in enumerate(rows):
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        lines.append(f'<tr class="best">{cells}</tr>' if index == best else f"<tr>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def section(title: str, about: str, *parts: str) -> str:
    """A heading, a sentence that says what is shown, and its parts (HTML)."""
    return f"<h2>{html.escape(title)}</h2><p>{html.escape(about)}</p>" + "".join(parts)


def page(title: str, about: str, sections: Sequence[str]) -> str:
    """The whole document."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f'<h1>{html.escape(title)}</h1><p class="muted">{html.escape(about)}</p>{"".join(sections)}</html>\n'
    )
