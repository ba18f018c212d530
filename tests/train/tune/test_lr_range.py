"""The learning-rate range test: what is read from a sweep, and the command on real steps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from alexnet import main
from tests.helpers.ranks import TINY, link_subset
from train.tune.lr_range import Sweep, advise_rate, rates_between, read_sweep

LEVEL = math.log(10)


def sweep_of(losses: list[float | None], *, low: float = 1e-4, high: float = 1.0) -> Sweep:
    return read_sweep(0, rates_between(low, high, len(losses)), losses, len(losses), LEVEL)


def bowl(largest: float, num_steps: int = 81) -> list[float | None]:
    """A loss that falls, is lowest at half of a rate, and is lost behind that, with outliers."""
    rates = rates_between(1e-4, 1.0, num_steps)
    losses: list[float | None] = [
        LEVEL + 0.1 if rate > largest else 1.0 + 0.4 * abs(math.log10(2 * rate / largest)) for rate in rates
    ]
    return [0.1 if n == 3 else 8.0 if n % 13 == 7 else loss for n, loss in enumerate(losses)]


def test_lr_advice_is_half_of_the_largest_rate_that_works() -> None:
    sweeps = [sweep_of(bowl(largest)) for largest in (0.01, 0.02, 0.08)]
    found = [sweep.largest_rate or 0 for sweep in sweeps]
    assert found == pytest.approx([0.01, 0.02, 0.08], rel=0.15)
    for sweep, largest in zip(sweeps, found, strict=True):
        assert sweep.best_rate is not None and 0.25 < sweep.best_rate / largest < 1
    rate, why = advise_rate(sweeps, LEVEL, [])
    assert rate == pytest.approx(found[1] / 2, rel=0.05)
    assert f"{found[0]:.2g} to {found[2]:.2g} over 3 seeds" in why


def test_lr_advice_is_none_where_no_rate_follows() -> None:
    guessing = sweep_of([LEVEL * 1.001] * 40)
    assert guessing.best_rate is None
    rate, why = advise_rate([guessing], LEVEL, ["model.init=he in place of torch"])
    assert rate is None
    assert "2.303" in why and "more --steps" in why and "init=he in place of torch" in why

    falling = sweep_of([2.0 - 0.01 * n for n in range(40)], high=0.1)
    rate, why = advise_rate([falling], LEVEL, [])
    assert rate is None and "0.1: try a higher --to" in why

    rising = sweep_of([1.0 + 0.01 * n for n in range(40)])
    rate, why = advise_rate([rising], LEVEL, [])
    assert rate is None and "0.0001 on: try a lower --from" in why

    rate, why = advise_rate([sweep_of(bowl(0.02)), guessing], LEVEL, [])
    assert rate is not None and "1 of 2 sweeps never left" in why


def test_lr_sweep_ends_where_the_loss_diverges() -> None:
    lost = sweep_of([2.0, 1.5, 1.4, 1.3, 2.1, 40.0])
    assert lost.ended == "the loss was 40" and lost.edge is None
    skipped = sweep_of([2.0, 1.5, 1.2, None, None, None, None, None])
    assert skipped.ended == "5 steps in a row had no finite gradient"
    assert skipped.smoothed[-1] == math.inf and skipped.best_rate is not None


@pytest.mark.slow
def test_bench_lr_sweeps_the_recipe_and_undoes_its_scaling(demo_data: Path, tmp_path: Path) -> None:
    data = link_subset(demo_data, tmp_path / "data", num_train=60, num_val=10)
    picture = tmp_path / "rates.PNG"
    scaled = ("global_batch=20", "schedule.scaling=linear", "schedule.reference_batch=10")
    sets = [f"--set={text}" for text in (*TINY, *scaled)]
    options = ["--steps=12", "--sweeps=2", "--from=1e-4", "--to=10", f"--plot={picture}", "--json"]
    done = CliRunner().invoke(main, ["bench", "lr", f"--data={data}", *sets, *options])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [sweep["seed"] for sweep in report["sweeps"]] == [0, 1]
    first, second = (sweep["losses"] for sweep in report["sweeps"])
    assert first[0] != second[0]
    assert report["guess_loss"] == pytest.approx(LEVEL, rel=1e-3)
    assert report["recipe_rate"] == pytest.approx(0.04)  # 0.02 for a batch of 10
    for sweep in report["sweeps"]:
        # Steps of a rate of 10 cannot go well.
        assert sweep["ended"] and len(sweep["losses"]) == len(sweep["rates"]) < 12
        assert sweep["rates"][1] / sweep["rates"][0] == pytest.approx(1e5 ** (1 / 11))
    if report["learning_rate"] is not None:
        assert report["setting"] == f"schedule.learning_rate={report['learning_rate'] / 2:.3g}"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert not list(tmp_path.glob("runs*"))


def test_bench_lr_refuses_wrong_options_in_one_line(tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"\x89PNG\r\n\x1a\n of somebody")
    for option, text in (
        (f"--plot={photo}", "photo.png exists and is not a picture of alexnet bench: name another file"),
        (f"--plot={tmp_path / 'rates.txt'}", "a picture ends in .png, .svg, .pdf, not rates.txt"),
        (f"--plot={tmp_path / 'no' / 'rates.png'}", "there is no folder"),
        ("--from=2", "the first rate (--from) must be below the last (--to), not 2 and 1"),
    ):
        done = CliRunner().invoke(main, ["bench", "lr", f"--plot={tmp_path / 'a.png'}", option])
        assert done.exit_code == 2 and text in done.stderr, done.output
    assert list(tmp_path.iterdir()) == [photo]
