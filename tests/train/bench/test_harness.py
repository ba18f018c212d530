"""The harness of the benchmarks: a case lives in a process of its own, and a report holds what all did."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from train.bench.harness import Bench, Case, CaseError, describe, make_report, run_alone


class Counter:
    """Counts its calls, prints, and leaves a file when its process ends."""

    def __init__(self, stack: ExitStack, last_words: Path) -> None:
        self.calls = 0
        stack.callback(lambda: last_words.write_text(str(self.calls)))

    def add(self, number: int) -> tuple[int, int]:
        print("what a library prints")  # noqa: T201
        self.calls += number
        return os.getpid(), self.calls

    def speed(self, factor: float) -> dict[str, float]:
        self.calls += 1
        if self.calls == 3 and factor > 1:
            raise ValueError("too hot")
        return {"images_per_s": factor * 3**self.calls}

    def die(self) -> None:
        os._exit(3)

    def fail(self) -> None:
        raise ValueError("no\n  memory")

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@pytest.mark.slow
def test_case_keeps_its_state_in_a_process_of_its_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as stack:
        case = Case(stack, Counter, tmp_path / "calls")
        case.build()
        (pid, first), (same, second) = case.request("add", 1), case.request("add", 2)
        assert pid == same != os.getpid() and (first, second) == (1, 3)
        assert run_alone(os.getpid) not in (pid, os.getpid())
    assert (tmp_path / "calls").read_text() == "3"
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.count("what a library prints") == 2


@pytest.mark.slow
def test_case_that_dies_says_with_which_code(tmp_path: Path) -> None:
    with pytest.raises(CaseError, match=r"^its process ended with code 3$"), ExitStack() as stack:
        case = Case(stack, Counter, tmp_path / "calls")
        case.build()
        case.request("die")


@pytest.mark.slow
def test_case_that_fails_says_why_in_a_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with ExitStack() as stack:
        case = Case(stack, Counter, tmp_path / "calls")
        case.build()
        with pytest.raises(CaseError, match=r"^ValueError: no memory$"):
            case.request("fail")
        with pytest.raises(CaseError, match="its process ended"):
            case.request("add", 1)
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.slow
def test_case_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    started = time.perf_counter()
    with ExitStack() as stack:
        case = Case(stack, Counter, tmp_path / "calls")
        case.limit(60)
        case.build()
        assert case.request("add", 1)[1] == 1
        case.limit(0.2)  # of its own, whatever building took
        with pytest.raises(CaseError, match=r"^cut off after 0\.2 s$"):
            case.request("sleep", 600)
        late = Case(stack, Counter, tmp_path / "late")
        late.limit(0.01)
        with pytest.raises(CaseError, match=r"^cut off after 0\.01 s$"):
            late.build()
    assert time.perf_counter() - started < 300 and not (tmp_path / "calls").exists()


@pytest.mark.slow
def test_bench_goes_on_without_a_case_that_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    with ExitStack() as stack:
        cases = {name: (Counter, tmp_path / name) for name in ("slow", "fast")}
        bench.start(stack, cases, {"slow": None, "fast": 60})
        bench.measure(2, "speed", 1.0)
        bench.measure(1, "speed", 2.0, only=["fast"], label="warm ")
        bench.note("add", 0, only=["fast"])
    assert (
        bench.failures == {"fast": "ValueError: too hot"} and "fast: ValueError: too hot" in caplog.messages
    )
    assert bench.rounds == {"slow": {"images_per_s": [3.0, 9.0]}, "fast": {"images_per_s": [3.0, 9.0]}}
    ratios = {"fast_vs_slow": bench.ratio("images_per_s", "fast", "slow"), "gain": None, "loss": None}
    report = bench.report({"machine": "here"}, ["slow", "fast"], ratios, ["loss: never", "done"])
    assert report["rows"] == [
        {"case": "slow", "images_per_s": 6.0, "failure": None},
        {"case": "fast", "images_per_s": 6.0, "failure": "ValueError: too hot"},
    ]
    assert report["rounds"]["slow"] == {"images_per_s": [3.0, 9.0]}
    assert describe(report) == [
        "machine: here",
        "case  images_per_s  failure",
        "slow           6.0  -",
        "fast           6.0  ValueError: too hot",
        "fast_vs_slow  1.0",
        "gain: not measured",
        "loss: never",
        "done",
    ]


def test_report_keeps_four_digits_of_each_figure() -> None:
    report = make_report({"peaks": {"bf16": 1234.56}}, [{"step_s": 0.00215155}], {"ratio": 1.23456}, [])
    assert report == {
        "peaks": {"bf16": 1235.0}, "rows": [{"step_s": 0.002152}], "ratios": {"ratio": 1.235}, "notes": [],
    }  # fmt: skip
