"""Starts `python -m MODULE …` or `python SCRIPT …` by forking, with torch imported: 4 s of processor time.

torchrun, run as `tests.helpers.forked torch.distributed.run …`, forks its ranks the same way: the agent is
the real one, and a rank is a process in a session of its own, as ever. Tests of the wheel start real
interpreters.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from torch.distributed.elastic.rendezvous import dynamic_rendezvous


class Forked(subprocess.Popen[Any]):
    """`Popen` of `python [-u] -m MODULE …` or `… SCRIPT …` that forks in place of starting an interpreter.

    It takes `cwd`, `env`, `stdout`, `stderr` and `start_new_session`.
    """

    def _execute_child(  # the method of `Popen` that starts the process, with its arguments
        self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any, env: Any,
        startupinfo: Any, creationflags: Any, shell: Any, p2cread: int, p2cwrite: int, c2pread: int,
        c2pwrite: int, errread: int, errwrite: int, restore_signals: Any, gid: Any, gids: Any, uid: Any,
        umask: Any, start_new_session: bool, process_group: Any,
    ) -> None:  # fmt: skip
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            for descriptor, target in ((c2pwrite, 1), (errwrite, 2)):
                if descriptor != -1:
                    os.dup2(descriptor, target)
            _become(list(args), cwd, env, start_new_session)
        self._child_created = True
        while start_new_session and os.getpgid(self.pid) != self.pid:  # torchrun sends signals to the group
            time.sleep(0.001)


def _become(command: list[str], cwd: Path | None, env: dict[str, str] | None, new_session: bool) -> NoReturn:
    """Run the module or script of a command in this process, which is new, to its end."""
    code: Any = 1
    try:
        if new_session:
            os.setsid()
        _leave_the_parent()
        if cwd is not None:
            os.chdir(cwd)
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        try:
            run_python(command[1:])
            code = 0
        except SystemExit as end:
            code = end.code or 0
            if not isinstance(code, int):
                print(code, file=sys.stderr)  # noqa: T201
                code = 1
        vars(threading)["_shutdown"]()  # waits for threads, as an interpreter does at its end
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _leave_the_parent() -> None:
    """Give up what a new interpreter would not have: signal handlers, and connections that must end."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for entry in list(Path("/proc/self/fd").iterdir()):
        if int(entry.name) > 2 and entry.is_socket():
            os.close(int(entry.name))


def _method_name(depth: int = 2) -> str:
    """What torch's rendezvous logs of its caller; its own looks through all modules for their files.

    That takes half a second each time where as many are imported as here, a third of the soak.
    """
    return sys._getframe(depth).f_code.co_name


def run_python(arguments: list[str]) -> None:
    """Run what `python [-u] -m MODULE …` or `… SCRIPT …` does; torchrun and the soak in it fork in turn."""
    vars(subprocess_handler)["Popen"] = Forked
    vars(dynamic_rendezvous)["get_method_name"] = _method_name
    if arguments[0] == "-u":
        del arguments[0]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        if sys.argv[0] == "scripts.soak":
            from scripts.soak import launch

            vars(launch)["Popen"] = Forked
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    run_python(["-m", *sys.argv[1:]])
