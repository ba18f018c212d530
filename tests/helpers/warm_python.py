"""A program to be called like Python that has torch imported: for commands and scripts that start Python."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection, set_start_method
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import Popen
from typing import Any
from unittest import mock

from tests.helpers import warm_client
from tests.helpers.forked import run_python
from tests.helpers.thin_networks import are_thin, stay_thin
from tests.helpers.warm_ranks import warm_context

NEW_NETWORK = 0x40000000
"""CLONE_NEWNET of Linux."""


@contextmanager
def warm_python(*, one_core: bool = False) -> Iterator[Path]:
    """The path of the program, which works until the end of the context.

    What it runs is forked from the process that `warm_ranks` has, in the program's folder, network and
    environment, with its standard streams; it builds thin networks if this process does.

    Args:
        one_core: keep it to one core: of more threads, beside other processes, torch's spin half their time.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        address = f"{folder}/socket"
        listener.bind(address)
        listener.listen()
        program = Path(folder, "python")
        command = f"{sys.executable} -I -S {warm_client.__file__} {address}"
        program.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        program.chmod(0o755)
        accepting = threading.Thread(target=_accept, args=(listener, one_core))
        accepting.start()
        try:
            yield program
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # ends `accept`
            accepting.join()


@contextmanager
def warm_bench_cases() -> Iterator[None]:
    """Start the cases of benchmarks warm until the end of the context; all else of the harness is real."""
    with warm_python(one_core=True) as program:

        def start(command: list[str], **options: Any) -> Popen[bytes]:
            return Popen([program, *command[1:]], **options)

        with mock.patch("train.bench.harness.Popen", start):
            yield


def _accept(listener: socket.socket, one_core: bool) -> None:
    programs = []
    with suppress(OSError):  # the end
        while True:
            program, _ = listener.accept()
            # daemons, since one may end just after the program, and so after a test
            programs.append(threading.Thread(target=_run, args=(program, one_core), daemon=True))
            programs[-1].start()
    for one in programs:
        one.join()


def _run(program: socket.socket, one_core: bool) -> None:
    """Start what a program asks for, and tell it the process and its code; kill that if the program dies."""
    with program:
        size, descriptors, _, _ = socket.recv_fds(program, 8, maxfds=4)
        request = json.loads(program.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
        # connections, since a process that is started gets copies of these
        given = [Connection(number) for number in descriptors]
        process = warm_context().Process(target=_be_python, args=(*request, given, one_core, are_thin()))
        process.start()
        for one in given:
            one.close()
        assert process.pid is not None
        program.sendall(process.pid.to_bytes(8, "big"))
        if process.sentinel not in connection.wait([process.sentinel, program]):
            process.kill()
        process.join()
        assert process.exitcode is not None
        with suppress(BrokenPipeError):
            program.sendall(process.exitcode.to_bytes(8, "big", signed=True))


def _be_python(
    arguments: list[str],
    folder: str,
    environment: dict[str, str],
    given: list[Connection],
    one_core: bool,
    thin: bool,
) -> None:
    if one_core:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, [cores[os.getpid() % len(cores)]])
    *streams, network = given
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
        stream.close()
    here = os.stat("/proc/self/ns/net")  # noqa: PTH116 - beside `fstat`
    if not os.path.samestat(os.fstat(network.fileno()), here):  # to enter one takes rights, be it the same
        assert ctypes.CDLL(None).setns(network.fileno(), NEW_NETWORK) == 0, "the network cannot be entered"
    network.close()
    # opened anew, as an interpreter does: one that was a file does not go on as a pipe
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    if thin:
        stay_thin()
    os.chdir(folder)
    set_start_method(None, force=True)  # as a plain interpreter has it
    run_python(arguments)
