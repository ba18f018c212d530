"""`train.main` where no file may grow beyond a size: tests.helpers.limited_files BYTES OPTIONS..."""

from __future__ import annotations

import resource
import signal
import sys

from train.main import main

if __name__ == "__main__":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python itself has it
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
    main(sys.argv[2:])
