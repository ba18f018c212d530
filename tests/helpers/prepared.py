"""Does when it is imported what takes a process seconds at its first use, and forked ones then have."""

from __future__ import annotations

from data_pipeline.decode.resize import Resizer

Resizer()  # a second: loads the compiled kernel
