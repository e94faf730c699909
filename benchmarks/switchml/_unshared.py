"""Runs a script in a network namespace of its own: `_unshared.py ADDRESS MTU SCRIPT [ARGUMENT ...]`; needs root, not `ip`.

Says when the namespace is there, waits for a line that tells that `eth0` has been moved into it, and sets that up.
"""

import ctypes
import os
import sys

from pyroute2 import IPRoute

_NEWNET = 0x40000000


def unshare() -> None:
    """Put this process into a new network namespace, with its loopback up.

    Raises:
        OSError: not permitted.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(_NEWNET):
        raise OSError(ctypes.get_errno(), "a network namespace of its own: run as root")
    with IPRoute() as route:
        route.link("set", index=1, state="up")


if __name__ == "__main__":
    unshare()
    print("unshared", flush=True)
    sys.stdin.readline()
    address, mtu, *command = sys.argv[1:]
    with IPRoute() as route:
        [index] = route.link_lookup(ifname="eth0")
        route.addr("add", index=index, address=address, prefixlen=24)
        route.link("set", index=index, mtu=int(mtu), state="up")
    os.execv(sys.executable, [sys.executable, *command])
