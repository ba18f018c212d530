"""A plugin of pytest, `-p tests.helpers.missing_packages`, under which the extra `dev` is not installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

MISSING = {
    "hypothesis", "kubeflow_trainer_api", "pyarrow", "pydantic", "pytest_timeout", "ray", "tensorrt",
    "tensorrt_rtx", "tritonclient", "webdataset", "xdist", "yaml",
}  # fmt: skip


class _Hide:
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


sys.meta_path.insert(0, _Hide())
_find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.partition(".")[0] in MISSING else _find_spec(name, package)
)
