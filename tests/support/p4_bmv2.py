"""A bmv2 switch of the tests' own on veth pairs, and what speaks to it."""

import contextlib
import ctypes
import fcntl
import ipaddress
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import TracebackType

from trainkit.p4 import _pipeline
from trainkit.p4._client import Connection
from trainkit.p4._description import Description, Session, Worker
from trainkit.p4._entries import DYNAMIC, Entry, difference, wanted
from trainkit.p4._frames import datagram
from trainkit.p4._plane import RESET, Plane
from trainkit.switchml._membership import Membership
from trainkit.switchml._packet import DEFAULT_PORT

OWN_MAC, OWN_IP = 0x0200000000FE, 0x0AFFFFFE
MACS = 0x020000000100
ANYBODY = 0x88B5
"""Ethernet type of the frame that shows that all before it have passed."""
Address = tuple[str, int]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Bmv2:
    """simple_switch_grpc with `ports` veth pairs: `<tag>s<port>` is the switch's end, `<tag>w<port>` the worker's."""

    def __init__(self, ports: int, tag: str = "tkp") -> None:
        self.tag, self.ports = f"{tag}{os.getpid() % 10000}", range(1, ports + 1)
        self.grpc = f"127.0.0.1:{free_port()}"
        self._made: list[str] = []
        self._namespaces: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        try:
            for port in self.ports:
                ours, theirs = self.ends(port)
                ip("link", "add", ours, "type", "veth", "peer", "name", theirs)
                self._made.append(ours)
                for name in (ours, theirs):
                    Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
                    ip("link", "set", name, "mtu", "1500", "up")
            program = shutil.which("simple_switch_grpc")
            assert program is not None
            command = [program, "--no-p4", "--device-id", "0", "--log-level", "off"]
            for port in self.ports:
                command += ["-i", f"{port}@{self.ends(port)[0]}"]
            if "thrift-port" in subprocess.run([program, "--help"], capture_output=True, text=True).stdout:
                command += ["--thrift-port", str(free_port())]
            command += ["--", "--grpc-server-addr", self.grpc, "--cpu-port", "510"]
            self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            Connection(self.grpc, seconds=30).close()
        except BaseException:
            self.close()
            raise

    def ends(self, port: int) -> tuple[str, str]:
        return f"{self.tag}s{port}", f"{self.tag}w{port}"

    def into_namespace(self, port: int, name: str, address: str) -> None:
        """Give the worker's end to a namespace of its own, as eth0 with `address`/24 and the MAC of its port."""
        ip("netns", "add", name)
        self._namespaces.append(name)
        mac = (MACS + port).to_bytes(6, "big").hex(":")
        ip("link", "set", self.ends(port)[1], "netns", name, "name", "eth0", "address", mac)
        ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", name, "link", "set", device, "up")
        code = "import sys; sys.path.append(sys.argv[1]); import p4_bmv2; p4_bmv2.offloads_off('eth0')"
        ip("netns", "exec", name, sys.executable, "-c", code, str(Path(__file__).parent))

    def close(self) -> None:
        for name in self._namespaces:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            self._process.kill()
            self._process.wait()
        for name in self._made:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("link", "del", name)

    def __enter__(self) -> "Bmv2":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Wires:
    """Raw sockets at the workers' ends; the last port is only used to see that all frames have passed."""

    def __init__(self, bmv2: Bmv2) -> None:
        self.sockets: dict[int, socket.socket] = {}
        self._number = 0
        for port in bmv2.ports:
            raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            raw.setsockopt(socket.SOL_SOCKET, 33, 4 << 20)
            raw.bind((bmv2.ends(port)[1], 0))
            raw.setblocking(False)
            self.sockets[port] = raw
        self._fence = max(self.sockets)

    def close(self) -> None:
        for raw in self.sockets.values():
            raw.close()

    def exchange(self, port: int, frame: bytes, listening: list[int]) -> dict[int, list[bytes]]:
        """Send a frame; what comes out at each of `listening`, until nothing more can come."""
        self._number += 1
        fence = b"\xff" * 6 + MACS.to_bytes(6, "big") + struct.pack(">HI", ANYBODY, self._number)
        self.sockets[port].send(frame)
        self.sockets[self._fence].send(fence.ljust(60, b"\0"))
        return {at: self._until(at, fence) for at in listening}

    def _until(self, port: int, fence: bytes) -> list[bytes]:
        heard: list[bytes] = []
        raw, until = self.sockets[port], time.monotonic() + 20
        while (left := until - time.monotonic()) > 0:
            if not select.select([raw], [], [], left)[0]:
                break
            frame, where = raw.recvfrom(65535)
            if where[2] == socket.PACKET_OUTGOING:
                continue
            if frame.startswith(fence):
                return heard
            heard.append(frame)
        raise AssertionError(f"port {port}: the switch passes nothing on")


def worker_frame(port: int, source: Address, data: bytes, total: int | None = None) -> bytes:
    """What the worker at `port` sends from `source`."""
    ethernet = OWN_MAC.to_bytes(6, "big") + (MACS + port).to_bytes(6, "big") + b"\x08\x00"
    length = 28 + len(data) if total is None else total
    header = struct.pack(">BBHHHBBHII", 0x45, 0, length, 0, 0x4000, 64, 17, 0, as_int(source[0]), OWN_IP)
    header = header[:10] + struct.pack(">H", checksum(header)) + header[12:]
    return ethernet + header + struct.pack(">HHHH", source[1], DEFAULT_PORT, length - 20, 0) + data


def checksum(header: bytes) -> int:
    total = sum(struct.unpack(f">{len(header) // 2}H", header))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def as_int(address: str) -> int:
    return int(ipaddress.IPv4Address(address))


class HardwareSwitch:
    """The switch with the face of the software switch's state machine, so that the same tests drive both.

    Making another one is a restart: nothing is held any more.
    """

    bmv2: Bmv2
    wires: Wires
    connection: Connection

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self._ports: dict[Address, int] = {}
        self._plane: Plane | None = None
        held = self.connection.read()
        entries = [item for item in held if isinstance(item, Entry) and item.table in (*DYNAMIC, "session")]
        self.connection.write(difference(entries, []))
        asked = {256 * session + version for session in range(4) for version in range(16)}
        for index in asked:
            self.connection.send(b"", operation=RESET, index=index)
        while asked:
            packet = self.connection.receive(10)
            assert packet is not None, "the switch resets nothing"
            asked.discard(packet.fields["index"])

    @classmethod
    def plug_in(cls, bmv2: Bmv2) -> None:
        cls.bmv2, cls.wires, cls.connection = bmv2, Wires(bmv2), Connection(bmv2.grpc, seconds=30)
        cls.connection.push(_pipeline.P4INFO.read_text(), _pipeline.JSON.read_bytes(), _pipeline.cookie())

    @classmethod
    def unplug(cls) -> None:
        cls.connection.close()
        cls.wires.close()

    def install(self, member: Membership, addresses: tuple[Address, ...]) -> None:
        for rank, address in enumerate(addresses):
            self._ports[address] = rank + 1
        workers = tuple(
            Worker(str(rank), MACS + rank + 1, as_int(address[0]), rank + 1) for rank, address in enumerate(addresses)
        )
        sessions = tuple(
            Session(str(number), number, workers, member.slots, member.elements, 256 * number)
            for number in range(member.session + 1)
        )
        self.description = Description(OWN_IP, OWN_MAC, workers, sessions)
        there = self.connection.read(("own_address", "l2", "session"))
        self.connection.write(difference(there, wanted(self.description)))
        self._plane = Plane(self.connection, self.description)
        self._plane.install(member, addresses)
        self._addresses = addresses

    def unfinished(self, session: int) -> int:
        return self._plane.unfinished(session) if self._plane else 0

    def receive(self, data: bytes, source: Address) -> list[tuple[Address, bytes]]:
        """Send one datagram through the switch; the datagrams that come out, by rank."""
        port = self._ports.get(source, 1)
        heard = self.wires.exchange(port, worker_frame(port, source, data), list(range(1, len(self._addresses) + 1)))
        answers = []
        for rank, address in enumerate(self._addresses):
            for frame in heard[rank + 1]:
                assert frame[:12] == (MACS + rank + 1).to_bytes(6, "big") + OWN_MAC.to_bytes(6, "big")
                assert checksum(frame[14:34]) == 0 and frame[14] == 0x45
                assert struct.unpack_from(">HH", frame, 34) == (DEFAULT_PORT, address[1])
                assert frame[30:34] == as_int(address[0]).to_bytes(4, "big")
                told = datagram(frame)
                assert told is not None and told.ip == OWN_IP and len(frame) == max(60, 42 + len(told.data))
                answers.append((address, told.data))
        return answers


def offloads_off(name: str) -> None:
    """A veth leaves checksums and segments to hardware that is not there."""
    with socket.socket() as control:
        for command in (0x17, 0x1F, 0x24):  # ETHTOOL_STXCSUM, _STSO, _SGSO
            value = ctypes.create_string_buffer(struct.pack("II", command, 0))
            request = struct.pack("16sP", name.encode(), ctypes.addressof(value))
            fcntl.ioctl(control, 0x8946, request.ljust(40, b"\0"))  # SIOCETHTOOL
