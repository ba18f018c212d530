"""`alexnet bench scaling`: throughput of several ranks by how they train, over loopback or a slow wire.

Every rank keeps its batch (weak scaling), and its share of the cores. Beside the ways to train, the same
steps run on the same ranks at the same time and send nothing. Efficiency is their time over that of a step:
the cost of the traffic alone. `vs_one_rank` also has what ranks of one machine take from each other.

The ranks run `main` under torchrun, of which rank 0 prints JSON.
"""

from __future__ import annotations

import gc
import os
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import click
import msgspec
import torch
from torch import nn

from data_pipeline.common.errors import UserError
from data_pipeline.common.machine import usable_cores
from data_pipeline.common.start import own_command, own_script
from train.bench.harness import Report, four_digits, log, machine_name, median_ratio, table_lines, time_calls
from train.bench.trainer import bench_config, make_noise_parts, noise_batch, wait_for
from train.distributed.world import World, choose_device, cpu_share, open_world
from train.optim.precision import choose_precision
from train.step import StepParts, train_step

SCRIPT = Path(__file__).parents[2] / "scripts" / "netns_two_hosts.sh"
SETTINGS = {"ddp": (), "ddp+bf16": ("compress=bf16",), "hybrid": ("parallel=hybrid",)}
ALONE = "alone"
"""The same steps on as many ranks at the same time, of which none sends anything."""
WARM_UP = 3
"""Steps before those that count: DDP orders its buckets anew after the first."""
TCP_INFO_BYTES_SENT = 200
"""Offset of `tcpi_bytes_sent`, followed by `tcpi_bytes_retrans`, in `struct tcp_info` of linux/tcp.h."""
COLUMNS = (
    ("link", "<12"), ("ranks  ", "<7"), ("mode", "<13"), ("images/s", ">9.1f"), ("step s", ">9.3f"),
    ("efficiency", ">12.0%"), ("vs one", ">8.4g"), ("sent MB", ">10.4g"), ("formula", ">9.4g"),
)  # fmt: skip


class ScalingSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the ranks.

    Attributes:
        modes: keys of `SETTINGS`, `ddp` first: its ranks do the steps without traffic, too.
        rank_batch: samples of a step on each rank.
        num_rounds, steps: how often each mode is measured, and over how many steps.
        threads: of each rank, on a CPU; 0 on a GPU.
        overrides: further keys of the configuration.
    """

    variant: str
    modes: tuple[str, ...]
    rank_batch: int
    crop_px: int
    num_classes: int
    precision: str
    device: Literal["cpu", "cuda"]
    num_rounds: int
    steps: int
    threads: int
    overrides: tuple[str, ...]


def bench_scaling(
    *, ranks: Sequence[int], links: Sequence[str], modes: Sequence[str], device: Any, precision: Any,
    **options: Any,
) -> Report:  # fmt: skip
    """Measure steps on several ranks; the options are those of the command, most of them `ScalingSpec`'s.

    Args:
        links: even numbers of ranks are measured on two hosts joined by each, too.
    Raises:
        UserError: two hosts cannot be had here, or the ranks failed; their messages are on stderr.
    """
    kind = choose_device(device)
    if kind == "cuda" and max(ranks) > torch.cuda.device_count():
        raise UserError(f"{max(ranks)} ranks, and {torch.cuda.device_count()} GPU(s): lower --ranks")
    threads = 0 if kind == "cuda" else max(1, cpu_share(1) // max(r for r in ranks if r <= cpu_share(1)))
    chosen = choose_precision(precision, torch.device(kind)).name
    modes = tuple(dict.fromkeys(("ddp", *modes)))
    spec = ScalingSpec(modes=modes, precision=chosen, device=kind, threads=threads, **options)
    rows: list[dict[str, Any]] = []
    for link in ("loopback", *links):
        for count in ranks:
            if link == "loopback" or count % 2 == 0:
                log.info(f"{count} rank(s), {link}")
                one = next((row["step_s"] for row in rows if row["ranks"] == 1), None)
                for row in run_ranks(spec, link, count):
                    versus = None if one is None else four_digits(one / row["step_s"])
                    rows.append({"link": link, "ranks": count, **row, "vs_one_rank": versus})
    notes = ["efficiency: the same steps on the same ranks without traffic, over a step"]
    if kind == "cpu":
        cores = usable_cores()
        notes.append(f"{threads} thread(s) a rank on {cores} cores")
        if max(ranks) * threads > cores:
            notes.append(f"more than {cores // threads} ranks share cores: their step_s is no scaling")
    settings = {name: getattr(spec, name) for name in ("variant", "precision", "rank_batch", "crop_px")}
    return {"machine": machine_name(kind), **settings, "rows": rows, "notes": notes}


def run_ranks(spec: ScalingSpec, link: str, ranks: int) -> list[dict[str, Any]]:
    """Start the ranks by torchrun, on one host or on two; return what `measure` returns there."""
    script = [*own_script("train.bench.scaling:main"), msgspec.json.encode(spec).decode()]
    if link == "loopback":
        command = [*own_command("torch.distributed.run:main"), "--standalone", f"--nproc_per_node={ranks}"]
    else:
        if not SCRIPT.is_file():
            raise UserError(f"--link needs scripts/{SCRIPT.name} of the project, which its wheel has not")
        command = ["bash", str(SCRIPT), link, str(ranks // 2), "--"]
    threads = {"OMP_NUM_THREADS": str(spec.threads)} if spec.threads else {}
    environment = {**os.environ, "PYTHON": sys.executable, **threads}
    done = subprocess.run([*command, *script], stdout=subprocess.PIPE, env=environment)
    if done.returncode:
        raise UserError(f"{ranks} rank(s) over {link} failed: their message is above")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=list[dict[str, Any]])


def describe(report: Report) -> list[str]:
    """Return a table row for each link, number of ranks and mode, then the notes."""
    rows = [[*{**row, "ranks": f"{row['ranks']:>5}"}.values()] for row in report["rows"]]
    head = "{machine}: {variant}, {precision}, {rank_batch} images of {crop_px} pixels a rank"
    return [head.format(**report), *table_lines(COLUMNS, rows), *report["notes"]]


def measure(spec: ScalingSpec, world: World) -> list[dict[str, Any]]:
    """Measure each mode once a round, and after `ddp` its steps without traffic.

    Returns:
        A row for each mode, with room for the comparison with one rank. `step_s` is the slowest rank's, the
        median over the rounds; `sent_mb` that of the rank that sends most, counted by the kernel, None on
        GPUs; `formula_mb` is by docs/scaling.md.
    """
    step_s: defaultdict[str, list[float]] = defaultdict(list)
    sent: dict[str, tuple[int | None, int]] = {}
    batch = noise_batch(spec.rank_batch, spec.crop_px, spec.num_classes)
    # One network at a time: three of them, with gradients and momentum, would not fit into a small machine.
    for _ in range(spec.num_rounds):
        for mode in spec.modes:
            config = bench_config(
                spec.variant, spec.rank_batch * world.world_size, spec.crop_px, spec.precision, spec.device,
                (*spec.overrides, *SETTINGS[mode]),
            )  # fmt: skip
            parts = make_noise_parts(config, spec.num_classes, world)
            step = partial(train_step, parts, [batch], 0.0, 0)
            for _ in range(WARM_UP):
                step()
            step_s[mode].append(slowest_step_s(step, spec.steps, world))
            formula = formula_bytes(parts, spec, mode, config.model.hidden_units)
            sent[mode] = bytes_sent_by(step, world), formula
            if mode == "ddp":
                with parts.parallel.no_sync():
                    step()
                    step_s[ALONE].append(slowest_step_s(step, spec.steps, world))
            del parts, step
            gc.collect()
    return [
        {
            "mode": mode,
            "images_per_s": four_digits(world.world_size * spec.rank_batch / statistics.median(step_s[mode])),
            "step_s": four_digits(statistics.median(step_s[mode])),
            "efficiency": four_digits(median_ratio(step_s[ALONE], step_s[mode]) or 0),
            "vs_one_rank": None,
            "sent_mb": None if counted is None else four_digits(counted / 1e6),
            "formula_mb": four_digits(formula / 1e6),
        }
        for mode, (counted, formula) in sent.items()
    ]


def slowest_step_s(step: Callable[[], object], count: int, world: World) -> float:
    """Return the median seconds of a step, of the slowest rank."""
    times: list[float] = []
    for _ in range(count):
        world.barrier()
        times += time_calls(step, clock=partial(wait_for, world.device))
    (slowest,) = world.max(statistics.median(times))
    return slowest


def bytes_sent_by(step: Callable[[], object], world: World) -> int | None:
    """Count the bytes of the rank that sends most; None where the kernel does not see them."""
    if world.device.type != "cpu":
        return None  # NCCL sends past the connections that the kernel counts
    world.barrier()
    before = sent_bytes()
    step()
    time.sleep(0.05)  # gloo's threads may still be sending
    (most,) = world.max(sent_bytes() - before)
    return int(most)


def sent_bytes() -> int:
    """Return the bytes written to all TCP connections that are open now: payload, without retransmissions.

    gloo keeps its connections for as long as its group lives, so the difference of two calls is what was sent
    in between, with a few hundred bytes for torchrun's store. NCCL's traffic through shared memory or
    InfiniBand is not counted.

    Raises:
        OSError: a kernel from before Linux 5.5 does not count.
    """
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing's own, or one that was closed meanwhile
            if str(entry.readlink()).startswith("socket:"):
                # A descriptor of its own: closing it leaves the connection open.
                with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                    total += _sent(connection)
    return total


def _sent(connection: socket.socket) -> int:
    if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
        return 0
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES_SENT + 16)
    if len(info) < TCP_INFO_BYTES_SENT + 16:
        raise OSError("this kernel does not count the bytes of a TCP connection; Linux 5.5 does")
    sent, again = struct.unpack_from("=QQ", info, TCP_INFO_BYTES_SENT)
    return int(sent - again)


def formula_bytes(parts: StepParts, spec: ScalingSpec, mode: str, hidden_units: int) -> int:
    """Compute the bytes that each rank sends in a step: see docs/scaling.md."""
    ranks, network = parts.world.world_size, parts.network
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    all_parameters = sum(p.numel() for p in network.parameters())
    there_and_back = 2 * (ranks - 1) / ranks
    if mode != "hybrid":
        return round(there_and_back * all_parameters * (2 if mode == "ddp+bf16" else 4))
    in_layers = sum(p.numel() for layer in layers for p in layer.parameters())
    activation = 4 if parts.precision.name == "fp32" else 2
    numbers = (layers[0].in_features + hidden_units) * activation + 4 * spec.num_classes
    return round(there_and_back * (4 * (all_parameters - in_layers) + spec.rank_batch * ranks * numbers))


def main() -> None:
    """Be a rank: measure what the command line says in JSON, and print the figures on rank 0."""
    spec = msgspec.json.decode(sys.argv[1], type=ScalingSpec)
    if spec.device == "cpu":
        torch.set_num_threads(spec.threads)
    with open_world(spec.device) as world:
        found = measure(spec, world)
        if world.is_main:
            click.echo(msgspec.json.encode(found))
