"""Ray Serve's own batching over the same sleeping workers: PORT MAX_BATCH WAIT_S ROUTER (default or capacity)."""

import sys
import time

import ray
from _sleeping import load
from ray import serve
from ray.serve.config import HTTPOptions, RequestRouterConfig

PORT, MAX_BATCH, WAIT_S, ROUTER = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
MORE = {}
if ROUTER == "capacity":
    from ray.serve.experimental.capacity_queue_router import CapacityQueueRouter

    MORE["request_router_config"] = RequestRouterConfig(request_router_class=CapacityQueueRouter)


@serve.deployment(num_replicas=8, max_ongoing_requests=2 * MAX_BATCH, ray_actor_options={"num_cpus": 0}, **MORE)
class Squares:
    """What `_sleeping.load` computes."""

    def __init__(self):
        self.run_batch = load("cpu")

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=WAIT_S, max_concurrent_batches=1)
    async def many(self, inputs):
        import asyncio

        outputs = await asyncio.to_thread(self.run_batch, inputs)
        return [(output, len(inputs)) for output in outputs]

    async def __call__(self, request):
        if request.method == "GET":
            return "ok"
        output, batch = await self.many((await request.json())["input"])
        return {"output": output, "batch": batch}


if __name__ == "__main__":
    ray.init(num_cpus=4, include_dashboard=False, _node_ip_address="127.0.0.1", object_store_memory=100_000_000)
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=PORT))
    serve.run(Squares.bind())
    time.sleep(10_000)
