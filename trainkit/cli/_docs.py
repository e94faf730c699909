"""`trainkit docs`: the pages of the documentation, out of the installed package."""

from dataclasses import dataclass, field
from pathlib import Path

from trainkit.cli._subcommand import Subcommand, did_you_mean

_PAGES = Path(__file__).parent.parent / "docs"


@dataclass(frozen=True)
class Options:
    """Which page, and how."""

    page: str | None = field(default=None, metadata={"positional": True})
    """page to print, such as network or how-it-works/network; without it, the list of pages"""
    plain: bool = False
    """print the page's Markdown as it is written; so do pipes and files"""


def pages() -> dict[str, Path]:
    """Name -> file of every page; a page's name is its path without the ending."""
    return {str(path.relative_to(_PAGES).with_suffix("")): path for path in sorted(_PAGES.rglob("*.md"))}


def _find(page: str) -> Path:
    known = pages()
    asked = page.removesuffix(".md").removeprefix("docs/").strip("/")
    matches = [name for name in known if name == asked] or [name for name in known if name.split("/")[-1] == asked]
    if len(matches) == 1:
        return known[matches[0]]
    if matches:
        raise ValueError(f"page {asked} must be one page, and {', '.join(matches)} are called so: give one of them")
    like = did_you_mean(asked, [*known, *(name.split("/")[-1] for name in known)])
    raise ValueError(f"there is no page {asked}{like}; `trainkit docs` lists the pages")


def run(options: Options) -> int:
    """Print the page, or the list."""
    import sys

    if options.page is None:
        width = max(map(len, pages()), default=0)
        for name, path in pages().items():
            title = next((line[2:] for line in path.read_text().splitlines() if line.startswith("# ")), "")
            print(f"{name:{width}}  {title}".rstrip())
        return 0
    text = _find(options.page).read_text()
    if options.plain or not sys.stdout.isatty():
        print(text, end="")
    else:
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(text))
    return 0


SUBCOMMAND = Subcommand(
    name="docs",
    summary="Print a page of the documentation, or the list of pages.",
    options=Options,
    run=run,
    example="trainkit docs how-it-works/network",
)
