"""Imports our packages from the place of this file, and starts processes that find them there.

`train`, `infer` and `data_pipeline` are names of many people's own files, and Python looks for a name in the
working directory first, or where PYTHONPATH says. So whatever comes from outside (the command line, the
Python interface, a new process) runs this file by its path before it imports anything of ours:

    runpy.run_path(".../data_pipeline/common/start.py")["import_own"]("data_pipeline")

As a program, `python start.py MODULE:FUNCTION ARGUMENTS...`, it calls a function without arguments.
"""

from __future__ import annotations

import importlib
import importlib.util
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

START = Path(__file__).resolve()
PACKAGES = ("data_pipeline", "infer", "train")
_INITIALIZER = "initializer"


def import_own(*names: str) -> None:
    """Import packages, or modules beside them, from the folder that they are installed in, if they are there.

    Raises:
        ImportError: another module has one of the names already.
    """
    root = START.parents[2]
    for name in names:
        file = root / name / "__init__.py"
        file = file if file.is_file() else root / f"{name}.py"
        if not file.is_file():  # a machine that only serves has no `train`
            continue
        loaded = sys.modules.get(name)
        if loaded is None:
            spec = importlib.util.spec_from_file_location(name, file)
            assert spec is not None and spec.loader is not None
            sys.modules[name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        elif (found := getattr(loaded, "__file__", None)) is None or Path(found).resolve() != file:
            where = found or next(iter(getattr(loaded, "__path__", ())), "elsewhere")
            raise ImportError(
                f"a module of the name {name} is imported already, from {where}, and alexnet has one of that "
                "name: rename yours"
            )


def own_command(target: str) -> list[str]:
    """The command of a process that calls a function of ours, `module:function`; its arguments follow.

    Its working directory is not on its path, unlike that of `python -m`.
    """
    return [sys.executable, *own_script(target)]


def own_script(target: str) -> list[str]:
    """`own_command` without the interpreter, for torchrun, which adds it."""
    return [str(START), target]


def own_initializer(target: str) -> tuple[Callable[..., object], tuple[object, ...]]:
    """A function and its arguments for a pool's `initializer`: it calls `module:function` in a new process.

    A function of ours would be imported by its name, before anything could say where from.
    """
    return runpy.run_path, (str(START), {"target": target}, _INITIALIZER)


def _call(target: str) -> Any:
    import_own(*PACKAGES)
    module, _, function = target.partition(":")
    if module.partition(".")[0] == "alexnet":
        import_own("alexnet")
    return getattr(importlib.import_module(module), function)()


if __name__ == "__mp_main__":  # a process that multiprocessing starts from one that this file started
    import_own(*PACKAGES)
elif __name__ == _INITIALIZER:
    _call(globals()["target"])
elif __name__ == "__main__":
    if sys.path and Path(sys.path[0]).resolve() == START.parent:
        del sys.path[0]  # Python puts a script's folder there
    target = sys.argv[1]
    sys.argv[:2] = [target.partition(":")[0]]
    sys.exit(_call(target))
