"""A star of network namespaces: n workers and a switch, veth links shaped by tbf in both directions (root needed)."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SWITCH = "10.77.0.254"
_LOSS = Path(__file__).with_name("_loss.py")


def run(command: str) -> None:
    """Run an `ip` or `tc` command; its own words where it fails."""
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr.strip()}")


@contextlib.contextmanager
def star(workers: int, mbit: float | None, mtu: int = 1500, loss: float = 0.0) -> Iterator[str]:
    """Build namespaces `<prefix>0` ... and `<prefix>s` around a bridge; yields the prefix, removes all at the end.

    Args:
        workers: ends of the star, at 10.77.0.1 and up.
        mbit: rate of each link in each direction; None leaves them unshaped.
        mtu: of all links.
        loss: share of the packets dropped on each link in each direction, by a seeded generator.
    """
    prefix = f"tk{os.getpid() % 10000}"
    hub = f"{prefix}s"
    names = [hub, *(f"{prefix}{rank}" for rank in range(workers))]
    try:
        for name in names:
            run(f"ip netns add {name}")
            run(f"ip -n {name} link set lo up")
        run(f"ip -n {hub} link add br0 type bridge")
        for rank, name in enumerate(names[1:]):
            run(f"ip link add p{rank} netns {hub} type veth peer name eth0 netns {name}")
            run(f"ip -n {hub} link set p{rank} mtu {mtu} master br0 up")
            run(f"ip -n {name} link set eth0 mtu {mtu} up")
            run(f"ip -n {name} addr add 10.77.0.{rank + 1}/24 dev eth0")
            if mbit is not None:
                shape = f"root tbf rate {mbit}mbit burst 16kb limit 4mb"
                run(f"tc -n {hub} qdisc add dev p{rank} {shape}")
                run(f"tc -n {name} qdisc add dev eth0 {shape}")
        for rank, name in enumerate(names[1:] if loss else []):
            for namespace, interface, seed in ((hub, f"p{rank}", 2 * rank), (name, "eth0", 2 * rank + 1)):
                run(f"ip netns exec {namespace} {sys.executable} {_LOSS} {interface} {loss} {seed}")
        run(f"ip -n {hub} link set br0 mtu {mtu} up")
        run(f"ip -n {hub} addr add {SWITCH}/24 dev br0")
        yield prefix
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def inside(namespace: str, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
    """Start this Python with `arguments` in a namespace."""
    return subprocess.Popen(
        ["ip", "netns", "exec", namespace, sys.executable, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
