"""The cases of `alexnet bench infer`: a bundle by phases, the loop that people write first, and a process."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from timeit import repeat
from typing import Any

import numpy as np

from data_pipeline.common.machine import usable_cores
from data_pipeline.decode.header import read_header
from data_pipeline.decode.pillow import decode_window, finish_crop, parallel_for
from data_pipeline.loading.batches import Batch
from data_pipeline.transforms.crop import eval_crop_params
from infer.predict.decode import run_valid, valid_images
from infer.predict.rows import OkRow, names_of, top_k
from infer.predictor import Predictor
from infer.runtime.choose import DeviceName


class BundleCase:
    """An exported model, measured phase by phase and as `alexnet predict` runs it."""

    def __init__(self, stack: ExitStack, bundle: Path, photos: Path, device: DeviceName, batch: int) -> None:
        self.photos, self.batch = sorted(photos.rglob("*.jpg")), batch
        self.predictor = stack.enter_context(Predictor(bundle, device=device, batch_size=batch))
        self._predict(batch)  # graphs and threads are made by the first batch

    def facts(self) -> dict[str, Any]:
        """Return what really computes, and what the gate found of the ONNX file that runs there."""
        backend, gate = self.predictor.backend, self.predictor.bundle.manifest.report
        assert gate is not None
        found = (gate.cpu if backend.device == "cpu" else None) or gate.onnx
        ran = {name: getattr(backend, name) for name in ("provider", "device", "precision")}
        return {**ran, "accuracy": found.accuracy, "top1_agreement": found.top1_agreement}

    def measure(self, num_images: int) -> dict[str, float]:
        """Return images/s of each phase, milliseconds of a batch, and `end_to_end` as a part of its bound."""
        count = max(2, num_images // self.batch)
        speeds, latencies = dict[str, float](), dict[str, float]()
        for phase, calls, work in self._phases(count):
            middle_s, high_s = np.percentile(repeat(work, number=1, repeat=calls), [50, 99]).tolist()
            if phase in ("model", "files_to_rows"):
                latencies |= {f"{phase}_ms": 1e3 * middle_s, f"{phase}_p99_ms": 1e3 * high_s}
            if phase != "files_to_rows":
                speeds[phase] = self.batch * count / calls / middle_s
        parts_s = 1 / speeds["decode"], 1 / speeds["model"]
        # On a CPU they share the cores: no arrangement of the two is faster than one after the other.
        bound_s = sum(parts_s) if self.predictor.backend.device == "cpu" else max(parts_s)
        return {**speeds, "vs_bound": speeds["end_to_end"] * bound_s, **latencies}

    def _phases(self, count: int) -> Iterator[tuple[str, int, Callable[[], object]]]:
        """Yield each phase, its calls, and the work of a call: a batch, or all where batches overlap."""
        yield "decode", 1, partial(self._decode, count * self.batch)
        files = [path.read_bytes() for path in islice(cycle(self.photos), self.batch)]
        contract, threads = self.predictor.bundle.manifest.preprocessing, usable_cores()
        sizes = np.array([read_header(file, contract.max_pixels) for file in files], np.int64)
        crops = eval_crop_params(sizes, contract)
        windows = [decode_window(file, crops, place) for place, file in enumerate(files)]

        def finish(place: int) -> None:
            finish_crop(windows[place], crops, place)

        with ThreadPoolExecutor(threads) as pool:
            yield "preprocess", count, partial(parallel_for, finish, self.batch, pool, threads)
        decoded = self._decode(self.batch)
        run = partial(run_valid, self.predictor.backend, decoded, self.batch)
        yield "copy", count, partial(valid_images, decoded)
        yield "model", count, run
        yield "post", count, partial(top_k, run().probabilities, names_of(self.predictor.bundle), 5)
        yield "end_to_end", 1, partial(self._predict, count * self.batch)
        yield "files_to_rows", count, partial(self._predict, self.batch)

    def _decode(self, count: int) -> Batch:
        """Decode so many photographs, and return the last batch."""
        with closing(self.predictor.decode(islice(cycle(self.photos), count))) as batches:
            for batch in batches:
                assert batch.valid.all(), batch.failures
        return batch

    def _predict(self, count: int) -> None:
        for row in self.predictor(islice(cycle(self.photos), count)):
            assert isinstance(row, OkRow), row


class BaselineCase:
    """The loop that people write first: Pillow, torchvision's transforms, and torch in float32."""

    def __init__(self, stack: ExitStack, checkpoint: Path, photos: Path, device: str, batch: int) -> None:
        import torch
        from PIL import Image
        from torchvision import transforms as t

        from train.checkpoints.load import load_checkpoint

        loaded, paths = load_checkpoint(checkpoint), cycle(sorted(photos.rglob("*.jpg")))
        network = loaded.make_model().float().eval().to(memory_format=torch.contiguous_format).to(device)
        contract = loaded.preprocessing
        crop = [t.Resize(contract.resize_px), t.CenterCrop(contract.crop_px)]
        transform = t.Compose([*crop, t.ToTensor(), t.Normalize(contract.mean, contract.std)])

        @torch.inference_mode()
        def predict() -> None:
            images = [transform(Image.open(path).convert("RGB")) for path in islice(paths, batch)]
            torch.softmax(network(torch.stack(images).to(device)), dim=1).topk(5).values.cpu()

        predict()  # torch's threads are made by the first batch
        self._predict, self._batch = predict, batch
        self._facts = {"provider": f"torch {torch.__version__}", "device": device, "precision": "fp32"}

    def facts(self) -> dict[str, str]:
        """Return what computes."""
        return self._facts

    def measure(self, num_images: int) -> dict[str, float]:
        """Return images/s from files to the five best classes, by a quarter of so many images."""
        seconds = repeat(self._predict, number=1, repeat=max(2, num_images // 4 // self._batch))
        return {"end_to_end": self._batch * len(seconds) / sum(seconds)}


class ProcessCase:
    """A process of Python, timed to its end; `alexnet predict` to its first row."""

    def __init__(self, stack: ExitStack, *arguments: str) -> None:
        self.command, self.first_row = [sys.executable, *arguments], "predict" in arguments

    def measure(self) -> dict[str, float]:
        """Return the seconds."""
        started = time.perf_counter()
        with Popen(self.command, stdout=PIPE, stderr=DEVNULL) as process:
            assert process.stdout is not None
            printed = process.stdout.readline() if self.first_row else process.stdout.read()
            seconds = time.perf_counter() - started
            process.communicate()
        assert process.returncode == 0 and (not self.first_row or printed.startswith(b'{"path"')), printed
        return {"seconds": seconds}
