"""The switch inside the kernel: compiles and loads `xdp/switch.bpf.c`, and is the data plane of its sessions.

Needs root, clang to compile and libbpf to load; both come with every distribution.
"""

import ctypes
import ctypes.util
import os
import platform
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from trainkit.switchml._membership import Address, Membership

_SOURCE = Path(__file__).parent / "xdp" / "switch.bpf.c"
SESSIONS, SLOTS, WORKERS, MOST = 4, 64, 32, 352
"""As in the program."""
COUNTED = (
    "received_packets", "received_bytes", "chunks", "retransmissions", "sent_progress", "stale", "foreign", "malformed",
)  # fmt: skip
"""Its counters, in its order."""

_SESSION = struct.Struct("=5I")
_WORKER = struct.Struct("=4s2s6s")
_VERSION = struct.Struct(f"=6I{4 * MOST}x")


class KernelUnavailable(RuntimeError):
    """This machine cannot run the switch in its kernel; the message says what is missing."""


class KernelPlane:
    """Adds packets as they arrive at `interfaces`, from construction to `close`.

    Args:
        interfaces: network interfaces that workers reach; all of one switch.
        address: (host, port) that workers send to.

    Raises:
        KernelUnavailable: a tool, a right or a kernel feature is missing.
    """

    def __init__(self, interfaces: Sequence[str], address: tuple[str, int]) -> None:
        self._bpf = _library()
        self._installed: dict[int, Membership] = {}
        self._object: int | None = None
        self._links: list[int] = []
        indices = [_index(name) for name in interfaces]
        with tempfile.TemporaryDirectory() as folder:
            compiled = _compiled(Path(folder))
            self._object = self._bpf.bpf_object__open_file(str(compiled).encode(), None)
        if not self._object or self._bpf.bpf_object__load(self._object):
            raise self._failed("the kernel does not take the program")
        try:
            self._maps = {
                name: self._map(name) for name in ("listen", "sessions", "versions", "counters", "neighbours")
            }
            self._ports = [self._map(f"ports{session}") for session in range(SESSIONS)]
            self._towards = [self._program(f"towards_{worker}") for worker in range(WORKERS)]
            host, port = address
            self._write("listen", 0, socket.inet_aton(host) + struct.pack("!H2x", port))
            main = self._bpf.bpf_object__find_program_by_name(self._object, b"aggregate")
            for name, index in zip(interfaces, indices, strict=True):
                link = self._bpf.bpf_program__attach_xdp(main, index)
                if not link:
                    raise self._failed(f"no program can be attached to {name}; is there one already?")
                self._links.append(link)
        except BaseException:
            self.close()
            raise

    def install(self, member: Membership, addresses: tuple[Address, ...]) -> None:
        """Begin an epoch; its workers have been heard before, so that the way to them is known."""
        if member.session >= SESSIONS:
            raise ValueError(
                f"a switch in the kernel has {SESSIONS} sessions: end one, or start a switch without --xdp"
            )
        head = self._described(member, addresses)  # first, since an address may be out of reach
        self.remove(member.session)
        for index in range(2 * member.slots):
            self._write("versions", 2 * SLOTS * member.session + index, bytes(_VERSION.size))
        self._begin(member, addresses, head)

    def move(self, member: Membership, addresses: tuple[Address, ...]) -> None:
        """A worker of the epoch has another address."""
        self._begin(member, addresses, self._described(member, addresses))

    def _described(self, member: Membership, addresses: tuple[Address, ...]) -> bytes:
        head = _SESSION.pack(1, member.epoch, member.world, member.slots, member.elements)
        for place in addresses:
            host, port = cast(tuple[str, int], place)
            _, mac = self._neighbour(socket.inet_aton(host))
            head += _WORKER.pack(socket.inet_aton(host), struct.pack("!H", port), mac)
        return head.ljust(_SESSION.size + WORKERS * _WORKER.size, b"\0")

    def _begin(self, member: Membership, addresses: tuple[Address, ...], head: bytes) -> None:
        for worker, place in enumerate(addresses):
            interface, _ = self._neighbour(socket.inet_aton(cast(tuple[str, int], place)[0]))
            self._update(self._ports[member.session], worker, struct.pack("=Ii", interface, self._towards[worker]))
        self._write("sessions", member.session, head)
        self._installed[member.session] = member

    def remove(self, session: int) -> None:
        """End a session."""
        if (ended := self._installed.pop(session, None)) is not None:
            self._write("sessions", session, bytes(_SESSION.size + WORKERS * _WORKER.size))
            for worker in range(ended.world):
                key = ctypes.c_uint32(worker)
                self._bpf.bpf_map_delete_elem(self._ports[session], ctypes.byref(key))

    def unfinished(self, session: int) -> int:
        """Bitmap of the workers that the lowest unfinished chunk waits for; 0 where none is."""
        member = self._installed.get(session)
        if member is None:
            return 0
        whole, lowest = (1 << member.world) - 1, (1 << 32, 0)
        for index in range(2 * member.slots):
            found = self._read("versions", 2 * SLOTS * session + index, _VERSION.size)
            _, epoch, chunk, seen, *_ = _VERSION.unpack(found)
            if epoch == member.epoch and 0 != seen != whole:
                lowest = min(lowest, (chunk, seen ^ whole))
        return lowest[1]

    def mismatched(self, session: int) -> int:
        """Not known in the kernel: a bucket of another size is dropped as malformed."""
        return 0

    def counters(self) -> dict[str, int]:
        """What has arrived and what became of it: the names of `COUNTED`."""
        cpus = _possible_cpus()
        return {
            name: sum(struct.unpack(f"={cpus}Q", self._read("counters", index, 8 * cpus)))
            for index, name in enumerate(COUNTED)
        }

    def close(self) -> None:
        """Take the program from the interfaces."""
        while self._links:
            self._bpf.bpf_link__destroy(self._links.pop())
        if self._object:
            self._bpf.bpf_object__close(self._object)
            self._object = None

    def _neighbour(self, host: bytes) -> tuple[int, bytes]:
        value = ctypes.create_string_buffer(12)
        key = ctypes.create_string_buffer(host, 4)
        if self._bpf.bpf_map_lookup_elem(self._maps["neighbours"], key, value):
            raise ValueError(
                f"worker {socket.inet_ntoa(host)} does not reach this switch over its interfaces: name all"
            )
        interface, mac = struct.unpack("=I6s2x", value.raw)
        return int(interface), bytes(mac)

    def _map(self, name: str) -> int:
        return int(self._bpf.bpf_object__find_map_fd_by_name(self._object, name.encode()))

    def _program(self, name: str) -> int:
        found = self._bpf.bpf_object__find_program_by_name(self._object, name.encode())
        return int(self._bpf.bpf_program__fd(found))

    def _write(self, name: str, key: int, value: bytes) -> None:
        self._update(self._maps[name], key, value)

    def _update(self, descriptor: int, key: int, value: bytes) -> None:
        number, content = ctypes.c_uint32(key), ctypes.create_string_buffer(value, len(value))
        if self._bpf.bpf_map_update_elem(descriptor, ctypes.byref(number), content, 0):
            raise self._failed("a map of the program cannot be written")

    def _read(self, name: str, key: int, size: int) -> bytes:
        number, content = ctypes.c_uint32(key), ctypes.create_string_buffer(size)
        if self._bpf.bpf_map_lookup_elem(self._maps[name], ctypes.byref(number), content):
            raise self._failed("a map of the program cannot be read")
        return content.raw

    def _failed(self, what: str) -> KernelUnavailable:
        why = os.strerror(ctypes.get_errno())
        return KernelUnavailable(f"{what} ({why}): run as root, on Linux 5.18 or later, or without --xdp")


def _library() -> ctypes.CDLL:
    name = ctypes.util.find_library("bpf")
    if name is None:
        raise KernelUnavailable("libbpf is not there: install it (Debian: apt install libbpf1), or run without --xdp")
    bpf = ctypes.CDLL(name, use_errno=True)
    pointer = ctypes.c_void_p
    signatures: tuple[tuple[str, Any, list[Any]], ...] = (
        ("bpf_object__open_file", pointer, [ctypes.c_char_p, pointer]),
        ("bpf_object__find_program_by_name", pointer, [pointer, ctypes.c_char_p]),
        ("bpf_program__attach_xdp", pointer, [pointer, ctypes.c_int]),
        ("bpf_object__load", ctypes.c_int, [pointer]),
        ("bpf_object__close", None, [pointer]),
        ("bpf_object__find_map_fd_by_name", ctypes.c_int, [pointer, ctypes.c_char_p]),
        ("bpf_program__fd", ctypes.c_int, [pointer]),
        ("bpf_link__destroy", ctypes.c_int, [pointer]),
        ("bpf_map_update_elem", ctypes.c_int, [ctypes.c_int, pointer, pointer, ctypes.c_uint64]),
        ("bpf_map_lookup_elem", ctypes.c_int, [ctypes.c_int, pointer, pointer]),
        ("bpf_map_delete_elem", ctypes.c_int, [ctypes.c_int, pointer]),
    )
    for function, result, arguments in signatures:
        getattr(bpf, function).restype, getattr(bpf, function).argtypes = result, arguments
    # what went wrong is said by an exception
    bpf.libbpf_set_print(None)
    return bpf


def _compiled(folder: Path) -> Path:
    if shutil.which("clang") is None:
        raise KernelUnavailable("clang is not there: install it, or run without --xdp")
    compiled = folder / "switch.bpf.o"
    # where Debian keeps asm/types.h, which -target bpf does not look into
    include = f"-I/usr/include/{platform.machine()}-linux-gnu"
    command = ["clang", "-O2", "-g", "-target", "bpf", include, "-c", str(_SOURCE), "-o", str(compiled)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise KernelUnavailable(f"clang cannot compile the program; are libbpf's headers there?\n{done.stderr[:2000]}")
    return compiled


def _index(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError as error:
        raise ValueError(f"--xdp names network interfaces of this machine, got {name!r}: see `ip link`") from error


def _possible_cpus() -> int:
    return int(Path("/sys/devices/system/cpu/possible").read_text().strip().rpartition("-")[2]) + 1
