"""`alexnet bench scaling`: throughput of several ranks by how they train, over loopback or a slow wire.

Every rank keeps its batch (weak scaling), and its share of the cores; torchrun starts `main` on each.
"""

from __future__ import annotations

import gc
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from timeit import timeit
from typing import Any

import msgspec
import torch
from torch import nn

from data_pipeline.common.errors import UserError
from data_pipeline.common.machine import usable_cores
from data_pipeline.common.start import own_command, own_script
from train.bench.harness import Report, log, machine_name, make_report, median_ratio
from train.bench.trainer import bench_config
from train.config.schema import RunConfig
from train.distributed.measure import wait_for
from train.distributed.world import World, choose_device, open_world
from train.optim.precision import choose_precision
from train.setup import make_noise_parts, noise_batch
from train.step import StepParts, train_step

SCRIPT = Path(__file__).parents[2] / "scripts" / "netns_two_hosts.sh"
SETTINGS = {"ddp": (), "ddp+bf16": ("compress=bf16",), "hybrid": ("parallel=hybrid",)}
BYTES_SENT = 200  # where tcpi_bytes_sent, then tcpi_bytes_retrans, are in struct tcp_info of linux/tcp.h
INTERNET = (socket.AF_INET, socket.AF_INET6)
Rounds = dict[str, dict[str, list[float]]]  # of figures by mode and name


class RankWork(msgspec.Struct):
    """The work of the ranks: the configuration of each mode, `ddp` first, and how often."""

    configs: dict[str, RunConfig]
    num_classes: int
    num_rounds: int
    steps: int


def bench_scaling(
    *, variant: str, modes: Sequence[str], ranks: Sequence[int], links: Sequence[str], rank_batch: int,
    crop_px: int, precision: Any, device: Any, overrides: Sequence[str], **counts: int,
) -> Report:  # fmt: skip
    """Measure steps on several ranks, even numbers of them on two hosts joined by each of the links, too.

    Raises UserError where two hosts cannot be had, or the ranks fail; their messages are on stderr.
    """
    kind, cores = choose_device(device), usable_cores()
    if kind == "cuda" and max(ranks) > torch.cuda.device_count():
        raise UserError(f"{max(ranks)} ranks, and {torch.cuda.device_count()} GPU(s): lower --ranks")
    most_alone = max((count for count in ranks if count <= cores), default=cores)
    threads = cores // most_alone if kind == "cpu" else 1
    chosen = choose_precision(precision, torch.device(kind)).name
    rows: list[dict[str, Any]] = []
    for link in ("loopback", *links):
        for count in (count for count in ranks if link == "loopback" or count % 2 == 0):
            log.info(f"{count} rank(s), {link}")
            one = next((row["step_s"] for row in rows if row["ranks"] == 1), None)
            make = partial(bench_config, variant, rank_batch * count, crop_px, chosen, kind)
            configs = {mode: make((*overrides, *SETTINGS[mode])) for mode in ("ddp", *modes)}
            rounds = run_ranks(RankWork(configs, **counts), link, count, threads)
            for mode, figures in rounds.items():
                step_s = median(figures["step_s"])
                rows.append({
                    "link": link, "ranks": count, "mode": mode, "images_per_s": rank_batch * count / step_s,
                    **{name: median(values) for name, values in figures.items()},
                    "efficiency": median_ratio(rounds["ddp"]["alone_s"], figures["step_s"]),
                    "vs_one_rank": one and one / step_s,
                })  # fmt: skip
    notes = ["alone_s: the same steps on the same ranks without traffic; efficiency: it over step_s"]
    if max(ranks) * threads > cores:
        notes.append(f"more than {cores // threads} ranks share cores: their step_s is no scaling")
    settings = {
        "machine": machine_name(kind), "rank_threads": threads, "variant": variant, "precision": chosen,
        "rank_batch": rank_batch, "crop_px": crop_px,
    }  # fmt: skip
    return make_report(settings, rows, {}, notes)


def run_ranks(work: RankWork, link: str, ranks: int, threads: int) -> Rounds:
    """Start the ranks by torchrun, on one host or on two; return what rank 0 prints."""
    script = [*own_script("train.bench.scaling:main"), msgspec.json.encode(work).decode()]
    if link == "loopback":
        command = [*own_command("torch.distributed.run:main"), "--standalone", f"--nproc_per_node={ranks}"]
    elif SCRIPT.is_file():
        command = ["bash", str(SCRIPT), link, str(ranks // 2), "--"]
    else:
        raise UserError(f"--link needs scripts/{SCRIPT.name} of the project, which its wheel has not")
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([*command, *script], stdout=subprocess.PIPE, env=environment)
    if done.returncode:
        raise UserError(f"{ranks} rank(s) over {link} failed: their message is above")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Rounds)


def main() -> None:
    """Be a rank: measure what the command line says in JSON, each mode once a round; print it on rank 0."""
    work = msgspec.json.decode(sys.argv[1], type=RankWork)
    rounds: Rounds = {mode: {} for mode in work.configs}
    with open_world(work.configs["ddp"].device) as world:
        for mode in [*work.configs] * work.num_rounds:
            for name, value in measure(work, mode, world).items():
                rounds[mode].setdefault(name, []).append(value)
            gc.collect()  # three networks, with gradients and momentum, would not fit into a small machine
        if world.is_main:
            sys.stdout.buffer.write(msgspec.json.encode(rounds))


def measure(work: RankWork, mode: str, world: World) -> dict[str, float]:
    """Measure the slowest rank's steps in a mode, and after `ddp` the same without traffic (`alone_s`).

    `sent_mb` is that of the rank that sends most; `formula_mb` is by docs/scaling.md.
    """
    config = work.configs[mode]
    size, crop_px = config.global_batch, config.preprocessing.crop_px
    batch = noise_batch(size // world.world_size, crop_px, work.num_classes)
    parts = make_noise_parts(config, work.num_classes, world)
    step = partial(train_step, parts, [batch], 0.0, 0)

    def median_s() -> float:
        times: list[float] = []
        for _ in range(work.steps):
            world.barrier()
            times.append(timeit(step, timer=partial(wait_for, world.device), number=1))
        return world.max(median(times))[0]

    timeit(step, number=3)  # DDP orders its buckets anew after the first
    figures = {"step_s": median_s()}
    if config.device == "cpu":  # NCCL sends past the connections that the kernel counts
        world.barrier()
        before = sent_bytes()
        step()
        time.sleep(0.05)  # gloo's threads may still be sending
        figures["sent_mb"] = world.max(sent_bytes() - before)[0] / 1e6
    figures["formula_mb"] = formula_bytes(parts, mode, size) / 1e6
    if mode == "ddp":
        with parts.parallel.no_sync():
            step()
            figures["alone_s"] = median_s()
    return figures


def sent_bytes() -> int:
    """Return the bytes written to all TCP connections that are open now: payload, without retransmissions.

    gloo keeps its connections for as long as its group lives, so the difference of two calls is what was sent
    in between, with a few hundred bytes for torchrun's store. Kernels before Linux 5.5 do not count.
    """
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing's own, or one that was closed meanwhile
            if str(entry.readlink()).startswith("socket:"):
                # A descriptor of its own: closing it leaves the connection open.
                with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                    if connection.type == socket.SOCK_STREAM and connection.family in INTERNET:
                        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_SENT + 16)
                        sent, again = struct.unpack_from("=QQ", info, BYTES_SENT)
                        total += sent - again
    return total


def formula_bytes(parts: StepParts, mode: str, global_batch: int) -> float:
    """Compute the bytes that each rank sends in a step: see docs/scaling.md."""
    layers = [module for module in parts.network.modules() if isinstance(module, nn.Linear)]
    all_parameters = sum(p.numel() for p in parts.network.parameters())
    there_and_back = 2 * (parts.world.world_size - 1) / parts.world.world_size
    if mode != "hybrid":
        return there_and_back * all_parameters * (2 if mode == "ddp+bf16" else 4)
    in_layers = sum(p.numel() for layer in layers for p in layer.parameters())
    activation = 4 if parts.precision.name == "fp32" else 2
    numbers = (layers[0].in_features + layers[0].out_features) * activation + 4 * layers[-1].out_features
    return there_and_back * (4 * (all_parameters - in_layers) + global_batch * numbers)
