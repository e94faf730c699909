"""`trainkit serve profile`: measure a model's latency by batch size."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from trainkit.cli._subcommand import Subcommand


@dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    model: str = field(metadata={"positional": True})
    """MODULE:ATTRIBUTE or FILE.py:ATTRIBUTE, with @CHECKPOINT of a LightningModule class"""
    input: str
    """one request's input as JSON, or a file that holds it"""
    out: Path
    """file for the profile"""
    device: str = "cpu"
    """cuda:0, cpu"""
    max_batch: int = 64
    """largest batch to measure"""
    repeat: int = 20
    """runs of each size; the slowest tenth decides"""
    json: bool = False
    """print JSON"""


def run(options: Options) -> int:
    """Measure, write, print."""
    from trainkit.serving.engine import ModelSource, measure

    text = Path(options.input).read_text() if options.input.endswith(".json") else options.input
    try:
        example = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--input is JSON, got {text[:60]!r}: {error}") from None
    profile = measure(
        ModelSource.parse(options.model), example, options.device, max_batch=options.max_batch, repeat=options.repeat
    )
    profile.save(options.out)
    table = profile.latency_ns
    if options.json:
        print(json.dumps({"latency_ns": table, "about": dict(profile.about)}, indent=1))
        return 0
    print(f"{options.model} on {profile.about['machine']}, written to {options.out}")
    size = 1
    while size <= len(table):
        print(f"  batch {size:4}   {table[size - 1] / 1e6:9.3f} ms   {size / table[size - 1] * 1e9:10.0f} requests/s")
        size = 2 * size
    return 0


SUBCOMMAND = Subcommand(
    name="serve profile",
    summary="measure a model's latency by batch size, which the server and its simulation need",
    options=Options,
    run=run,
    example="trainkit serve profile model.py:Classifier@last.ckpt --input example.json --device cuda:0 --out mnist.json",
)
