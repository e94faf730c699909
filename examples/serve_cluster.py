"""Ray Serve carries the scheduler over a cluster, and worker replicas follow the load: `python examples/serve_cluster.py`.

Here Ray runs on this machine alone. On a cluster, `ray.init(address="auto")` and devices=("cuda",) are all that changes;
`trainkit serve ... --ray ADDRESS --scale 2:64` does the same from the command line.
"""

import json
import time
import urllib.request

import ray
from ray import serve
from ray.serve.config import HTTPOptions

from trainkit.serving import Profile
from trainkit.serving.autoscaling import Autoscaler
from trainkit.serving.cluster import application
from trainkit.serving.engine import ModelSource, ServeOptions

PORT = 8023


def load(device):
    """A model that takes as long as ResNet50 took on a GPU of 2017, twenty times over."""

    def predict(inputs):
        time.sleep(0.020 * (1.053 * len(inputs) + 5.072))
        return [value * value for value in inputs]

    return predict


def main() -> None:
    """Deploy, ask, take down."""
    options = ServeOptions(
        models={"squares": ModelSource.parse(f"{__file__}:load")},
        profiles={"squares": Profile.linear(20 * 1.053, 20 * 5.072, 32)},
        slo_ms={"squares": 2000.0},
        margin_ms=200.0,
    )
    ray.init(num_cpus=4, include_dashboard=False, _node_ip_address="127.0.0.1")
    try:
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=PORT))
        serve.run(application(options, autoscaler=Autoscaler(1, 4), cpus_a_worker=0))
        body = json.dumps({"input": 12}).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/predict", body, timeout=60) as reply:
            print(json.load(reply))
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
