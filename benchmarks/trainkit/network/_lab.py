"""A network of shaped links on this machine: a network namespace per node, TCP/IP as it is (root, `ip` and `tc` needed).

The namespaces have no names: file descriptors of this process hold them, so that they go when it goes, however it goes;
a keeper process then ends whatever still runs inside.

Packets without data (acknowledgements) go first on a link, as under the fair queues that hosts use by default. In one
queue with the data of the other direction they wait as long as that queue is, and two streams that meet on a link then
hold each other at 60 to 90 % of its rate; with it every link gives 94 to 96 %.
"""

import contextlib
import ctypes
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from _routes import Routes

from trainkit.collectives import Topology

T = TypeVar("T")
Link = tuple[str, str]

INTERFACE = "node"
"""Interface that carries a node's one address; what GLOO_SOCKET_IFNAME is set to."""

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_BITS = {"B/s": 8, "GB/s": 8e9, "Gbit/s": 1e9, "Mbit/s": 1e6}
_SYSCTL = {
    "ipv4/ip_forward": "1",
    "ipv4/conf/all/rp_filter": "0",
    "ipv4/conf/all/send_redirects": "0",
    "ipv4/conf/default/rp_filter": "0",
    "ipv4/tcp_congestion_control": "cubic",  # fills a short queue: what is measured is the link, not the control
    "ipv4/tcp_no_metrics_save": "1",  # a run must not inherit the last one's congestion window
    "ipv6/conf/all/disable_ipv6": "1",
    "ipv6/conf/default/disable_ipv6": "1",
}
# Waits until its input ends, which happens when the lab closes or its process dies, then kills what is in the namespaces.
_KEEPER = """
import os, signal, sys, time
sys.stdin.read()
for attempt in range(50):
    left = 0
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                if str(os.stat(f"/proc/{entry}/ns/net").st_ino) in sys.argv[1:]:
                    left += open(f"/proc/{entry}/stat").read().rpartition(")")[2].split()[0] != "Z"
                    os.kill(int(entry), signal.SIGKILL)
            except OSError:
                pass
    if not left:
        break
    time.sleep(0.02)
"""


class Lab:
    """A topology built out of namespaces, for a `with` block.

    Every directed link has its own rate; switches, and compute nodes that lie between others, forward. A node has one
    address, and every packet follows `routes`.

    Example:
        >>> with Lab(two_racks()) as lab:  # doctest: +SKIP
        ...     lab.popen("h0_0", ["iperf3", "-s"])
    """

    def __init__(self, topology: Topology, *, queue_s: float = 0.25, burst_s: float = 0.004) -> None:
        """Choose routes; nothing is built yet.

        Args:
            topology: rates in its own unit, Mbit/s where it has none.
            queue_s: what a link's queue holds, in seconds at its rate (at least 256 kB: below, the sender drops its own packets).
            burst_s: what a link lets pass at once after a pause, likewise (at least 6 kB: a GSO packet that is larger is
                cut up, and a timer that comes late must not cost rate).
        """
        self.topology = topology
        self.routes = Routes(topology)
        self._scale = _BITS[topology.unit or "Mbit/s"]
        self._queue_s, self._burst_s = queue_s, burst_s
        self._number = {node: number for number, node in enumerate(topology.nodes)}
        self._namespace: dict[str, int] = {}
        self._keeper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Build it."""
        try:
            self._create()
            for node in self.topology.nodes:
                self._batch(node, "ip", self._links(node))
            for node in self.topology.nodes:
                self._batch(node, "ip", self._addresses(node))
                self._batch(node, "tc", self._shapes(node))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Take it down."""
        self.close()

    def close(self) -> None:
        """End what runs inside and let go of the namespaces."""
        if self._keeper is not None:
            self._keeper.communicate()
            self._keeper = None
        for descriptor in self._namespace.values():
            os.close(descriptor)
        self._namespace = {}

    def address(self, node: str) -> str:
        """The one IPv4 address of a node."""
        number = self._number[node]
        return f"10.88.{number // 250}.{number % 250 + 1}"

    def inside(self, node: str, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in a thread that is in the node's namespace: sockets it makes stay there."""
        result: list[T] = []
        failure: list[BaseException] = []

        def call() -> None:
            try:
                _enter(self._namespace[node])
                result.append(function(*arguments))
            except BaseException as error:
                failure.append(error)

        _in_thread(call)
        if failure:
            raise failure[0]
        return result[0]

    def popen(self, node: str, argv: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
        """Start a process on a node; as `subprocess.Popen`, with gloo told its interface."""
        options["env"] = {"GLOO_SOCKET_IFNAME": INTERFACE, **(options.get("env") or os.environ)}
        return self.inside(node, lambda: subprocess.Popen(argv, **options))

    def bytes(self) -> dict[Link, int]:
        """Bytes that each directed link has carried since it was made, frame headers included."""
        counted: dict[Link, int] = {}
        for node in self.topology.nodes:
            text = self.inside(node, Path("/proc/thread-self/net/dev").read_text)
            sent = {
                name.strip(): int(rest.split()[8])
                for name, _, rest in (x.partition(":") for x in text.split("\n")[2:-1])
            }
            counted |= {(u, v): sent[self._device(v)] for u, v, _ in self.topology.links if u == node}
        return counted

    def goodput(self, seconds: float = 1.0, *, most_at_once: float = 400) -> dict[Link, float]:
        """Measured TCP goodput of each directed link on its own, in Mbit/s.

        Links that share no sender and no receiver are measured together, up to `most_at_once` Mbit/s in all. A link whose
        ends have no way back is left out.
        """
        rates = {(u, v): self._mbit(rate) for u, v, rate in self.topology.links if v in self.routes.hops(u)}
        todo = [link for link in rates if link[0] in self.routes.hops(link[1])]
        measured: dict[Link, float] = {}
        while todo:
            round_: list[Link] = []
            for link in todo:
                apart = all(link[0] != u and link[1] != v for u, v in round_)
                if not round_ or (apart and sum(map(rates.__getitem__, [*round_, link])) <= most_at_once):
                    round_.append(link)
            todo = [link for link in todo if link not in round_]
            threads = [threading.Thread(target=self._stream, args=(link, seconds, measured)) for link in round_]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            failed = [link for link in round_ if link not in measured]
            if failed:
                raise RuntimeError(f"no goodput was measured on the link {failed[0][0]} -> {failed[0][1]}")
        return measured

    def measured(self, seconds: float = 1.0) -> Topology:
        """The topology with `goodput` for capacities."""
        rates = {link: f"{rate:.3f}" for link, rate in self.goodput(seconds).items()}
        links = [(u, v, rates.get((u, v), rate)) for u, v, rate in self.topology.links]
        return Topology(
            f"{self.topology.name}, measured", self.topology.nodes, self.topology.compute_nodes, links, "Mbit/s"
        )

    def _stream(self, link: Link, seconds: float, measured: dict[Link, float]) -> None:
        # A third of the time again goes before, so that the window is open and the queue full.
        listener = self.inside(link[1], lambda: socket.create_server((self.address(link[1]), 0)))
        with listener, self.inside(link[0], socket.create_connection, listener.getsockname(), 10.0) as sender:
            receiver, _ = listener.accept()
            with receiver:
                receiver.settimeout(10.0)
                sender.settimeout(0.2)
                stop = threading.Event()
                feed = threading.Thread(target=_feed, args=(sender, stop))
                feed.start()
                start = time.monotonic() + seconds / 3
                count, begun, now = 0, None, 0.0
                while (now := time.monotonic()) < start + seconds:
                    size = len(receiver.recv(1 << 16))
                    if begun is not None:
                        count += size
                    elif now >= start:
                        begun = time.monotonic()
                measured[link] = count * 8e-6 / (time.monotonic() - (begun or start))
                stop.set()
                receiver.shutdown(socket.SHUT_RDWR)
                feed.join()

    def _create(self) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        failure: list[int] = []

        def create() -> None:
            for node in self.topology.nodes:
                if library.unshare(_NEW_NETWORK):
                    failure.append(ctypes.get_errno())
                    return
                self._namespace[node] = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
                for key, value in _SYSCTL.items():
                    with contextlib.suppress(OSError):  # a kernel without IPv6, or without that congestion control
                        Path("/proc/sys/net", key).write_text(value)

        _in_thread(create)
        if failure:
            raise PermissionError(f"network namespaces need root: {os.strerror(failure[0])}")
        inodes = [str(os.fstat(descriptor).st_ino) for descriptor in self._namespace.values()]
        self._keeper = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", _KEEPER, *inodes],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt from the keyboard ends the lab, not its keeper
        )

    def _batch(self, node: str, tool: str, lines: Iterable[str]) -> None:
        command = [tool, "-batch", "-"]
        text = "\n".join(lines) + "\n"
        done = self.inside(node, lambda: subprocess.run(command, input=text, text=True, capture_output=True))
        if done.returncode:
            raise RuntimeError(f"{tool} refused a line for node {node!r}: {done.stderr.strip()}")

    def _device(self, peer: str) -> str:
        return f"n{self._number[peer]}"

    def _mac(self, node: str, peer: str) -> str:
        u, v = self._number[node], self._number[peer]
        return f"02:00:{u >> 8:02x}:{u & 255:02x}:{v >> 8:02x}:{v & 255:02x}"

    def _peers(self, node: str) -> list[str]:
        return list(dict.fromkeys(v if u == node else u for u, v, _ in self.topology.links if node in (u, v)))

    def _links(self, node: str) -> list[str]:
        # A bridge without ports carries the address: `dummy` is a module that not every kernel has.
        lines = ["link set lo up", f"link add {INTERFACE} type bridge"]
        for peer in self._peers(node):
            if self._number[node] < self._number[peer]:
                far = f"/proc/{os.getpid()}/fd/{self._namespace[peer]}"
                near = f"link add {self._device(peer)} address {self._mac(node, peer)} type veth"
                lines.append(f"{near} peer name {self._device(node)} address {self._mac(peer, node)} netns {far}")
        return lines

    def _addresses(self, node: str) -> list[str]:
        own = self.address(node)
        lines = [f"addr add {own}/32 dev {INTERFACE}", f"link set {INTERFACE} up"]
        for peer in self._peers(node):
            device = self._device(peer)
            # Known neighbours: an ARP query would wait in the queue behind the data.
            lines += [
                f"link set {device} up gso_max_size 6000 gso_max_segs 4",
                f"neigh add {self.address(peer)} lladdr {self._mac(peer, node)} dev {device}",
            ]
        for target, hop in self.routes.hops(node).items():
            via = f"via {self.address(hop)} dev {self._device(hop)} onlink"
            lines.append(f"route add {self.address(target)}/32 {via} src {own}")
        return lines

    def _shapes(self, node: str) -> list[str]:
        lines = []
        for u, v, rate in self.topology.links:
            if u == node:
                bits = self._mbit(rate) * 1e6
                queue, burst = max(256_000, bits / 8 * self._queue_s), max(6_000, bits / 8 * self._burst_s)
                device = f"dev {self._device(v)}"
                whole = f"ceil {bits:.0f}bit burst {burst:.0f} cburst {burst:.0f} quantum 3000"
                lines += [
                    f"qdisc add {device} root handle 1: htb default 20",
                    f"class add {device} parent 1: classid 1:1 htb rate {bits:.0f}bit {whole}",
                    f"class add {device} parent 1:1 classid 1:10 htb prio 0 rate {bits * 0.2:.0f}bit {whole}",
                    f"class add {device} parent 1:1 classid 1:20 htb prio 1 rate {bits * 0.8:.0f}bit {whole}",
                    f"qdisc add {device} parent 1:10 bfifo limit {queue:.0f}",
                    f"qdisc add {device} parent 1:20 bfifo limit {queue:.0f}",
                    f"filter add {device} parent 1: protocol ip u32 match u16 0 0xff80 at 2 flowid 1:10",
                ]
        return lines

    def _mbit(self, rate: Any) -> float:
        return float(rate) * self._scale / 1e6


def _enter(namespace: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.setns(namespace, _NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "a thread could not enter the node's network namespace")


def _in_thread(function: Callable[[], None]) -> None:
    # A namespace is a property of a thread: one that ends takes it along.
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def _feed(sender: socket.socket, stop: threading.Event) -> None:
    block = bytes(1 << 16)
    while not stop.is_set():
        try:
            sender.send(block)
        except TimeoutError:
            continue
        except OSError:
            return
