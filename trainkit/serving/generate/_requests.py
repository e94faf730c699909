"""How tokens are drawn, and how they come."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    Attributes:
        temperature: 0: always the likeliest token.
        top_k: only the k likeliest.
        top_p: only the likeliest that together have this probability.
        min_p: only those with this share of the likeliest one's probability.
        seed: the same seed, prompt and model give the same tokens.

    Raises:
        ValueError: a number is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError(f"temperature is from 0 on, top_p above 0 to 1, min_p from 0 to 1, got {self}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is from 1 on, got {self.top_k}")


class Token(NamedTuple):
    """One request's next token; `finished` is None, "stop" or "length"."""

    id: int
    token: int
    finished: str | None
