"""BentoML's adaptive batching over the same sleeping workers; MAX_BATCH and LATENCY_MS are in the environment."""

import os

import bentoml
from _sleeping import load


@bentoml.service(workers=8, traffic={"timeout": 30, "max_concurrency": 1000})
class Squares:
    """What `_sleeping.load` computes."""

    def __init__(self):
        self.run_batch = load("cpu")

    @bentoml.api(
        route="/predict",
        batchable=True,
        max_batch_size=int(os.environ.get("MAX_BATCH", "16")),
        max_latency_ms=int(os.environ.get("LATENCY_MS", "500")),
    )
    def predict(self, input: list[int]) -> list[dict]:
        return [{"output": output, "batch": len(input)} for output in self.run_batch(input)]
