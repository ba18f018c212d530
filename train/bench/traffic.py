"""The kernel's count of the bytes that this process has sent over its TCP connections."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from pathlib import Path

TCP_INFO_BYTES_SENT = 200
"""Offset of `tcpi_bytes_sent`, followed by `tcpi_bytes_retrans`, in `struct tcp_info` of linux/tcp.h."""


def sent_bytes() -> int:
    """Return the bytes written to all TCP connections that are open now: payload, without retransmissions.

    gloo keeps its connections for as long as its group lives, so the difference of two calls is what was sent
    in between, with a few hundred bytes for torchrun's store. NCCL's traffic through shared memory or
    InfiniBand is not counted.

    Raises:
        OSError: a kernel from before Linux 5.5 does not count.
    """
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing's own, or one that was closed meanwhile
            if str(entry.readlink()).startswith("socket:"):
                # A descriptor of its own: closing it leaves the connection open.
                with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                    total += _sent(connection)
    return total


def _sent(connection: socket.socket) -> int:
    if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
        return 0
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES_SENT + 16)
    if len(info) < TCP_INFO_BYTES_SENT + 16:
        raise OSError("this kernel does not count the bytes of a TCP connection; Linux 5.5 does")
    sent, again = struct.unpack_from("=QQ", info, TCP_INFO_BYTES_SENT)
    return int(sent - again)
