#!/usr/bin/env python3
"""Print the requirements in pyproject.toml, one a line: python scripts/deploy/list_dependencies.py [EXTRA]...

For an image that holds what the project needs, but not the project's trainer.
"""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def list_dependencies(pyproject: Path, extras: list[str]) -> list[str]:
    """The base requirements, and those of some extras.

    Raises:
        SystemExit: there is no such extra.
    """
    project = tomllib.loads(pyproject.read_text())["project"]
    optional = project["optional-dependencies"]
    if unknown := [extra for extra in extras if extra not in optional]:
        sys.exit(f"error: {pyproject} has no extra {unknown[0]!r}; it has {', '.join(optional)}")
    return [*project["dependencies"], *(line for extra in extras for line in optional[extra])]


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in list_dependencies(Path("pyproject.toml"), sys.argv[1:]))
