"""What runs on each GPU of the cluster, and how many of them Ray Serve keeps."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from trainkit.serving.engine._gpu import answers
from trainkit.serving.engine._models import ModelSource


class Worker:
    """All models on one device, one batch at a time."""

    def __init__(self, models: Mapping[str, ModelSource], device: str) -> None:
        self._predict = {name: source.load(device) for name, source in models.items()}
        self._wanted = 0

    async def __call__(
        self, replica: str | None, model: str, inputs: Sequence[Any], wanted: int
    ) -> list[tuple[bool, Any]]:
        """Run a batch; `replica` is the router's. Without a model it only hears how many replicas there should be."""
        self._wanted = wanted
        if not model:
            return []
        return await asyncio.to_thread(answers, self._predict[model], inputs)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the ingress wants, on its way to `replicas_wanted` in Ray Serve's controller."""
        return {"wanted": float(self._wanted)}


def replicas_wanted(context: Any) -> tuple[int, dict[str, Any]]:
    """Ray Serve's autoscaling policy: what the scheduler's own signals asked for, as the ingress told the workers."""
    told = (context.aggregated_metrics or {}).get("wanted", {})
    return int(max(told.values(), default=0)) or context.target_num_replicas, {}
