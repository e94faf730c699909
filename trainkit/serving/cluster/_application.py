"""The Ray Serve application: an ingress replica with the scheduler, worker replicas that it pins."""

import contextlib
import time
from typing import Any

from trainkit.serving.autoscaling import Autoscaler
from trainkit.serving.engine._options import ServeError, ServeOptions


def application(options: ServeOptions, *, autoscaler: Autoscaler | None = None, cpus_a_worker: float = 1.0) -> Any:
    """For `ray.serve.run`, or a Serve config file.

    Args:
        options: the models, profiles and objectives; a worker replica for each of `devices`, which are all alike
            ("cuda" takes one GPU each, "cpu" none).
        autoscaler: between how many workers, and when; None: as many as devices.
        cpus_a_worker: what Ray reserves for each.

    Raises:
        ServeError: devices of different kinds, or language models, which need LitServe's side.
    """
    from ray import serve
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

    from trainkit.serving.cluster._ingress import Ingress
    from trainkit.serving.cluster._router import Pinned
    from trainkit.serving.cluster._worker import Worker, replicas_wanted

    kinds = {device.partition(":")[0] for device in options.devices}
    if len(kinds) > 1:
        raise ServeError(f"workers of a cluster are all alike, got devices {', '.join(options.devices)}")
    if options.languages:
        raise ServeError("language models are served on one machine: leave the cluster out")
    device = kinds.pop()
    scale: dict[str, Any] = {"num_replicas": len(options.devices)}
    if autoscaler is not None:
        scale = {
            "num_replicas": "auto",
            "autoscaling_config": AutoscalingConfig(
                min_replicas=autoscaler.least,
                max_replicas=autoscaler.most,
                initial_replicas=autoscaler.least,
                # our autoscaler has waited already
                upscale_delay_s=0,
                downscale_delay_s=0,
                metrics_interval_s=1,
                look_back_period_s=2,
                policy=AutoscalingPolicy(policy_function=replicas_wanted),
            ),
        }
    worker = serve.deployment(
        **scale,
        max_ongoing_requests=3,  # a batch, and the ingress' word
        ray_actor_options={"num_cpus": cpus_a_worker, "num_gpus": 1 if device == "cuda" else 0},
        request_router_config=RequestRouterConfig(request_router_class=Pinned),
    )(Worker).bind(options.models, "cuda:0" if device == "cuda" else device)
    ingress = serve.deployment(
        num_replicas=1, max_ongoing_requests=2 * options.max_waiting, ray_actor_options={"num_cpus": 0}
    )(Ingress)
    return ingress.bind(options, autoscaler, worker)


def serve_on_ray(options: ServeOptions, *, address: str | None = None, autoscaler: Autoscaler | None = None) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        options: as in `application`; host and port are those of Ray Serve's proxy.
        address: of a running Ray cluster; None: one on this machine alone.
        autoscaler: as in `application`.

    Raises:
        ServeError: the address is taken, or a model does not load.
    """
    import signal

    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    served = application(options, autoscaler=autoscaler, cpus_a_worker=1.0 if address else 0.0)
    options.refuse_taken_port()
    local: dict[str, Any] = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    ray.init(address, **({} if address else local))
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stopped.append(number))
    try:
        serve.start(http_options=HTTPOptions(host=options.host, port=options.port))
        serve.run(served)
        while not stopped:
            time.sleep(0.2)
    except RuntimeError as error:
        raise ServeError(f"the application did not start: {error}") from None
    finally:
        with contextlib.suppress(Exception):
            serve.shutdown()
        ray.shutdown()
