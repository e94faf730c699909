"""A language model whose every token is known: the alphabet goes on from the last byte of the prompt."""

import time

from trainkit.serving.engine import LanguageModel

STEP_S, PAGE, END = 0.01, 16, 0


def follow(token):
    """The next byte: z and 255 end the text, A is followed by a character of two bytes."""
    if token == ord("z"):
        return END
    return {ord("A"): 0xC3, 0xC3: 0xA9, 0xA9: ord("B")}.get(token, (token + 1) % 256)


class Alphabet:
    """Pages are counted as a KV cache would need them; a step takes a while, whatever it holds."""

    def __init__(self, num_pages=16, max_batch=8):
        self.num_pages, self.max_batch, self.max_length = num_pages, max_batch, num_pages * PAGE
        self._texts, self._left, self._pages = {}, {}, {}

    @property
    def running(self):
        return len(self._texts)

    @property
    def free_pages(self):
        return self.num_pages - sum(self._pages.values())

    def fits(self, prompt, max_new_tokens):
        return self.running < self.max_batch and -(-(len(prompt) + max_new_tokens) // PAGE) <= self.free_pages

    def add_request(self, id, prompt, *, max_new_tokens, sampling, stop=()):
        if not prompt:
            raise ValueError("a prompt has at least one token, got none")
        if len(prompt) + max_new_tokens > self.max_length:
            raise ValueError(f"prompt and new tokens are at most {self.max_length}, got {len(prompt) + max_new_tokens}")
        self._texts[id], self._left[id] = prompt[-1], max_new_tokens
        self._pages[id] = -(-(len(prompt) + max_new_tokens) // PAGE)

    def cancel(self, id):
        for one in (self._texts, self._left, self._pages):
            one.pop(id, None)

    def step(self):
        time.sleep(STEP_S)
        found = []
        for id, last in list(self._texts.items()):
            self._texts[id] = token = follow(last)
            self._left[id] -= 1
            finish = "stop" if token == END else "length" if self._left[id] == 0 else None
            found.append((id, token, finish))
            if finish:
                self.cancel(id)
        return found


def load(device):
    """Without torch, so that a process is up soon."""
    return LanguageModel(
        Alphabet(), lambda text: list(text.encode()), lambda t: bytes(t).decode("utf-8", "replace"), dict
    )
