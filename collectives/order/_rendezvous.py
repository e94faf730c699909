"""torchrun's rendezvous with planned ranks: `torchrun --rdzv-backend trainkit --rdzv-conf plan=rank_order.json ...`.

torch's own c10d rendezvous does the work: elastic sizes, restarts, timeouts and `--rdzv-conf` keys stay as they are.
When it is complete, its first host collects everybody's names, and deals the ranks by the plan.
"""

import json
import logging
import socket
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from hashlib import sha256
from pathlib import Path

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from trainkit.collectives._exchange import read_json
from trainkit.collectives.order._check import OrderError
from trainkit.collectives.order._plan import Arrival, RankPlan

_log = logging.getLogger(__name__)

BACKEND = "trainkit"
_ATTEMPTS = 3
_MOST_BYTES = 64 << 20


def entry() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What torchrun loads from the entry point group `torchrun.handlers`."""
    return planned_rendezvous


def planned_rendezvous(params: RendezvousParameters) -> RendezvousHandler:
    """The handler behind `--rdzv-backend trainkit`.

    `--rdzv-conf` may hold, beside c10d's own keys: `plan` (a file of `trainkit order --write torchrun`; default
    rank_order.json in the working folder), `host` (this host's name in the plan, where neither `--local-addr` nor the
    host name is it), `rack` (of a host that is not in the plan), `order_timeout` (seconds, default 60).

    Raises:
        OrderError: the plan is none.
        OSError: it cannot be read.
    """
    file = Path(str(params.get("plan", "rank_order.json")))
    if not file.exists():
        raise OrderError(
            f"there is no plan of ranks {file}: name one with --rdzv-conf plan=FILE; "
            "`trainkit order NETWORK --write torchrun --out FILE` writes it"
        )
    plan = RankPlan.load(file)
    address = params.local_addr or socket.getfqdn()
    names = (params.get("host"), params.local_addr, socket.getfqdn(), socket.gethostname())
    whole = [str(name) for name in names if name]
    me = Arrival(tuple(dict.fromkeys([*whole, *(name.split(".")[0] for name in whole[-2:])])), params.get("rack"))
    timeout = timedelta(seconds=params.get_as_int("order_timeout", 60) or 60)
    backend, store = create_backend(params)
    return _PlannedRendezvous(create_handler(store, backend, params), plan, me, address, timeout)


class _PlannedRendezvous(RendezvousHandler):
    def __init__(self, inner: RendezvousHandler, plan: RankPlan, me: Arrival, address: str, timeout: timedelta) -> None:
        self._inner = inner
        self._plan = plan
        self._me = me
        self._address = address
        self._timeout = timeout
        self._server: TCPStore | None = None

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return self._inner.use_agent_store

    def next_rendezvous(self) -> RendezvousInfo:
        for _ in range(_ATTEMPTS):
            info = self._inner.next_rendezvous()
            store = PrefixStore("trainkit/order", info.store)
            if info.rank == 0 and info.bootstrap_store_info is not None:
                # A host that comes later waits for these, which a first host that has met before does not write again.
                info.store.set(RendezvousStoreInfo.MASTER_ADDR_KEY, info.bootstrap_store_info.master_addr)
                info.store.set(RendezvousStoreInfo.MASTER_PORT_KEY, str(info.bootstrap_store_info.master_port))
            try:
                rank = self._rank(store, info.rank, info.world_size)
                return RendezvousInfo(info.store, rank, info.world_size, self._bootstrap(store, rank))
            except DistStoreError as error:
                # A host went away between joining and saying its name: meet again, without it.
                _log.warning("the hosts of this round did not all say their names within %s: %s", self._timeout, error)
            except DistNetworkError as error:
                raise RendezvousConnectionError("the connection to the C10d store has failed") from error
        raise RendezvousTimeoutError(
            f"no round in {_ATTEMPTS} was complete within {self._timeout}: is a host restarting?"
        )

    def _rank(self, store: Store, given: int, size: int) -> int:
        """This host's planned rank; `given` is c10d's."""
        text = self._plan.text()
        digest = sha256(text.encode()).hexdigest()
        store.set(f"plan/{digest}", text)
        store.set(f"host/{given}", json.dumps([self._me.names, self._me.rack, digest]))
        if given == 0:
            keys = [f"host/{number}" for number in range(size)]
            store.wait(keys, self._timeout)
            said = [read_json(store.get(key), _MOST_BYTES) for key in keys]
            # where copies of the plan differ, the one that most hosts have; of equally many the least digest
            digests = Counter(digest for _, _, digest in said)
            chosen = min(digests, key=lambda digest: (-digests[digest], digest))
            plan = self._plan if chosen == digest else _read(store.get(f"plan/{chosen}"))
            arrived = [Arrival(tuple(names), rack) for names, rack, _ in said]
            other = [names[0] for names, _, held in said if held != chosen]
            if other:
                _log.warning("these hosts hold another plan of ranks, which is not followed: %s", ", ".join(other))
            strange = [arrival.names[0] for arrival in arrived if plan.position(arrival) is None]
            if strange:
                _log.warning("these hosts are not in the plan of ranks: %s", ", ".join(strange))
            store.set("ranks", json.dumps(plan.place(arrived)))
        store.wait(["ranks"], 2 * self._timeout)
        return int(read_json(store.get("ranks"), _MOST_BYTES)[given])

    def _bootstrap(self, store: Store, rank: int) -> RendezvousStoreInfo:
        """Where the workers of this round meet: on the planned rank 0, in a store that no earlier round has written to."""
        port = None
        if rank == 0 and self.use_agent_store:
            self._server = TCPStore(self._address, 0, is_master=True, multi_tenant=True, wait_for_workers=False)
            port = self._server.port
        return RendezvousStoreInfo.build(rank, store, self._address, port)

    def is_closed(self) -> bool:
        return self._inner.is_closed()

    def set_closed(self) -> None:
        self._inner.set_closed()  # type: ignore[no-untyped-call]

    def num_nodes_waiting(self) -> int:
        return self._inner.num_nodes_waiting()

    def get_run_id(self) -> str:
        return self._inner.get_run_id()

    def shutdown(self) -> bool:
        return self._inner.shutdown()


def _read(text: bytes) -> RankPlan:
    data = read_json(text, _MOST_BYTES)
    return RankPlan(**{key: value for key, value in data.items() if key != "version"})
