"""`alexnet bench infer`: files to rows, phase by phase and against a plain loop; the first row's time.

The models' weights are random, but their last layer classifies the photographs. So they pass the exporter's
gate as any checkpoint does, and their accuracy means something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from data_pipeline.common.machine import usable_cores
from data_pipeline.common.start import own_script
from data_pipeline.datasets.open import open_dataset
from data_pipeline.loader import Loader
from infer.bench.cases import BaselineCase, BundleCase, ProcessCase
from infer.bundle.load import Bundle, load_bundle
from infer.bundle.schema import Precision
from infer.export.pipeline import export_models
from infer.predict.decode import open_decoder, valid_images
from train.bench.harness import Bench, Report, log, machine_name
from train.bench.images import FOLDER, link_bench_images
from train.checkpoints.format import Snapshot
from train.checkpoints.write import save_checkpoint
from train.config.load import make_config
from train.models.alexnet import Normalize, make_model

FIRST_BATCH, MAX_BATCH = 32, 256  # most ratios are for the first; other sizes have one round
SHARPNESS = 20.0  # the logit of a photograph's own class, those of unlike ones being near 0
NOTES = (
    "decode to end_to_end: images/s; _ms and _p99_ms: of a batch, median and 99th percentile",
    "vs_bound: end_to_end over decoding and model, one after the other; on a GPU over the slower of the two",
    f"end_to_end_vs_bound, vs_plain_loop, int8_vs_fp32: the worst network, at batches of {FIRST_BATCH}",
    "vs_plain_loop_at_its_best_batch: the worst of all networks and batch sizes, each at the same size",
)


def bench_infer(
    folder: Path | None, *, models: Sequence[str], precisions: Sequence[Precision], batches: Sequence[int],
    num_images: int, num_rounds: int, device: str, round_images: int = 512, overrides: Sequence[str] = (),
) -> Report:  # fmt: skip
    """Measure prediction; the options are those of the command, and `overrides`, keys of the recipes."""
    bench, data = Bench(), folder or FOLDER / f"classes-{num_images}"  # of one photograph, in both splits
    names = (f"{split}/photo-{n:04d}/photo.jpg" for split in ("train", "val") for n in range(num_images))
    link_bench_images(data, names, 2 * num_images, num_images)
    subjects: dict[str, tuple[Callable[..., object], Path]] = {}
    with ExitStack() as stack:
        work = Path(stack.enter_context(TemporaryDirectory(prefix="alexnet-bench-")))
        for model in models:
            log.info(f"{model}: a checkpoint, and its exports")
            checkpoint = make_bench_checkpoint(model, data, work / model, overrides)
            for precision in precisions:
                made = export_models(
                    checkpoint, ("onnx",), data=data, out=work / model / precision, max_batch=MAX_BATCH,
                    precision=precision,
                )  # fmt: skip
                subjects[f"{model} {precision}"] = BundleCase, made["onnx"].folder
            subjects[f"{model} plain"] = BaselineCase, checkpoint
        for batch in batches:
            with ExitStack() as opened:
                cases = {
                    f"{name} batch {batch}": (make, source, data / "val", device, batch)
                    for name, (make, source) in subjects.items()
                }
                bench.start(opened, cases)
                rounds = num_rounds if batch == FIRST_BATCH else 1
                bench.measure(rounds, "measure", round_images, label=f"batches of {batch}, ")
                bench.note("facts")
        commands = make_commands(load_bundle(work / models[-1] / precisions[0]), data)
        bench.start(stack, {name: (ProcessCase, *command) for name, command in commands.items()})
        bench.measure(num_rounds, "measure", label="the first row, and --help, ")
    settings = {"machine": machine_name(device), "num_images": num_images}
    rows = [*(f"{name} batch {batch}" for name in subjects for batch in batches), *commands]
    return bench.report(settings, rows, make_ratios(bench, models, precisions[0], batches), NOTES)


def make_bench_checkpoint(variant: str, data: Path, run: Path, overrides: Sequence[str] = ()) -> Path:
    """Write the checkpoint of a random network that classifies the photos of `data`; return its folder."""
    keys = (f"model.name={variant}", "model.init=he", *overrides)
    config = make_config(f"imagenet-{variant}", keys, data)
    dataset, contract = open_dataset(data, "val", quarantine=False), config.preprocessing
    torch.manual_seed(0)
    network = make_model(config.model, num_classes=len(dataset.classes), crop_px=contract.crop_px).eval()
    normalize = Normalize(contract)
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    seen: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.inference_mode(), open_decoder(contract, 64) as decoder:
        for batch in Loader(decoder, contract).eval(dataset, micro_batch=64):
            network(normalize(torch.from_numpy(valid_images(batch))))
    handle.remove()
    # The nearest-mean classifier of what comes out of the layer before, in closed form.
    features = torch.cat(seen)  # in the order of the classes, of which each has one photograph
    mean = features.mean(0)
    apart = features - mean
    with torch.no_grad():
        last.weight.copy_(SHARPNESS * apart / apart.norm(dim=1, keepdim=True) / apart.norm(dim=1).mean())
        last.bias.copy_(-last.weight @ mean)
    snapshot = Snapshot(
        step=1, epoch=1, samples_seen=len(dataset), config=config, classes=dataset.classes, metrics={},
        states={"model": network.state_dict()},
    )  # fmt: skip
    return save_checkpoint(run / "checkpoints", snapshot)


def make_commands(bundle: Bundle, data: Path) -> dict[str, list[str]]:
    """Return Python's arguments for whole processes: ours, and the least that each has to do."""
    photo, alexnet = next((data / "val").rglob("*.jpg")), own_script("alexnet:main")
    session = (
        f"import onnxruntime as o; s = o.SessionOptions(); s.intra_op_num_threads = {usable_cores()}; "
        f"o.InferenceSession({str(bundle.cpu_path)!r}, s, providers=['CPUExecutionProvider'])"
    )
    return {
        "help": [*alexnet, "--help"],
        "import_click": ["-c", "import click"],
        "first_row": [*alexnet, "predict", str(photo), "--model", str(bundle.folder), "--format", "jsonl"],
        "session": ["-c", session],
    }


def make_ratios(
    bench: Bench, models: Sequence[str], ours: str, batches: Sequence[int]
) -> dict[str, float | None]:
    """Return the ratios, each the least of the networks that were measured; int8's also by network."""

    def least(ratios: Iterable[float | None]) -> float | None:
        return min((ratio for ratio in ratios if ratio is not None), default=None)

    def over(figure: str, top: str, bottom: str, batch: int = FIRST_BATCH) -> list[float | None]:
        pairs = [(f"{model} {top} batch {batch}", f"{model} {bottom} batch {batch}") for model in models]
        return [bench.ratio(figure, *pair) for pair in pairs]

    int8, loops = over("model", "int8", "fp32"), {n: over("end_to_end", ours, "plain", n) for n in batches}
    bounds = [bench.median(f"{model} {ours} batch {FIRST_BATCH}", "vs_bound") for model in models]
    return {
        "end_to_end_vs_bound": least(bounds),
        "vs_plain_loop": least(loops.get(FIRST_BATCH, [])),
        "vs_plain_loop_at_its_best_batch": least(ratio for found in loops.values() for ratio in found),
        "int8_vs_fp32": least(int8),
        **{f"int8_vs_fp32_{model}": ratio for model, ratio in zip(models, int8, strict=True)},
        "first_row_vs_session": bench.ratio("seconds", "first_row", "session"),
        "help_vs_click": bench.ratio("seconds", "help", "import_click"),
    }
