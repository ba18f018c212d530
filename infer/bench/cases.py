"""The cases of `alexnet bench infer`: a bundle phase by phase, and the loop that people write first."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import cycle, islice
from pathlib import Path
from typing import Literal

import numpy as np

from data_pipeline.common.machine import usable_cores
from data_pipeline.decode.header import read_header
from data_pipeline.decode.pillow import decode_window, finish_crop, parallel_for
from data_pipeline.transforms.crop import eval_crop_params
from infer.predict.decode import run_valid, valid_images
from infer.predict.rows import OkRow, names_of, top_k
from infer.predictor import Predictor
from train.bench.harness import time_calls

PHASES = ("decode", "preprocess", "copy", "model", "post", "end_to_end", "one_batch")
DeviceKind = Literal["cpu", "cuda"]


class BundleCase:
    """An exported model, measured phase by phase and as `alexnet predict` runs it."""

    def __init__(self, stack: ExitStack, bundle: Path, photos: Path, device: DeviceKind) -> None:
        self.bundle, self.device, self.batch = bundle, device, 0
        self.photos = sorted(photos.rglob("*.jpg"))
        self.open = stack.enter_context(ExitStack())

    def runs_on(self) -> dict[str, str]:
        """Return the provider, device and precision that really compute."""
        with Predictor(self.bundle, device=self.device) as predictor:
            backend = predictor.backend
            return {"provider": backend.provider, "device": backend.device, "precision": backend.precision}

    def measure(self, phase: str, batch: int, num_batches: int) -> list[float]:
        """Return seconds for each batch; for all together of `decode` and `end_to_end`, which overlap."""
        if batch != self.batch:  # one predictor at a time, since each holds the model
            self.open.close()
            predictor = Predictor(self.bundle, device=self.device, batch_size=batch)
            self.predictor, self.batch = self.open.enter_context(predictor), batch
            self._predict(batch)  # graphs and threads are made by the first batch
        if phase == "end_to_end":
            return time_calls(lambda: self._predict(batch * num_batches))
        if phase == "decode":
            return time_calls(lambda: self._decode(batch * num_batches))
        return time_calls(self._work(phase, batch), num_batches)

    def _work(self, phase: str, batch: int) -> Callable[[], object]:
        """Return a phase's work for one batch."""
        predictor, manifest = self.predictor, self.predictor.bundle.manifest
        if phase == "one_batch":
            return lambda: self._predict(batch)
        if phase == "preprocess":
            files = [path.read_bytes() for path in self.photos[:batch]]
            contract = manifest.preprocessing
            sizes = np.array([read_header(file, contract.max_pixels) for file in files], np.int64)
            crops = eval_crop_params(sizes, contract)
            windows = [decode_window(file, crops, place) for place, file in enumerate(files)]
            threads = usable_cores()
            pool = ThreadPoolExecutor(threads)

            def finish(place: int) -> None:
                finish_crop(windows[place], crops, place)

            return lambda: parallel_for(finish, batch, pool, threads)
        with closing(predictor.decode(self.photos[:batch])) as batches:
            decoded = next(iter(batches))
        if phase == "copy":
            return lambda: valid_images(decoded)
        if phase == "model":
            return lambda: run_valid(predictor.backend, decoded, batch)
        probabilities, _ = run_valid(predictor.backend, decoded, batch)
        names = names_of(predictor.bundle)
        return lambda: top_k(probabilities, names, 5)

    def _predict(self, count: int) -> None:
        for row in self.predictor(islice(cycle(self.photos), count)):
            assert isinstance(row, OkRow), row

    def _decode(self, count: int) -> None:
        with closing(self.predictor.decode(islice(cycle(self.photos), count))) as batches:
            for batch in batches:
                assert batch.valid.all(), batch.failures


class BaselineCase:
    """The loop that people write first: Pillow, torchvision's transforms, and torch in float32."""

    def __init__(self, stack: ExitStack, checkpoint: Path, photos: Path, device: DeviceKind) -> None:
        import torch
        from torchvision import transforms

        from train.checkpoints.load import load_checkpoint

        self.torch, self.device = torch, device
        self.photos = sorted(photos.rglob("*.jpg"))
        loaded = load_checkpoint(checkpoint)
        contract = loaded.preprocessing
        network = loaded.make_model().float().eval()
        self.network = network.to(memory_format=torch.contiguous_format).to(device)
        steps = [transforms.Resize(contract.resize_px), transforms.CenterCrop(contract.crop_px)]
        steps += [transforms.ToTensor(), transforms.Normalize(contract.mean, contract.std)]
        self.transform = transforms.Compose(steps)

    def runs_on(self) -> dict[str, str]:
        """Return the provider, device and precision that compute."""
        return {"provider": f"torch {self.torch.__version__}", "device": self.device, "precision": "fp32"}

    def measure(self, phase: str, batch: int, num_batches: int) -> list[float]:
        """Return seconds for each of so many batches, from files to the five best classes."""
        from PIL import Image

        torch, photos = self.torch, cycle(self.photos)

        def predict() -> None:
            images = [self.transform(Image.open(path).convert("RGB")) for path in islice(photos, batch)]
            logits = self.network(torch.stack(images).to(self.device))
            torch.softmax(logits, dim=1).topk(5).values.cpu()

        with torch.inference_mode():
            return time_calls(predict, num_batches)
