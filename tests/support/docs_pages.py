"""The code and the commands of a page of the docs, run as a reader runs them, and what they print held to the page.

    python tests/support/docs_pages.py docs/tutorials/*.md     # writes into the pages what is printed today

A page is read from top to bottom. Fences, by their language:

- `python`: runs in the page's one namespace; a fence of any language with `title="train.py"` is written to that file instead.
- `text` right behind it: what it prints. `...` alone on a line stands for any lines.
- `console`: lines that begin with `$ ` are commands, the others what they print. `&` at the end starts one beside.
- `sh`: commands for other machines or with privileges; their flags are parsed, nothing runs.

Numbers are not compared: they are of one machine and one hour. Everything else is.
"""

import contextlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WIDTH = "88"
_FENCE = re.compile(r"^( *)```(\w+)(?: title=\"([^\"]+)\")?[^\n]*\n(.*?)^\1```$", re.S | re.M)
_NUMBER = re.compile(r"(?<![A-Za-z])[-+]?\d[\d.,]*(e[-+]?\d+)?%?")


@dataclass
class Block:
    """One fence: its language, its title, its text, and where the text stands in the page."""

    language: str
    title: str | None
    code: str
    span: tuple[int, int]


@dataclass
class Printed:
    """A place of the page that shows output, what it shows and what came."""

    span: tuple[int, int]
    shown: str
    came: str
    of: str


@dataclass
class Page:
    """A page and what running it needs."""

    path: Path
    blocks: list[Block] = field(init=False)

    def __post_init__(self) -> None:
        text = self.path.read_text()
        self.blocks = [Block(m[2], m[3], m[4], m.span(4)) for m in _FENCE.finditer(text) if not m[1]]

    def commands(self) -> list[str]:
        """Every command of the page, whether it runs here or not."""
        return [line for block in self.blocks if block.language in ("sh", "console") for line, _ in _commands(block)]

    @property
    def starts_processes(self) -> bool:
        """Whether a command is more than a `trainkit` subcommand that ends by itself."""
        consoles = [block for block in self.blocks if block.language == "console"]
        return any(not _in_process(line) for block in consoles for line, _ in _commands(block))

    def run(self, folder: Path, names: dict[str, Any], *, processes: bool = True) -> list[Printed]:
        """Run the page in `folder`, with `names` known to its code.

        Without `processes`, commands that start some are left out.

        Raises:
            RuntimeError: a command failed.
            Exception: what the page's code raised.
        """
        (folder / "examples").symlink_to(ROOT / "examples")
        found: list[Printed] = []
        beside: list[subprocess.Popen[bytes]] = []
        try:
            for at, block in enumerate(self.blocks):
                if block.title:
                    (folder / block.title).write_text(block.code)
                elif block.language == "python":
                    after = self.blocks[at + 1] if at + 1 < len(self.blocks) else None
                    out = io.StringIO()
                    with contextlib.redirect_stdout(out):
                        exec(compile(block.code, f"{self.path.name}, block {at}", "exec"), names)
                    if after and after.language == "text" and not after.title:
                        found.append(Printed(after.span, after.code, out.getvalue(), block.code))
                elif block.language == "console":
                    found += _console(block, folder, beside, processes)
        finally:
            for process in beside:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(20)
        return found


def _commands(block: Block) -> list[tuple[str, int]]:
    """Commands with the offset behind them; in `sh` fences every line is one."""
    found = []
    for m in re.finditer(r"^(\$ )?((?:[^\n]*\\\n)*[^\n]*)\n", block.code, re.M):
        if (m[1] or block.language != "console") and m[2].strip():
            found.append((m[2].replace("\\\n", " "), m.end()))
    return found


def _in_process(line: str) -> bool:
    return line.startswith("trainkit ") and not re.search(r"&$|\||^trainkit (demo|check|switch) ", line)


def _console(block: Block, folder: Path, beside: list[subprocess.Popen[bytes]], processes: bool) -> list[Printed]:
    found = []
    commands = _commands(block)
    for index, (line, at) in enumerate(commands):
        if not (processes or _in_process(line)):
            continue
        end = block.code.find("\n$ ", at - 1) + 1 if index + 1 < len(commands) else len(block.code)
        if line.endswith("&"):
            quiet = {"stdout": subprocess.DEVNULL, "start_new_session": True}
            beside.append(subprocess.Popen(line[:-1], shell=True, cwd=folder, env=_environment(), **quiet))
            continue
        came = _in_this_process(line) if _in_process(line) else _in_a_shell(line, folder)
        found.append(Printed((block.span[0] + at, block.span[0] + end), block.code[at:end], came, line))
    return found


def _in_this_process(line: str) -> str:
    from trainkit.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(shlex.split(line, comments=True)[1:])
    if code:
        raise RuntimeError(f"{line}: exit code {code}: {out.getvalue()}")
    return out.getvalue()


def _environment() -> dict[str, str]:
    """Of a reader who has activated the environment that this runs in."""
    return os.environ | {"COLUMNS": WIDTH, "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}"}


def _in_a_shell(line: str, folder: Path) -> str:
    done = subprocess.run(line, shell=True, cwd=folder, env=_environment(), capture_output=True, timeout=1500)
    if done.returncode:
        raise RuntimeError(f"{line}: exit code {done.returncode}: {done.stdout[-2000:]!r} {done.stderr[-4000:]!r}")
    return re.sub(r"[^\n]*\r", "", done.stdout.decode())  # of a progress bar the last state


def shape(text: str) -> list[str]:
    """The text's lines without numbers, widths and ends of lines."""
    text = re.sub(r"[━─┄-]{3,}", "-", re.sub(r"[ \t]+", " ", _NUMBER.sub("#", text)))
    return [line.strip() for line in text.splitlines() if line.strip()]


def differs(printed: Printed) -> str | None:
    """What the page shows and the code does not print, or None."""
    shown, came = shape(printed.shown), shape(printed.came)
    pattern = "\n".join(".*" if line == "..." else re.escape(line) for line in shown)
    if re.fullmatch(pattern, "\n".join(came), re.S):
        return None
    return f"the page shows of\n{printed.of}\n\n{printed.shown}\nbut this is printed:\n\n{printed.came}"


@contextlib.contextmanager
def readers_names(text: str) -> Iterator[dict[str, Any]]:
    """What fragments of the pages take for granted: the reader's model, loader, optimizer, trainer and tensors."""
    import torch
    import torch.distributed as dist
    from pytorch_lightning import LightningModule, Trainer

    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(8, 1)

        def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
            return (self.net(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    model = Model()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(512, 8)), 32)
    names: dict[str, Any] = {
        "torch": torch, "Trainer": Trainer, "model": model, "loader": loader,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
    }  # fmt: skip
    if "attention(" in text:
        names |= {name: torch.randn(1, 64, 2, 32, requires_grad=True) for name in "qkv"}
    if not re.search(r"\bddp\b", text):
        yield names
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield names | {"ddp": torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 1))}
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def update(path: Path, printed: list[Printed]) -> bool:
    """Write what was printed into the page where it differs; whether anything did."""
    text = path.read_text()
    stale = [one for one in printed if differs(one)]
    for one in sorted(stale, key=lambda one: one.span, reverse=True):
        came = "\n".join(line.rstrip() for line in one.came.strip("\n").splitlines())
        text = text[: one.span[0]] + came + "\n" * bool(came) + text[one.span[1] :]
    path.write_text(text)
    return bool(stale)


def main() -> None:
    """Bring the pages named on the command line up to date."""
    import tempfile

    os.environ["COLUMNS"] = WIDTH
    for name in sys.argv[1:]:
        page = Page(Path(name).resolve())
        known = readers_names(page.path.read_text())
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), known as names:
            printed = page.run(Path(folder), names)
        print(f"{name}: {'written' if update(page.path, printed) else 'as it was'}")


if __name__ == "__main__":
    main()
