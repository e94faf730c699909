"""Serve the demo's GPT behind OpenAI's /v1/completions and let it go on: `python examples/serve_gpt.py`.

The weights are random; a trained model's: `trainkit serve gpt=examples/serve_gpt.py:load@runs/demo/autolrs.ckpt --ttft 200ms`.
"""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request

import torch

from trainkit.demo import SIZES, Config
from trainkit.demo._model import GPT
from trainkit.serving.engine import LanguageModel
from trainkit.serving.generate import Engine

URL = "http://127.0.0.1:8022"


def load(device, checkpoint=None):
    """A language model for `trainkit serve`: bytes are its tokens."""
    if checkpoint is None:
        torch.manual_seed(0)
        model = GPT(SIZES["tiny"], vocab=256, rate=1e-3)
    else:
        config = Config.load(checkpoint.parent)
        model = GPT(config.shape, vocab=config.vocab, rate=1e-3)
        model.load_state_dict(torch.load(checkpoint, map_location="cpu")["state_dict"])
    engine = Engine(model, device=device)
    return LanguageModel(
        engine, lambda text: list(text.encode()), lambda tokens: bytes(tokens).decode("utf-8", "replace")
    )


def main() -> None:
    """Serve, then print a text as it comes."""
    command = [sys.executable, "-m", "trainkit", "serve", f"gpt={__file__}:load", "--ttft", "5s"]
    server = subprocess.Popen([*command, "--listen", URL.removeprefix("http://")])
    try:
        while server.poll() is None:
            try:
                urllib.request.urlopen(URL + "/health").close()
                break
            except (OSError, urllib.error.HTTPError):
                time.sleep(0.2)
        body = {"prompt": "def main():", "max_tokens": 32, "temperature": 0.8, "seed": 1, "stream": True}
        with urllib.request.urlopen(URL + "/v1/completions", json.dumps(body).encode(), timeout=60) as reply:
            for line in reply:
                data = line.decode().removeprefix("data: ").strip()
                if data.startswith("{"):
                    print(json.loads(data)["choices"][0]["text"], end="", flush=True)
        print()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
