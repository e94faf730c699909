"""Pictures that subcommands write: the ending is checked before the work, the file is said after it."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDINGS = (".svg", ".png", ".pdf")


def check_picture(option: str, path: str | Path | None) -> None:
    """Refuse a file whose ending names no kind of picture.

    Raises:
        ValueError: naming the option, the endings and what was given.
    """
    if path is not None and Path(path).suffix.lower() not in ENDINGS:
        raise ValueError(f"{option} must end with {', '.join(ENDINGS)}, got {str(path)!r}")


def save_picture(figure: "Figure", path: str | Path) -> None:
    """Write a picture beside its name, then in one step under it."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial{path.suffix}")
    try:
        figure.savefig(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
