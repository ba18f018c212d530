"""Loads the compiled resize when it is imported: a second of processor time, which forked ranks then have."""

from __future__ import annotations

from data_pipeline.decode.resize import Resizer

Resizer()
