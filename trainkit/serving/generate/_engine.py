"""`Engine`: continuous batching, prompts in chunks, prefixes shared, pages given back and taken.

Iteration-level scheduling is Orca's (Yu et al., OSDI 2022), pages are vLLM's (arXiv 2309.06180), chunks beside decoding are
Sarathi's (arXiv 2403.02310).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trainkit.kernels import sample
from trainkit.serving.generate._batch import Cache, Part
from trainkit.serving.generate._decoder import decoder_of
from trainkit.serving.generate._sampling import Sampling, Token
from trainkit.serving.kv_cache import Held, OutOfPages, Pages


@dataclass(eq=False)
class _Request:
    id: int
    tokens: list[int]
    """The prompt, and what was drawn."""
    prompt: int
    """Tokens of the prompt."""
    most: int
    """Tokens to draw."""
    sampling: Sampling
    seed: int
    stop: frozenset[int]
    held: Held | None = None
    cached: int = 0
    """Tokens whose keys and values are in its pages."""
    fed: int = field(default=0)
    """Tokens of this iteration."""

    @property
    def drawn(self) -> int:
        return len(self.tokens) - self.prompt


class Engine:
    """One model on one device, driven by one thread.

    Args:
        model: a causal language model of transformers, or one with `next_logits` and `cache_shape` (the demo's GPT).
        device: where it runs; the model is moved there.
        num_pages: of the cache; default room for `max_batch` requests of the model's full length, at most 2 GiB.
        page_size: tokens of a page.
        max_batch: requests computed at a time.
        max_step_tokens: tokens of an iteration: what decoding leaves of it goes to prompts, which are cut to fit.
        eos: a token, or several, that ends every request.
        backend: of `PagedAttention`.
        cuda_graphs: on a GPU, decode by CUDA graphs, one for each power of two of requests (models with `next_logits` alone).

    Raises:
        ValueError: a model of no known kind, or numbers that leave no room.

    Example:
        >>> engine = Engine(model)
        >>> engine.add_request(0, [72, 105], max_new_tokens=8)
        >>> while engine.running:
        ...     for token in engine.step(): ...
    """

    MOST_BYTES = 2 << 30

    def __init__(
        self, model: nn.Module, *, device: torch.device | str = "cpu", num_pages: int | None = None, page_size: int = 16,
        max_batch: int = 64, max_step_tokens: int = 512, eos: int | Sequence[int] | None = None, backend: str = "auto",
        cuda_graphs: bool = False,
    ) -> None:  # fmt: skip
        if max_batch < 1 or max_step_tokens < max_batch:
            raise ValueError(
                "max_batch must be at least 1 and max_step_tokens at least max_batch (each request decodes one token), got"
                f" {max_batch} and {max_step_tokens}"
            )
        self._decoder, dtype = decoder_of(model.to(device).eval())
        shape = self._decoder.shape
        if num_pages is None:
            token = 2 * shape.layers * shape.kv_heads * shape.head_dim * dtype.itemsize
            wanted = max_batch * -(-shape.max_length // page_size)
            num_pages = max(1, min(wanted, self.MOST_BYTES // (token * page_size)))
        self.pages = Pages(num_pages, page_size)
        self._cache = Cache(shape, num_pages, page_size, dtype, torch.device(device), backend)
        self.max_batch, self.max_step_tokens, self.num_pages = max_batch, max_step_tokens, num_pages
        self.max_length = min(shape.max_length, num_pages * page_size)
        self._eos = frozenset(() if eos is None else (eos,) if isinstance(eos, int) else eos)
        self._graphed = cuda_graphs and torch.device(device).type == "cuda" and self._decoder.capturable
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._waiting: deque[_Request] = deque()
        self._active: list[_Request] = []
        self._ids: set[int] = set()

    @property
    def running(self) -> int:
        """Requests inside: waiting, in prefill, or decoding."""
        return len(self._ids)

    @property
    def free_pages(self) -> int:
        """Pages that a request can have."""
        return self.pages.free

    def add_request(
        self,
        id: int,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[int] = (),
    ) -> None:
        """Queue a request, first come first served.

        Raises:
            ValueError: a request that can never run, or an id in use.
        """
        tokens, vocab = [int(t) for t in prompt], self._decoder.shape.vocab
        if id in self._ids:
            raise ValueError(f"id must not be in use, got {id}: wait for its end, or cancel it")
        if not tokens:
            raise ValueError("a prompt must have a token, got none: begin with the model's first token")
        wrong = next((t for t in tokens if not 0 <= t < vocab), None)
        if wrong is not None:
            raise ValueError(f"a token must be from 0 to {vocab - 1}, got {wrong}: is it another model's tokenizer?")
        if max_new_tokens < 1 or len(tokens) + max_new_tokens > self.max_length:
            raise ValueError(
                f"prompt and new tokens must be {self.max_length} at most, and one of them new, got {len(tokens)} and"
                f" {max_new_tokens}: shorten the prompt, or give the cache more pages"
            )
        sampling = Sampling() if sampling is None else sampling
        seed = int(torch.randint(2**31, ()).item()) if sampling.seed is None else sampling.seed
        stops = self._eos | frozenset(stop)
        self._waiting.append(_Request(id, tokens, len(tokens), max_new_tokens, sampling, seed, stops))
        self._ids.add(id)

    def fits(self, prompt: Sequence[int], max_new_tokens: int) -> bool:
        """Whether a request would begin at the next step."""
        if self.running >= self.max_batch or len(prompt) + max_new_tokens > self.max_length:
            return False
        # Those inside may each need another page at once, and those that have not begun all of theirs.
        ahead = sum(self.pages.need(request.tokens) for request in self._waiting) + self.running
        return self.pages.need(list(prompt)) + ahead < self.pages.free

    def cancel(self, id: int) -> None:
        """End a request, if it is inside; its pages come back."""
        if id in self._ids:
            self._ids.discard(id)
            for request in (*self._active, *self._waiting):
                if request.id == id:
                    self._release(request)
            self._active = [r for r in self._active if r.id != id]
            self._waiting = deque(r for r in self._waiting if r.id != id)

    def _release(self, request: _Request) -> None:
        if request.held is not None:
            self.pages.close(request.held)
        request.held, request.cached, request.fed = None, 0, 0

    def _preempt(self) -> None:
        """The newest request starts again later, from its prompt and what it has drawn."""
        newest = self._active.pop()
        self._release(newest)
        self._waiting.appendleft(newest)

    def _feed(self, request: _Request, most: int) -> bool:
        """Give a request pages for tokens of this iteration; False where it had to go itself."""
        request.fed = min(most, len(request.tokens) - request.cached)
        while True:
            try:
                assert request.held is not None
                self.pages.grow(request.held, request.cached + request.fed)
                return True
            except OutOfPages:
                self._preempt()
                if request not in self._active:
                    return False

    def _schedule(self) -> list[_Request]:
        """Who computes what: all who decode, then prompts, the oldest first."""
        budget = self.max_step_tokens
        for request in self._active:
            request.fed = 0
        for decoding in (True, False):
            for request in list(self._active):
                turn = request in self._active and (len(request.tokens) - request.cached == 1) == decoding
                if turn and budget and self._feed(request, 1 if decoding else budget):
                    budget -= request.fed
        while self._waiting and len(self._active) < self.max_batch and budget:
            request = self._waiting[0]
            if self.pages.need(request.tokens) + (1 if self._active else 0) > self.pages.free:
                break
            self._waiting.popleft()
            request.held, request.cached = self.pages.open(request.tokens)
            self._active.append(request)
            self._feed(request, budget)
            budget -= request.fed
        return [r for r in self._active if r.fed]

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """One iteration.

        Returns:
            At most one token of each request.
        """
        parts = self._schedule()
        if not parts:
            return []
        drawing = [i for i, r in enumerate(parts) if r.cached + r.fed == len(r.tokens)]
        logits = self._logits(parts, drawing)
        drawn = self._draw(logits, [parts[i] for i in drawing]) if drawing else []
        for request in parts:
            request.cached += request.fed
            assert request.held is not None
            self.pages.keep(request.held, request.tokens[: request.cached])
        found = []
        for i, token in zip(drawing, drawn, strict=True):
            request = parts[i]
            request.tokens.append(token)
            ended = "stop" if token in request.stop else "length" if request.drawn == request.most else None
            found.append(Token(request.id, token, ended))
            if ended:
                self._release(request)
                self._active.remove(request)
                self._ids.discard(request.id)
        return found

    def _logits(self, requests: list[_Request], drawing: list[int]) -> Tensor:
        """Of those who draw; decoding alone on a GPU is a CUDA graph for each power of two of requests."""
        parts = [
            Part(r.tokens[r.cached : r.cached + r.fed], r.cached, r.held.pages if r.held else ()) for r in requests
        ]
        if not self._graphed or len(drawing) < len(parts) or any(r.fed > 1 for r in requests):
            tokens, positions, rows = self._cache.begin(parts)
            if len(drawing) < len(parts):
                rows = rows[torch.tensor(drawing, dtype=torch.int64, device=rows.device)]
            return self._decoder(tokens, positions, rows, self._cache.attend)
        places = 1 << (len(parts) - 1).bit_length()
        batch = self._cache.begin(parts, places)
        known = self._graphs.get(places)
        if known is None:
            # Once before: what is compiled or planned on first use is not captured.
            self._decoder(*batch, self._cache.attend)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._decoder(*batch, self._cache.attend)
            known = self._graphs[places] = graph, logits
        self._cache.replan()
        known[0].replay()
        return known[1][: len(parts)]

    def _draw(self, logits: Tensor, requests: list[_Request]) -> list[int]:
        if all(r.sampling.temperature == 0.0 for r in requests):
            return logits.argmax(-1).tolist()  # type: ignore[no-any-return]
        said = [r.sampling for r in requests]
        floats = torch.tensor([[s.temperature, s.top_p, s.min_p] for s in said], dtype=torch.float32)
        counts = torch.tensor([[s.top_k or 0, r.seed, r.drawn] for s, r in zip(said, requests, strict=True)])
        temperature, top_p, min_p = floats.T.contiguous().to(logits.device)
        top_k, seed, step = counts.T.contiguous().to(logits.device)
        drawn = sample(
            logits, temperature=temperature, top_k=top_k.int(), top_p=top_p, min_p=min_p, seed=seed, step=step
        )  # fmt: skip
        return drawn.tolist()  # type: ignore[no-any-return]
