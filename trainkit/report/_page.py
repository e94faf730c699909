"""One self-contained HTML page: style, script and pictures inside, nothing fetched; light or dark as the reader prefers."""

import html
from collections.abc import Sequence
from importlib.resources import files

_POLICY = "default-src 'none';img-src data:;style-src 'unsafe-inline';script-src 'unsafe-inline';connect-src 'self'"
"""Whatever text gets into a page: a browser fetches nothing and sends nothing for it."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str, text: bool = False) -> str:
    """An HTML table that scrolls by itself where it is wider than the page; cells are numbers, or `text`."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    lines = []
    for row in rows:
        first, *rest = (html.escape(cell) for cell in row)
        cells = f'<th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest)
        lines.append(f"<tr>{cells}</tr>")
    kind = ' class="text"' if text else ""
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{html.escape(caption)}">'
        f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def section(title: str, about: str, *parts: str) -> str:
    """A heading, a sentence that says what is shown, and its parts (HTML)."""
    return f"<section><h2>{html.escape(title)}</h2><p>{html.escape(about)}</p>{''.join(parts)}</section>"


def live_page(title: str, about: str, header: Sequence[str]) -> str:
    """A page that shows what `events`, beside it, sends: server-sent events of JSON, once a second.

    Each event has `time` in seconds, `counters` (name to a number that grows) and `rows` for the table under `header`.
    """
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    rows = (
        f'<div class="wide" tabindex="0" role="region" aria-label="{html.escape(header[0])}s"><table id="rows"><thead><tr>{head}'
        '</tr></thead><tbody></tbody></table></div><p id="none" class="muted">none</p>'
    )
    now = '<p id="said" role="status"></p><div id="live"></div>'
    return page(title, about, [now, f"<section><h2>{html.escape(header[0])}s</h2>{rows}</section>"], script="live.js")


def page(title: str, about: str, sections: Sequence[str], *, script: str = "page.js") -> str:
    """The whole document."""
    here = files("trainkit.report")
    style, code = ((here / name).read_text(encoding="utf-8") for name in ("page.css", script))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title><style>{style}</style></head><body>'
        f'<header><h1>{html.escape(title)}</h1><p class="muted">{html.escape(about)}</p></header>'
        f"<main>{''.join(sections)}</main><script>{code}</script></body></html>\n"
    )
