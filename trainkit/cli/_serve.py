"""`trainkit serve`: answer requests within an objective."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainkit.cli._subcommand import Subcommand


@dataclass(frozen=True)
class Options:
    """Options of the server."""

    models: str = field(metadata={"positional": True})
    """by commas: NAME=MODULE:ATTRIBUTE, NAME=FILE.py:ATTRIBUTE (with @CHECKPOINT) or NAME=hf:FOLDER"""
    profile: str | None = None
    """file of `trainkit serve profile` for each model, by commas"""
    slo: str | None = None
    """from arrival to answer: 50ms, or one for each model by commas"""
    ttft: str | None = None
    """the models are language models; from arrival to the first token: 200ms"""
    tpot: str | None = None
    """between tokens: while steps take longer, no new text is begun"""
    devices: str = "cpu"
    """by commas, a GPU process each: cuda:0,cuda:1, or cpu"""
    listen: str = "127.0.0.1:8000"
    """HOST:PORT; an address that others reach needs a token"""
    token_file: Path | None = None
    """file with the bearer token that requests must carry"""
    insecure: bool = False
    """serve others without a token"""
    margin: str = "5ms"
    """what HTTP may take: batches aim this much before the deadline"""
    drop: str = "window"
    """window, timeout or auto: which requests are given up under load"""
    max_body: str = "8MiB"
    """larger request bodies are refused"""
    max_waiting: int = 10_000
    """more open requests than this are refused"""
    ray: str | None = None
    """serve by Ray Serve: local, or a Ray cluster's address"""
    scale: str | None = None
    """with --ray, LEAST:MOST worker replicas, as the load needs; else one for each of --devices"""
    json: bool = False
    """log JSON, a line an event"""


def run(options: Options) -> int:
    """Start the server; returns when it is stopped."""
    from trainkit.cli._quantities import seconds, sizes
    from trainkit.serving import Profile

    try:
        from trainkit.serving.engine import Language, ModelSource, Objective, ServeOptions, serve
    except ModuleNotFoundError as error:
        raise ValueError(
            f"serving needs the package {error.name}: pip install 'litserve>=0.2.19,<0.3' prometheus-client"
        ) from None

    models = {}
    for part in options.models.split(","):
        name, equals, source = part.partition("=")
        if not equals:
            name, source = part.rpartition(":")[2].partition("@")[0], part
        if name in models:
            raise ValueError(f"a model's name is used once, got {name!r} again: NAME=MODULE:ATTRIBUTE names it")
        models[name] = ModelSource.parse(source)
    served: dict[str, Any]
    if options.ttft is not None:
        if options.profile is not None or options.slo is not None:
            raise ValueError(
                "--ttft is for language models, --profile and --slo are for others: two servers serve both"
            )
        tpot = None if options.tpot is None else seconds(options.tpot) * 1e3
        objective = Objective(seconds(options.ttft) * 1e3, tpot)
        served = {"languages": {name: Language(source, objective) for name, source in models.items()}}
    else:
        if options.profile is None or options.slo is None:
            raise ValueError("a model needs --profile and --slo, a language model --ttft")
        files, objectives = options.profile.split(","), options.slo.split(",")
        objectives = objectives * len(models) if len(objectives) == 1 else objectives
        if len(files) != len(models) or len(objectives) != len(models):
            raise ValueError(
                f"--profile has a file for each of the {len(models)} models, --slo one value or one for each"
            )
        served = {
            "models": models,
            "profiles": {name: Profile.load(file) for name, file in zip(models, files, strict=True)},
            "slo_ms": {name: seconds(text) * 1e3 for name, text in zip(models, objectives, strict=True)},
        }
    host, colon, port = options.listen.rpartition(":")
    if not colon or not port.isdigit():
        raise ValueError(f"--listen is HOST:PORT, got {options.listen!r}")
    how = ServeOptions(
        **served,
        devices=tuple(options.devices.split(",")),
        host=host.strip("[]"),
        port=int(port),
        token_file=options.token_file,
        insecure=options.insecure,
        margin_ms=seconds(options.margin) * 1e3,
        drop=options.drop,  # type: ignore[arg-type]
        max_body_bytes=sizes(options.max_body)[0],
        max_waiting=options.max_waiting,
        json=options.json,
    )
    if options.ray is None:
        if options.scale is not None:
            raise ValueError("--scale is for --ray: LitServe's processes are as many as --devices")
        serve(how)
        return 0
    try:
        import ray.serve  # noqa: F401

        from trainkit.serving.cluster import serve_on_ray
    except ModuleNotFoundError as error:
        raise ValueError(f"--ray needs the package {error.name}: pip install 'ray[serve]>=2.55,<3'") from None
    serve_on_ray(how, address=None if options.ray == "local" else options.ray, autoscaler=_autoscaler(options.scale))
    return 0


def _autoscaler(text: str | None) -> Any:
    from trainkit.serving.autoscaling import Autoscaler

    if text is None:
        return None
    least, colon, most = text.partition(":")
    if not colon or not least.isdigit() or not most.isdigit():
        raise ValueError(f"--scale is LEAST:MOST, got {text!r}")
    return Autoscaler(int(least), int(most))


SUBCOMMAND = Subcommand(
    name="serve",
    summary="serve models over HTTP within a latency objective, on as few GPUs as the load needs",
    options=Options,
    run=run,
    example="trainkit serve mnist=model.py:Classifier@last.ckpt --profile mnist.json --slo 50ms --devices cuda:0",
)
