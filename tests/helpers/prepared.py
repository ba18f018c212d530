"""Imports and does for all forked processes what takes each of them seconds at its first use."""

from __future__ import annotations

import gc
from importlib import import_module
from pathlib import Path

from data_pipeline.decode.resize import Resizer

MODULES = [
    "train.setup", "train.loop", "train.cli", "torch._dynamo",
    "torch.distributed.elastic.multiprocessing.errors", "numba.np.arraymath", "numba.np.npyimpl",
    "numba.np.random.generator_methods", "scipy.linalg",
]  # fmt: skip
"""Modules that ranks import: half of the processor time of a short run."""

# what DALI does with a GPU when it is imported may not outlive a fork
if not Path("/dev/nvidiactl").exists():
    MODULES += ["nvidia.dali", "nvidia.dali.fn", "nvidia.dali.ops", "nvidia.dali.types"]

gc.disable()
for module in MODULES:
    import_module(module)
Resizer()  # a second: loads the compiled kernel
gc.freeze()  # a collection in a forked process would go through, and so copy, all that is loaded here
gc.enable()
