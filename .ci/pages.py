"""What MkDocs cannot do by itself: reports as pages, the command line's help, and a package's public names.

MkDocs calls the functions below by their names (`hooks:` in mkdocs.yml).
"""

import ast
import re
from pathlib import Path
from posixpath import join, normpath, relpath
from typing import Any

from griffe import Extension, Object
from mkdocs.structure.files import File, Files

from trainkit.cli._main import _SUBCOMMANDS, load

ROOT = Path(__file__).resolve().parent.parent
HELP = "<!-- help of every subcommand -->"
NAMES = re.compile(r"<!-- public names of (trainkit(?:\.\w+)*) -->")


def on_files(files: Files, config: Any) -> Files:
    """Add the dated reports, which lie beside the scripts that wrote them, as pages below `benchmarks/`."""
    for report in sorted((ROOT / "benchmarks").rglob("*.md")):
        name = str(report.relative_to(ROOT))
        files.append(File.generated(config, name, abs_src_path=str(report)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links out of `docs/` to the page of the same file, and fill in what a page asks for in a comment.

    In the repository a report is `../../benchmarks/...` seen from `docs/how-it-works/`; the site has no `docs/`.
    """
    here = "" if page.file.src_uri.startswith("benchmarks/") else "docs"
    folder = join(here, page.file.src_uri.rpartition("/")[0])

    def lead(found: re.Match[str]) -> str:
        target = normpath(join(folder, found[1]))
        if not target.startswith("benchmarks/"):
            return found[0]
        return f"]({relpath(target, normpath(page.file.src_uri.rpartition('/')[0] or '.'))}"

    markdown = re.sub(r"\]\((?!\w+:|#)([^)#\s]+)", lead, markdown)
    shown: set[str] = set()  # a name stands once on a page, under the package that exports it to most

    def names(found: re.Match[str]) -> str:
        new = [name for name in public(found[1]) if name not in shown]
        shown.update(new)
        return "\n\n".join(f"::: {found[1]}.{name}" for name in new)

    markdown = NAMES.sub(names, markdown)
    return markdown.replace(HELP, _help()) if HELP in markdown else markdown


def public(package: str) -> list[str]:
    """The public names of a package: what its `__init__.py` imports as itself."""
    tree = ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text())
    found = [alias for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    return [alias.name for alias in found if alias.name == alias.asname]


def _help() -> str:
    parts = []
    for name in _SUBCOMMANDS:
        parts.append(f"## trainkit {name}\n\n```text\n{load(name).parser().format_help().rstrip()}\n```")
    return "\n\n".join(parts)


class Examples(Extension):
    """What our docstrings head `Example:` is what the parser knows as `Examples:`; else it takes `>>>` for a quotation."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called with every object that is read from the source."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
