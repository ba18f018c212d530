"""Subjects of a benchmark: each a process of its own that works only when asked, so that they take turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Ask = Callable[..., Any]
"""Sends one line of words to a subject and waits for its answer."""


@contextmanager
def open_subject(module: str, arguments: Sequence[str]) -> Iterator[Ask]:
    """Start `python -m module arguments…`, which answers with `answer_lines`, and end it at the end.

    Raises:
        RuntimeError: it ended early; what it said is on stderr.
    """
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        answers = process.stdout

        def answer() -> Any:
            line = answers.readline()
            if not line:
                raise RuntimeError(
                    f"the measurement of {' '.join(arguments)} ended early: its message is above"
                )
            return json.loads(line)

        def ask(*words: object) -> Any:
            print(*words, file=process.stdin, flush=True)
            return answer()

        answer()  # it is ready
        try:
            yield ask
        finally:
            process.stdin.close()


def answer_lines(make: Callable[[], Callable[[list[str]], object]]) -> None:
    """Be a subject: make what is measured, then answer each line on stdin with one of JSON on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    answer = make()
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(line.split())), file=answers, flush=True)


def four_digits(value: float) -> float:
    """A measured figure without digits that mean nothing; a small ratio keeps as many as a large rate.

    >>> four_digits(0.00215155), four_digits(1234.56)
    (0.002152, 1235.0)
    """
    return float(f"{value:.4g}")
