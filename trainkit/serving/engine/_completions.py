"""OpenAI's completions: what may be asked for, and how answers and their pieces look."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainkit.serving.engine._requests import Refused

_STOPS = 4  # OpenAI's limit
# Asked for with these values, a parameter changes nothing; with others it is refused rather than passed over.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
}
_IGNORED = {"user", "model", "prompt", "stream", "stream_options"}


@dataclass(frozen=True)
class Ask:
    """One prompt and how it goes on; `prompt` is text or token numbers."""

    prompt: str | tuple[int, ...]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int | None
    min_p: float
    seed: int | None
    stop: tuple[str, ...]


@dataclass(frozen=True)
class Piece:
    """More of an answer.

    Attributes:
        text: what is new.
        tokens: generated until now.
        prompt_tokens: of the prompt.
        finish: None, "stop" or "length".
    """

    text: str
    tokens: int
    prompt_tokens: int
    finish: str | None


def _number(body: Mapping[str, Any], key: str, default: Any, low: float, high: float, whole: bool = False) -> Any:
    value = body.get(key)
    if value is None:
        return default
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise Refused(
            400, f"{key} is {'a whole number' if whole else 'a number'} from {low} to {high}, got {value!r:.40}"
        )
    return value


def _prompts(given: Any) -> list[str | tuple[int, ...]]:
    def tokens(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(type(t) is int and t >= 0 for t in value)

    if isinstance(given, str):
        return [given]
    if tokens(given):
        return [tuple(given)]
    if isinstance(given, list) and 0 < len(given) <= 128 and all(isinstance(p, str) or tokens(p) for p in given):
        return [p if isinstance(p, str) else tuple(p) for p in given]
    raise Refused(400, "prompt is a text, a list of token numbers, or a list of up to 128 of those")


def read(body: Mapping[str, Any]) -> list[Ask]:
    """What is asked for, by prompt.

    Raises:
        Refused: a parameter is out of its range, or would be passed over.
    """
    for key, value in body.items():
        if value is not None and key in _NEUTRAL and value not in _NEUTRAL[key]:
            raise Refused(400, f"{key} is not offered, got {value!r:.40}")
    known = {"max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop"} | _IGNORED | set(_NEUTRAL)
    if unknown := set(body) - known:
        raise Refused(400, f"there is no parameter {min(unknown)!r:.40}")
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > _STOPS or not all(isinstance(s, str) and s for s in stop):
        raise Refused(400, f"stop is a text or up to {_STOPS} texts")
    if not isinstance(body.get("stream", False), bool):
        raise Refused(400, "stream is true or false")
    common: dict[str, Any] = {
        "max_tokens": _number(body, "max_tokens", 16, 1, 10**6, whole=True),
        "temperature": float(_number(body, "temperature", 1.0, 0, 2)),
        "top_p": float(_number(body, "top_p", 1.0, 0, 1)),
        "top_k": _number(body, "top_k", None, 1, 10**6, whole=True),
        "min_p": float(_number(body, "min_p", 0.0, 0, 1)),
        "seed": _number(body, "seed", None, 0, 2**63 - 1, whole=True),
        "stop": tuple(stop),
    }
    return [Ask(prompt=prompt, **common) for prompt in _prompts(body.get("prompt"))]


class Answer:
    """The frame around a completion's pieces."""

    def __init__(self, uid: str, model: str, prompts: int) -> None:
        self._frame = {"id": f"cmpl-{uid}", "object": "text_completion", "created": int(time.time()), "model": model}
        self._texts = [""] * prompts
        self._finish: list[str | None] = [None] * prompts
        self._tokens, self._prompt_tokens = [0] * prompts, [0] * prompts

    def add(self, index: int, piece: Piece) -> None:
        """Take a piece of prompt number `index`."""
        self._texts[index] += piece.text
        self._finish[index] = piece.finish
        self._tokens[index], self._prompt_tokens[index] = piece.tokens, piece.prompt_tokens

    def _choice(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}

    @property
    def usage(self) -> dict[str, int]:
        """Tokens until now."""
        prompt, completion = sum(self._prompt_tokens), sum(self._tokens)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [self._choice(*one) for one in zip(range(len(self._texts)), self._texts, self._finish, strict=True)]
        return self._frame | {"choices": choices, "usage": self.usage}

    def event(self, index: int, piece: Piece) -> bytes:
        """A piece as a server-sent event."""
        return event(self._frame | {"choices": [self._choice(index, piece.text, piece.finish)]})

    def last_event(self) -> bytes:
        """The usage as an event."""
        return event(self._frame | {"choices": [], "usage": self.usage})


def event(data: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(data)}\n\n".encode()


DONE = b"data: [DONE]\n\n"


def held(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of `text` that may be the beginning of a stop text."""
    longest = max((len(stop) for stop in stops), default=0)
    for size in range(min(longest - 1, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return size
    return 0
