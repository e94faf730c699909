"""Seeded loss at a network interface: an XDP program that drops a share of what arrives.

A dozen instructions, assembled here so that no compiler is needed: a linear congruential generator in a map cell, one
step a packet, against a threshold. Run inside the namespace of the interface; the program leaves with it.
"""

import ctypes
import os
import struct
import sys

from pyroute2 import IPRoute

_PROG_LOAD, _MAP_CREATE, _MAP_UPDATE = 5, 0, 2
_SYS_BPF = {"x86_64": 321, "aarch64": 280}[os.uname().machine]
_R0, _R1, _R2, _R10 = 0, 1, 2, 10
_DROP, _PASS = 1, 2


def _instruction(code: int, target: int = 0, source: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    immediate &= 0xFFFFFFFF
    return struct.pack("<BBhI", code, source << 4 | target, offset, immediate)


def _bpf(command: int, attributes: bytes) -> int:
    buffer = ctypes.create_string_buffer(attributes, 128)
    number = ctypes.CDLL(None, use_errno=True).syscall(_SYS_BPF, command, buffer, 128)
    if number < 0:
        raise OSError(ctypes.get_errno(), "bpf: " + os.strerror(ctypes.get_errno()))
    return int(number)


def drop(interface: str, share: float, seed: int) -> None:
    """Drop `share` (0 to 1) of the packets that arrive at `interface`, by the generator started at `seed`."""
    cell = _bpf(_MAP_CREATE, struct.pack("<IIII", 2, 4, 4, 1))  # an array of one 32-bit cell
    key, value = ctypes.create_string_buffer(struct.pack("<I", 0)), ctypes.create_string_buffer(struct.pack("<I", seed))
    _bpf(_MAP_UPDATE, struct.pack("<IIQQQ", cell, 0, ctypes.addressof(key), ctypes.addressof(value), 0))
    threshold = int(share * 2**16)
    program = b"".join(
        [
            _instruction(0x62, _R10, offset=-4, immediate=0),  # *(u32 *)(r10 - 4) = 0
            _instruction(0x18, _R1, source=1, immediate=cell) + _instruction(0),  # r1 = map
            _instruction(0xBF, _R2, _R10),  # r2 = r10
            _instruction(0x07, _R2, immediate=-4),  # r2 -= 4
            _instruction(0x85, immediate=1),  # r0 = map_lookup_elem(r1, r2)
            _instruction(0x15, _R0, offset=8, immediate=0),  # if r0 == 0 goto pass
            _instruction(0x61, _R1, _R0),  # r1 = *(u32 *)r0
            _instruction(0x24, _R1, immediate=1664525),  # w1 *= a
            _instruction(0x04, _R1, immediate=1013904223),  # w1 += c
            _instruction(0x63, _R0, _R1),  # *(u32 *)r0 = w1
            _instruction(0x74, _R1, immediate=16),  # w1 >>= 16
            _instruction(0x35, _R1, offset=2, immediate=threshold),  # if r1 >= threshold goto pass
            _instruction(0xB7, _R0, immediate=_DROP),
            _instruction(0x95),
            _instruction(0xB7, _R0, immediate=_PASS),
            _instruction(0x95),
        ]
    )
    code, licence = ctypes.create_string_buffer(program), ctypes.create_string_buffer(b"GPL")
    log = ctypes.create_string_buffer(65536)
    loaded = _bpf(
        _PROG_LOAD,
        struct.pack(
            "<IIQQIIQ",
            6,
            len(program) // 8,
            ctypes.addressof(code),
            ctypes.addressof(licence),
            1,
            len(log),
            ctypes.addressof(log),
        ),
    )
    with IPRoute() as route:
        index = route.link_lookup(ifname=interface)[0]
        route.link("set", index=index, xdp_fd=loaded)


if __name__ == "__main__":
    drop(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
