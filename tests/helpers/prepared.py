"""Does when it is imported what takes a process seconds at its first use, and forked ones then have."""

from __future__ import annotations

import inspect

from data_pipeline.decode.resize import Resizer

Resizer()  # a second: loads the compiled kernel
inspect.stack()  # torchrun's rendezvous does this for log lines: it looks at the file of every module, once
