"""`generate`: all prompts through an engine, in their order."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from trainkit.serving.generate._engine import Engine
from trainkit.serving.generate._sampling import Sampling


def generate(
    model: nn.Module, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, sampling: Sampling | None = None,
    stop: Sequence[int] = (), **engine: Any,
) -> list[list[int]]:  # fmt: skip
    """New tokens of every prompt, by continuous batching.

    Args:
        model: as `Engine` takes it.
        prompts: tokens.
        max_new_tokens: of each.
        sampling: of each; prompt i draws with seed + i, where there is a seed.
        stop: tokens that end a request, beside the engine's `eos`.
        engine: `Engine`'s arguments; `device` is by default where the model is.

    Returns:
        The new tokens, stop tokens included.

    Raises:
        ValueError: a prompt that can never run.

    Example:
        >>> generate(model, [[72, 105], [80]], max_new_tokens=16, sampling=Sampling(temperature=0.7, top_p=0.9, seed=0))
    """
    parameter = next(model.parameters(), None)
    engine.setdefault("device", "cpu" if parameter is None else parameter.device)
    running = Engine(model, **engine)
    sampling = Sampling() if sampling is None else sampling
    for i, prompt in enumerate(prompts):
        seed = None if sampling.seed is None else (sampling.seed + i) % (1 << 32)
        own = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, seed)
        running.add_request(i, prompt, max_new_tokens=max_new_tokens, sampling=own, stop=stop)
    found: list[list[int]] = [[] for _ in prompts]
    while running.running:
        for token in running.step():
            found[token.id].append(token.token)
    return found
