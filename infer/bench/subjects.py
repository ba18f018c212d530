"""What `infer.bench.predict` measures, each in a process of its own that works when it is told to.

`ours`: the phases of a bundle, and all of prediction as `alexnet predict` runs it. `plain`: what people write
first, Pillow, torchvision's transforms and the network in torch, in float32. The command line of this file is
for these processes only.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.common.machine import usable_cores
from data_pipeline.decode.pillow import decode_rgb, finish_crop, parallel_for
from data_pipeline.loading.prefetch import Batch
from data_pipeline.transforms.crop import eval_crop_params
from infer.predict.decode import valid_images
from infer.predict.rows import OkRow, top_k
from infer.predictor import Predictor
from train.bench.turns import answer_lines

PHASES = ("decode", "preprocess", "copy", "model", "post", "end_to_end", "one_batch")


class Ours:
    """A bundle; `measure` does one phase.

    Args:
        bundle: its folder.
        photos: files to predict, over and over.
        device: where the model runs.
    """

    def __init__(self, bundle: Path, photos: list[Path], device: Any) -> None:
        self._bundle, self._photos, self._device = bundle, photos, device
        self._open = ExitStack()
        self._predictor: tuple[int, Predictor] | None = None

    def measure(self, phase: str, batch: int, num_batches: int) -> list[float]:
        """Seconds for each of so many batches; all together of `decode` and `end_to_end`, which overlap."""
        predictor = self._with_batch(batch)
        if phase == "end_to_end":
            return [self._seconds(lambda: self._all_ok(predictor, batch * num_batches))]
        if phase == "one_batch":
            return [self._seconds(lambda: self._all_ok(predictor, batch)) for _ in range(num_batches)]
        if phase == "decode":
            with closing(predictor.decode(islice(cycle(self._photos), batch * num_batches))) as batches:
                return [self._seconds(lambda: deque(map(self._check, batches)))]
        return [self._seconds(work) for work in islice(self._works(predictor, phase, batch), num_batches)]

    def _with_batch(self, batch: int) -> Predictor:
        """One at a time, since each holds the model; its graphs and threads are there from now on."""
        if self._predictor is None or self._predictor[0] != batch:
            self._open.close()
            made = Predictor(self._bundle, device=self._device, batch_size=batch)
            self._predictor = batch, self._open.enter_context(made)
            self._all_ok(made, batch)
        return self._predictor[1]

    def about(self) -> dict[str, str]:
        """Who really computes."""
        with Predictor(self._bundle, device=self._device) as predictor:
            backend = predictor.backend
            return {"provider": backend.provider, "device": backend.device, "precision": backend.precision}

    def _works(self, predictor: Predictor, phase: str, batch: int) -> Iterator[Callable[[], object]]:
        """One batch's work of a phase, again and again."""
        manifest = predictor.bundle.manifest
        with closing(predictor.decode(self._photos[:batch])) as batches:
            decoded = next(iter(batches))
            images = valid_images(decoded)
        probabilities = predictor.backend.run(images)
        works: dict[str, Callable[[], object]] = {
            "copy": lambda: valid_images(decoded),
            "model": lambda: predictor.backend.run(images),
            "post": lambda: top_k(probabilities, manifest.class_labels, 5),
        }
        if phase == "preprocess":
            windows = [decode_rgb(path.read_bytes()) for path in self._photos[:batch]]
            sizes = np.array([(image.height, image.width) for image in windows], np.int64)
            geometry = eval_crop_params(sizes, manifest.preprocessing)
            cuts = [
                image.crop((int(left), int(top), int(left + width), int(top + height)))
                for image, (top, left, height, width) in zip(windows, geometry.windows, strict=True)
            ]
            threads = usable_cores()
            pool = ThreadPoolExecutor(threads)

            def resize(place: int) -> None:
                finish_crop(cuts[place], geometry, place)

            works[phase] = lambda: parallel_for(resize, batch, pool, threads)
        while True:
            yield works[phase]

    def _all_ok(self, predictor: Predictor, count: int) -> None:
        for row in predictor(islice(cycle(self._photos), count)):
            assert isinstance(row, OkRow), row

    @staticmethod
    def _check(batch: Batch) -> None:
        assert batch.valid.all(), batch.failures

    @staticmethod
    def _seconds(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started


class Plain:
    """The loop that people write first.

    Args:
        checkpoint: a step's folder.
        photos: files to predict, over and over.
    """

    def __init__(self, checkpoint: Path, photos: list[Path], device: str) -> None:
        import torch
        from torchvision import transforms

        from train.checkpoints.load import load_checkpoint

        loaded = load_checkpoint(checkpoint)
        contract = loaded.preprocessing
        self._torch, self._photos, self._device = torch, photos, device
        network = loaded.make_model().float().eval()
        self._network = network.to(memory_format=torch.contiguous_format).to(device)
        self._transform = transforms.Compose(
            [
                transforms.Resize(contract.resize_px),
                transforms.CenterCrop(contract.crop_px),
                transforms.ToTensor(),
                transforms.Normalize(contract.mean, contract.std),
            ]
        )

    def measure(self, phase: str, batch: int, num_batches: int) -> list[float]:
        """Seconds for each of so many batches, from files to the five best classes."""
        from PIL import Image

        torch, photos, times = self._torch, cycle(self._photos), []
        with torch.inference_mode():
            for _ in range(num_batches):
                started = time.perf_counter()
                images = [self._transform(Image.open(path).convert("RGB")) for path in islice(photos, batch)]
                logits = self._network(torch.stack(images).to(self._device))
                torch.softmax(logits, dim=1).topk(5).values.cpu()
                times.append(time.perf_counter() - started)
        return times

    def about(self) -> dict[str, str]:
        """Who computes."""
        return {"provider": f"torch {self._torch.__version__}", "device": self._device, "precision": "fp32"}


def serve(kind: str, folder: Path, photos: Path, device: str) -> None:
    """Answer each line: `about`, or a phase, a batch size and a number of batches."""
    files = sorted(photos.rglob("*.jpg"))
    subject: Ours | Plain = (Ours if kind == "ours" else Plain)(folder, files, device)

    def answer(words: list[str]) -> object:
        if words == ["about"]:
            return subject.about()
        return subject.measure(words[0], int(words[1]), int(words[2]))

    answer_lines(lambda: answer)


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
