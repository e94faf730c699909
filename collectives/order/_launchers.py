"""The same plan in the words of other launchers."""

import json
import re

from trainkit.collectives.order._check import OrderError
from trainkit.collectives.order._plan import RankPlan

LAUNCHERS = ("torchrun", "node-rank", "rankfile", "slurm", "kubernetes")


def launcher_text(plan: RankPlan, launcher: str, slots: int = 1) -> str:
    """A plan as a file for a launcher.

    "torchrun": the plan itself, for `--rdzv-backend trainkit --rdzv-conf plan=FILE`. "node-rank": lines "host rank", for
    `--node-rank`. "rankfile": Open MPI's `--rankfile`. "slurm": a host file for SLURM_HOSTFILE with
    `srun --distribution=arbitrary`. "kubernetes": a ConfigMap, node -> node rank.

    Args:
        plan: hosts in rank order.
        launcher: one of `LAUNCHERS`.
        slots: processes a host, where a launcher places processes and not hosts.

    Raises:
        OrderError: an unknown launcher, fewer than one slot, or names that the launcher's files cannot hold.
    """
    if slots < 1:
        raise OrderError(f"slots, the processes a host, must be at least 1, got {slots}")
    hosts = plan.hosts
    if launcher == "torchrun":
        return plan.text()
    if launcher == "node-rank":
        return "".join(f"{host} {rank}\n" for rank, host in enumerate(hosts))
    if launcher == "rankfile":
        lines = [
            f"rank {at * slots + slot}={host} slot={slot}" for at, host in enumerate(hosts) for slot in range(slots)
        ]
        return "\n".join(lines) + "\n"
    if launcher == "slurm":
        return "".join(f"{host}\n" * slots for host in hosts)
    if launcher == "kubernetes":
        wrong = next((host for host in hosts if not re.fullmatch(r"[-._a-zA-Z0-9]{1,253}", host)), None)
        if wrong is not None:
            raise OrderError(f"a ConfigMap's keys are letters, digits, '-', '_' and '.', got the host {wrong!r}")
        ranks = {host: str(rank) for rank, host in enumerate(hosts)}
        head = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "trainkit-rank-order"}}
        return json.dumps({**head, "data": ranks}, indent=1) + "\n"  # JSON is YAML
    raise OrderError(f"a launcher is one of {', '.join(LAUNCHERS)}, got {launcher!r}")
