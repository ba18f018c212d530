"""How many bytes this process has sent over its TCP connections, as the kernel counts them."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

TCP_INFO_BYTES_SENT = 200
"""Where `tcpi_bytes_sent` and, behind it, `tcpi_bytes_retrans` stand in `struct tcp_info` of linux/tcp.h."""


def sent_bytes() -> int:
    """Bytes written to all TCP connections that are open now, payload alone, each once.

    gloo keeps its connections for as long as its group lives, so the difference of two calls is what was sent
    in between; the ranks' talk with torchrun's store is in it, a few hundred bytes. What NCCL sends through
    shared memory or InfiniBand is not seen.

    Raises:
        OSError: a kernel from before Linux 5.5 does not count.
    """
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not str(entry.readlink()).startswith("socket:"):
                continue
            # A descriptor of its own: closing it leaves the connection open.
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                total += _sent(connection)
        except FileNotFoundError:  # the listing's own, or one that was closed meanwhile
            continue
    return total


def _sent(connection: socket.socket) -> int:
    if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
        return 0
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES_SENT + 16)
    if len(info) < TCP_INFO_BYTES_SENT + 16:
        raise OSError("this kernel does not count the bytes of a TCP connection; Linux 5.5 does")
    sent, again = struct.unpack_from("=QQ", info, TCP_INFO_BYTES_SENT)
    return int(sent - again)
