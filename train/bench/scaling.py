"""`alexnet bench scaling`: what more ranks bring, by what travels between them, over loopback or a slow wire.

Every rank keeps its batch (weak scaling), and its share of the cores. Beside the ways to train, the same
steps run on the same ranks at the same time and send nothing. Efficiency is their time over that of a step:
so it tells what the traffic costs, and not what ranks take from each other that share a machine, as
`vs_one_rank` does.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import torch

from data_pipeline.common.errors import UserError
from train.bench.ranks import ALONE, Mode, RankFigures, ScalingSpec
from train.bench.turns import four_digits
from train.distributed.world import choose_device, cpu_share
from train.optim.precision import choose_precision

SCRIPT = Path(__file__).parents[2] / "scripts" / "netns_two_hosts.sh"


class ScalingRow(msgspec.Struct, frozen=True, kw_only=True):
    """One way to train on so many ranks.

    Args:
        link: `loopback`, or the rate of the wire between two hosts that share the ranks.
        step_s: the median over the rounds, of the slowest rank.
        efficiency: time of the same steps without traffic, over that of a step.
        vs_one_rank: images per second of a rank, over those of a single one; None without a row for it.
        sent_mb: megabytes that a rank sends in a step, counted by the kernel; None where it does not.
        formula_mb: megabytes by the formulas of docs/scaling.md; None where there is none.
    """

    link: str
    ranks: int
    mode: Mode
    images_per_s: float
    step_s: float
    efficiency: float
    vs_one_rank: float | None
    sent_mb: float | None
    formula_mb: float | None


class ScalingReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `bench_scaling` measured."""

    machine: str
    variant: str
    precision: str
    rank_batch: int
    crop_px: int
    rows: list[ScalingRow]
    notes: list[str]


def bench_scaling(
    *,
    variant: Literal["owt", "paper", "caffe", "bn"] = "owt",
    modes: Sequence[Mode] = ("ddp", "ddp+bf16", "hybrid"),
    ranks: Sequence[int] = (1, 2, 4),
    links: Sequence[str] = (),
    rank_batch: int = 64,
    crop_px: int = 224,
    num_classes: int = 1000,
    precision: str = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    rounds: int = 3,
    steps: int = 3,
    overrides: Sequence[str] = (),
    tell: Callable[[str], None] = lambda text: None,
) -> ScalingReport:
    """Measure steps on several ranks, in turns.

    Args:
        variant: which network.
        modes: `ddp` is always one of them, since its ranks do the steps without traffic, too.
        ranks: how many; each a torchrun.
        links: rates as tc takes them; even numbers of ranks are measured on two hosts joined by each, too.
        rank_batch: samples of a step on each rank.
        crop_px, num_classes: of the images.
        precision, device: as in a run.
        rounds: turns.
        steps: that are timed in each.
        overrides: further keys of the configuration.
        tell: called with a line on what is being done.
    Raises:
        UserError: two hosts cannot be had here, or the ranks failed; their messages are on stderr.
    """
    kind = choose_device(device)
    if kind == "cuda" and max(ranks) > torch.cuda.device_count():
        raise UserError(f"{max(ranks)} ranks, and {torch.cuda.device_count()} GPU(s): lower --ranks")
    chosen = choose_precision(precision, torch.device(kind)).name  # type: ignore[arg-type]
    threads = 0 if kind == "cuda" else max(1, cpu_share(1) // max(r for r in ranks if r <= cpu_share(1)))
    spec = ScalingSpec(
        variant=variant,
        modes=tuple(dict.fromkeys(("ddp", *modes))),
        rank_batch=rank_batch,
        crop_px=crop_px,
        num_classes=num_classes,
        precision=chosen,
        device=kind,
        rounds=rounds,
        steps=steps,
        threads=threads,
        overrides=tuple(overrides),
    )
    rows: list[ScalingRow] = []
    for link in ("loopback", *links):
        for count in ranks:
            if link != "loopback" and count % 2:
                continue
            tell(f"{count} rank(s), {link}")
            rows += _rows(spec, link, _run(spec, link, count), next((r for r in rows if r.ranks == 1), None))
    notes = ["efficiency: the same steps on the same ranks without traffic, over a step"]
    cores = len(os.sched_getaffinity(0))
    if kind == "cpu":
        notes.append(f"{threads} thread(s) a rank on {cores} cores")
        if max(ranks) * threads > cores:
            notes.append(f"more than {cores // threads} ranks share cores: their step_s is no scaling")
    name = torch.cuda.get_device_name() if kind == "cuda" else f"{cores} cores"
    return ScalingReport(
        machine=f"{platform.machine()}, {name}",
        variant=variant,
        precision=chosen,
        rank_batch=rank_batch,
        crop_px=crop_px,
        rows=rows,
        notes=notes,
    )


def _run(spec: ScalingSpec, link: str, ranks: int) -> RankFigures:
    module = ["-m", "train.bench.ranks", msgspec.json.encode(spec).decode()]
    if link == "loopback":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    else:
        if not SCRIPT.is_file():
            raise UserError(f"--link needs scripts/{SCRIPT.name} of the project, which its wheel has not")
        command = ["bash", str(SCRIPT), link, str(ranks // 2), "--"]
    threads = {"OMP_NUM_THREADS": str(spec.threads)} if spec.threads else {}
    done = subprocess.run(
        [*command, *module], stdout=subprocess.PIPE, env={**os.environ, "PYTHON": sys.executable, **threads}
    )
    if done.returncode:
        raise UserError(f"{ranks} rank(s) over {link} failed: their message is above")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=RankFigures)


def _rows(spec: ScalingSpec, link: str, found: RankFigures, one: ScalingRow | None) -> list[ScalingRow]:
    rows = []
    for mode in spec.modes:
        step_s = statistics.median(found.seconds[mode])
        ratios = [a / b for a, b in zip(found.seconds[ALONE], found.seconds[mode], strict=True)]
        sent, formula = found.sent_bytes[mode], found.formula_bytes[mode]
        rows.append(
            ScalingRow(
                link=link,
                ranks=found.world_size,
                mode=mode,
                images_per_s=four_digits(found.world_size * spec.rank_batch / step_s),
                step_s=four_digits(step_s),
                efficiency=four_digits(statistics.median(ratios)),
                vs_one_rank=None if one is None else four_digits(one.step_s / step_s),
                sent_mb=None if sent is None else four_digits(sent / 1e6),
                formula_mb=None if formula is None else four_digits(formula / 1e6),
            )
        )
    return rows


def describe(report: ScalingReport) -> str:
    """The report for people."""
    lines = [
        f"{report.machine}: {report.variant}, {report.precision}, {report.rank_batch} images of "
        f"{report.crop_px} pixels a rank",
        f"{'link':<12}{'ranks':>5}  {'mode':<13}{'images/s':>9}{'step s':>9}{'efficiency':>12}{'vs one':>8}"
        f"{'sent MB':>10}{'formula':>9}",
    ]
    for row in report.rows:
        cells = [f"{value:>{width}.4g}" if value is not None else f"{'-':>{width}}" for value, width in (
            (row.vs_one_rank, 8), (row.sent_mb, 10), (row.formula_mb, 9))]  # fmt: skip
        lines.append(
            f"{row.link:<12}{row.ranks:>5}  {row.mode:<13}{row.images_per_s:>9.1f}{row.step_s:>9.3f}"
            f"{row.efficiency:>12.0%}" + "".join(cells)
        )
    return "\n".join([*lines, *report.notes])
