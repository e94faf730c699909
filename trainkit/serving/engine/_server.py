"""Start LitServe with the scheduler as its one inference worker."""

import contextlib
import signal
from typing import Any

import litserve

from trainkit.serving.engine._http import Endpoints
from trainkit.serving.engine._loop import Api, SchedulerLoop
from trainkit.serving.engine._options import ServeError, ServeOptions


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def serve(options: ServeOptions) -> None:
    """Serve until SIGINT or SIGTERM; open requests are answered first.

    Raises:
        ServeError: the address is taken, or a model does not load.
    """
    options.refuse_taken_port()
    api = Api(options, loop=SchedulerLoop(), spec=Endpoints(options))
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=1, timeout=False, restart_workers=True, disable_openapi_url=True
    )
    signal.signal(signal.SIGTERM, _interrupt)
    with contextlib.suppress(KeyboardInterrupt):
        try:
            server.run(
                host=options.host,
                port=options.port,
                num_api_servers=1,
                generate_client_file=False,
                log_level="warning",
                access_log=False,
            )
        except RuntimeError as error:
            raise ServeError(f"the server did not start: {error}") from None
