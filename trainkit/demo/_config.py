"""What a demo run is: sizes, options, and the folder that it leaves."""

import dataclasses
import json
from pathlib import Path

from trainkit._files import write_text_atomically


@dataclasses.dataclass(frozen=True)
class Size:
    """Shape of one GPT: widths in elements, context in bytes, batch in sequences a worker."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    context: int
    batch: int
    steps: int


SIZES = {
    "tiny": Size(width=64, layers=3, heads=2, kv_heads=1, hidden=176, context=128, batch=8, steps=240),
    "small": Size(width=192, layers=3, heads=6, kv_heads=2, hidden=512, context=256, batch=4, steps=200),
    "30m": Size(width=512, layers=10, heads=8, kv_heads=4, hidden=1408, context=1024, batch=16, steps=2000),
    "124m": Size(width=768, layers=12, heads=12, kv_heads=6, hidden=2304, context=4096, batch=4, steps=4000),
}

# The rate that the demo's script carries: far too small to learn anything, so that what is learnt is AutoLRS's work.
USELESS_RATE = 1e-6
ARMS = {
    "autolrs": "AutoLRS",
    "default": f"the script's default, AdamW {USELESS_RATE:g}",
    "constant": "constant AdamW 1e-3",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """One demo run, as it is kept in `config.json`; a resumed run reads it from there."""

    size: str
    workers: int
    accelerator: str
    steps: int
    vocab: int
    seed: int
    deadline_s: float

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {self.size!r}: choose one of them")
        for name, least in (("workers", 1), ("steps", 20), ("vocab", 256), ("deadline_s", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}: raise it")
        if self.accelerator not in ("cpu", "cuda"):
            raise ValueError(f"accelerator must be cpu or cuda, got {self.accelerator!r}: choose one of them")

    @property
    def shape(self) -> Size:
        """The GPT's shape."""
        return SIZES[self.size]

    def save(self, folder: Path) -> None:
        """Write `config.json`."""
        write_text_atomically(folder / "config.json", json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Config":
        """Read `config.json` of a run.

        Raises:
            ValueError: `folder` holds no run, or its file is not a config.
        """
        path = folder / "config.json"
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            raise ValueError(
                f"--resume needs a run's folder, {folder} has no config.json: give --out, or start anew"
            ) from None
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a demo's config ({error}): start anew with another --out") from None
