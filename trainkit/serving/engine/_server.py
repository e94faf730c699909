"""Start LitServe with the scheduler as its one inference worker."""

import contextlib
import multiprocessing
import os
import signal
from typing import Any

import litserve

from trainkit.serving.engine._http import Endpoints
from trainkit.serving.engine._logs import configure
from trainkit.serving.engine._loop import Api, SchedulerLoop
from trainkit.serving.engine._options import ServeError, ServeOptions


def serve(options: ServeOptions) -> None:
    """Serve until SIGINT or SIGTERM; open requests are answered first.

    Raises:
        ServeError: the address is taken, or a model does not load.
    """
    options.refuse_taken_port()
    configure(options.json)
    api = Api(options, loop=SchedulerLoop(), spec=Endpoints(options))
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=1, timeout=False, restart_workers=True, disable_openapi_url=True
    )
    serving = os.getpid()

    def stop(*_: Any) -> None:
        # the forked HTTP server inherits this, and drains by itself
        if os.getpid() == serving:
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    with contextlib.suppress(KeyboardInterrupt):
        try:
            server.run(
                host=options.host,
                port=options.port,
                num_api_servers=1,
                generate_client_file=False,
                log_level="warning",
                access_log=False,
                log_config=None,
            )
        except RuntimeError as error:
            raise ServeError(f"the server did not start: {error}") from None
        finally:
            # LitServe ends its processes only where it got as far as serving
            for child in multiprocessing.active_children():
                child.terminate()
