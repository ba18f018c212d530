"""The program behind `warm_python`: hands a server what Python was called with, and ends as that ends.

It imports nothing that takes time: as a program it runs without site-packages.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def main(address: str, arguments: list[str]) -> NoReturn:
    """Have `python ARGUMENTS` run by the server at `address`, in this folder, network and environment."""
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    request = json.dumps((arguments, str(Path.cwd()), dict(os.environ))).encode()
    network = os.open("/proc/self/ns/net", os.O_RDONLY)
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2, network])
    server.sendall(request)
    pid = int.from_bytes(server.recv(8, socket.MSG_WAITALL), "big")
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    code = int.from_bytes(server.recv(8, socket.MSG_WAITALL), "big", signed=True)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
