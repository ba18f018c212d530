"""The harness of the benchmarks: a case lives in a process of its own, which ends with its stack."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from train.bench.harness import Case, CaseError, run_alone


class Counter:
    """Counts its calls, prints, and leaves a file when its process ends."""

    def __init__(self, stack: ExitStack, last_words: Path) -> None:
        self.calls = 0
        stack.callback(lambda: last_words.write_text(str(self.calls)))

    def add(self, number: int) -> tuple[int, int]:
        print("what a library prints")  # noqa: T201
        self.calls += number
        return os.getpid(), self.calls

    def die(self) -> None:
        os._exit(3)

    def fail(self) -> None:
        raise ValueError("no\n  memory")

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def test_case_keeps_its_state_in_a_process_of_its_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as stack:
        case = Case(stack, Counter, tmp_path / "calls")
        (pid, first), (same, second) = case.request("add", 1), case.request("add", 2)
        assert pid == same != os.getpid() and (first, second) == (1, 3)
        assert run_alone(os.getpid) not in (pid, os.getpid())
    assert (tmp_path / "calls").read_text() == "3"
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.count("what a library prints") == 2


def test_case_that_dies_is_named(tmp_path: Path) -> None:
    with pytest.raises(CaseError, match=r"calls: its process ended with code 3$"), ExitStack() as stack:
        Case(stack, Counter, tmp_path / "calls").request("die")


def test_case_that_fails_says_why_in_a_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with ExitStack() as stack:
        case = Case(stack, Counter, tmp_path / "calls", build=False)
        case.build()
        with pytest.raises(CaseError, match=r"/calls: ValueError: no memory$"):
            case.request("fail")
        with pytest.raises(CaseError, match="its process ended"):
            case.request("add", 1)
    assert "Traceback" in capfd.readouterr().err


def test_case_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    started = time.perf_counter()
    with ExitStack() as stack:
        case = Case(stack, Counter, tmp_path / "calls", limit_s=60)
        assert case.request("add", 1)[1] == 1
        case._limit_s = case._used_s + 0.2  # building it took a second or more of the 60
        with pytest.raises(CaseError, match=r"/calls: cut off after \d"):
            case.request("sleep", 600)
    assert time.perf_counter() - started < 300 and not (tmp_path / "calls").exists()


def test_case_builds_within_a_limit_of_its_own(tmp_path: Path) -> None:
    with ExitStack() as stack:
        case = Case(stack, Counter, tmp_path / "calls", limit_s=0.2, build_limit_s=60)
        with pytest.raises(CaseError, match=r"/calls: cut off after 0\.2 s$"):
            case.request("sleep", 600)
        with pytest.raises(CaseError, match=r"/calls: cut off after 0\.01 s$"):
            Case(stack, Counter, tmp_path / "calls", limit_s=60, build_limit_s=0.01)
