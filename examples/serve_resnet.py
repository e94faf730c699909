"""Measure an image classifier, ask how many devices a load needs, serve it, ask it: `python examples/serve_resnet.py`.

A ResNet of transformers with random weights and small pictures, so that it runs anywhere in a minute; your own folder
of `save_pretrained`, your LightningModule with its checkpoint, or a function go the same way.
"""

import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch
import transformers

from trainkit.serving import gpus_needed
from trainkit.serving.engine import ModelSource, measure

URL, PICTURE = "http://127.0.0.1:8021", torch.zeros(3, 32, 32).tolist()


def ask(path: str, body: object = None) -> str:
    """The server's answer."""
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(URL + path, data), timeout=30) as reply:
        return reply.read().decode()


def main() -> None:
    """Profile, plan, serve, ask."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1])
        transformers.ResNetForImageClassification(config).save_pretrained(folder)
        profile = measure(ModelSource.parse(f"hf:{folder}"), PICTURE, "cpu", max_batch=8, repeat=5)
        profile.save(Path(folder) / "profile.json")
        one, eight = (profile.latency_ns[size - 1] / 1e6 for size in (1, 8))
        print(f"a batch of 1 takes {one:.1f} ms, of 8 {eight:.1f} ms")
        slo_ms = 500 + 4 * eight
        print(f"100 requests/s need {gpus_needed({'resnet': profile}, {'resnet': 100.0}, slo_ms=slo_ms)} such devices")
        command = [sys.executable, "-m", "trainkit", "serve", f"resnet=hf:{folder}", "--slo", f"{slo_ms:.0f}ms"]
        command += ["--profile", f"{folder}/profile.json", "--listen", URL.removeprefix("http://"), "--margin", "200ms"]
        server = subprocess.Popen(command)
        try:
            while server.poll() is None:
                try:
                    ask("/health")
                    break
                except (OSError, urllib.error.HTTPError):
                    time.sleep(0.2)
            answer = json.loads(ask("/v1/models/resnet:predict", {"input": PICTURE}))
            print(f"label {answer['output']['label']}, in a batch of {answer['batch']}; its metrics:")
            print("\n".join(line for line in ask("/metrics").splitlines() if "requests_total{" in line))
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
