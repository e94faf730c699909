"""Turns generic receive offload on at an interface: `_gro.py INTERFACE`."""

import ctypes
import fcntl
import socket
import struct
import sys

_SIOCETHTOOL, _SGRO = 0x8946, 0x2C

content = ctypes.create_string_buffer(struct.pack("II", _SGRO, 1))
request = struct.pack("16sP", sys.argv[1].encode(), ctypes.addressof(content))
fcntl.ioctl(socket.socket(), _SIOCETHTOOL, request)
