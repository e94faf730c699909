"""How a request's tokens are drawn, and what comes back of them."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Sampling:
    """From softmax(logits / temperature), cut to the top k, the smallest set with mass top_p, and min_p of the likeliest.

    Raises:
        ValueError: a number out of its range.
    """

    temperature: float = 1.0
    """0: the likeliest."""
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    """The same seed, prompt and model give the same tokens, whatever else is in the batch (but for rounding, which may differ
    with the batch's size); None draws one."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature}: 0 takes the likeliest")
        if self.top_k is not None and not 1 <= self.top_k < 1 << 30:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}: None turns it off")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}: 1 turns it off")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p must be from 0 to 1, got {self.min_p}: 0 turns it off")
        if self.seed is not None and not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed must be of 32 bits, got {self.seed}: take a smaller one")


class Token(NamedTuple):
    """One token of one request."""

    id: int
    token: int
    finished: str | None
    """None, "stop" (it is one of the stop tokens) or "length"."""
