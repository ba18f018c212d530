"""A real HTTP server for tests, which breaks off, stalls and lies as it is told."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

CONTENT = np.random.default_rng(0).bytes(3_000_000)
MD5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `content`, as badly as `mode` says; `asked` notes the range of each request, `paths` its path.

    With `files`, it serves those by their paths, and the mode is of those alone whose path ends with `bad`.
    """

    content = CONTENT
    mode = "well"
    asked: list[str | None]
    paths: list[str]
    files: dict[str, bytes] | None = None
    bad = ""
    daemon_threads = True


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        first = self.path not in server.paths
        server.asked.append(asked)
        server.paths.append(self.path)
        content, mode = server.content, server.mode
        if server.files is not None:
            content = server.files.get(self.path, b"")
            mode = server.mode if self.path.endswith(server.bad) else "well"
            mode = mode if self.path in server.files else "not found"
        if mode == "damaged" or (mode == "damaged at first" and first):
            content = content[:-1] + bytes([content[-1] ^ 1])
        elif mode == "shorter":
            content = content[:-1]
        if mode == "redirects" and self.path == "/data.bin":
            self.send_response(302)
            self.send_header("Location", "/elsewhere.bin")
            self.end_headers()
            return
        if mode == "redirects to a file":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
            return
        if mode == "not found" or (mode == "busy" and first):
            self.send_error(404 if mode == "not found" else 503)
            return
        start = int(asked[6:-1]) if asked and mode != "ignores ranges" else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            sent = start + 1 if mode == "sends another range" else start
            self.send_header("Content-Range", f"bytes {sent}-{len(content) - 1}/{len(content)}")
        length = len(content) - start
        if mode == "claims more":
            length += 1000
        elif mode == "claims less" and first:
            length //= 2
        if mode not in ("claims nothing", "goes on for ever"):
            self.send_header("Content-Length", str(length))
        self.end_headers()
        end = len(content)
        if mode in ("breaks off", "ignores ranges", "claims nothing") and first:
            end = min(1_000_000, len(content) // 2) if server.files is not None else 1_000_000
        if mode == "always breaks off":
            end = min(end, start + 400_000)
        if mode == "always stalls" or (mode == "stalls" and first):
            self.wfile.write(content[start:1000])
            self.wfile.flush()
            time.sleep(1.5)
            return
        try:
            self.wfile.write(content[start:end])
            if mode == "goes on for ever":
                for _ in range(200):
                    self.wfile.write(bytes(100_000))
        except OSError:
            pass

    def log_message(self, *args: Any) -> None: ...


@contextmanager
def serving() -> Iterator[Server]:
    """A server on a free port of this machine."""
    made = Server(("127.0.0.1", 0), Handler)
    made.asked, made.paths = [], []
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()
