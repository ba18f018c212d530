"""Fixtures that tests of pages share, and tests that build the networks of shared checkpoints."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A real Chromium without a window: gives the page as its script left it."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium); there is none here")
    profile = tmp_path_factory.mktemp("profile")

    def open_page(address: str, *options: str) -> str:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom"]
        done = subprocess.run(
            [program, *flags, f"--user-data-dir={profile}", *options, address],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
            env={**os.environ, "HOME": str(profile)},
        )
        return done.stdout

    return open_page


@pytest.fixture(scope="module")
def thin() -> Iterator[None]:
    """Build networks as those of the shared checkpoints, which are thin where there is no GPU."""
    from tests.helpers.infer_samples import shared_networks

    with shared_networks():
        yield
