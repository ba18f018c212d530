"""Evaluation of an exported model: the checkpoint's scores, and a count of the unreadable images."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.common.errors import UserError
from data_pipeline.datasets.image_folder import load_image_folder
from infer.bundle.load import Bundle
from infer.evaluate import evaluate_bundle
from infer.export.gate import torch_runner
from infer.predict.decode import open_decoder, valid_images
from infer.runtime.onnx import OnnxBackend
from tests.helpers.infer_samples import checkpoint_folder, data_folder
from train.checkpoints.load import load_checkpoint
from train.evaluate import evaluate_checkpoint

pytestmark = pytest.mark.usefixtures("thin")


@pytest.fixture(scope="session")
def backend(bundle: Bundle) -> OnnxBackend:
    return OnnxBackend(bundle, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [7, 8])
def test_bundle_scores_as_the_checkpoint(
    base: Path, bundle: Bundle, backend: OnnxBackend, batch_size: int
) -> None:
    checkpoint = load_checkpoint(checkpoint_folder(base))
    dataset = load_image_folder(data_folder(base), "val")
    run, num_top1, num_top5, losses = torch_runner(checkpoint), 0, 0, []
    from data_pipeline.loader import Loader

    with open_decoder(checkpoint.preprocessing, 8) as decoder:
        for batch in Loader(decoder, checkpoint.preprocessing).eval(dataset, micro_batch=8):
            probabilities = torch.from_numpy(run(valid_images(batch)).probabilities)
            hits = probabilities.topk(5).indices == torch.from_numpy(batch.labels)[:, None]
            num_top1, num_top5 = num_top1 + int(hits[:, 0].sum()), num_top5 + int(hits.sum())
            losses += (-probabilities[range(len(batch)), batch.labels].double().log()).tolist()
    found, counts, report = evaluate_bundle(bundle, backend, dataset, batch_size=batch_size)
    judged, by_torch, same = evaluate_checkpoint(checkpoint, dataset, device="cpu")
    assert (found.top1, found.top5) == (judged.top1, judged.top5)
    assert (counts.confusion == by_torch.confusion).all() and (counts.top5 == by_torch.top5).all()
    assert report.classes == same.classes and report.confusions == same.confusions
    assert [m.path for m in report.mistakes] == [m.path for m in same.mistakes] and report.mistakes
    assert (found.num_samples, found.num_failed) == (50, 0)
    assert (found.top1, found.top5) == (num_top1 / 50, num_top5 / 50)
    assert 0 < found.top5 < 1
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-4)


def test_evaluation_counts_what_it_could_not_read(
    base: Path, tmp_path: Path, bundle: Bundle, backend: OnnxBackend
) -> None:
    shutil.copytree(data_folder(base), tmp_path / "data")
    whole, *_ = evaluate_bundle(bundle, backend, load_image_folder(tmp_path / "data", "val"))
    victim = sorted((tmp_path / "data" / "val" / "4").iterdir())[0]
    victim.write_bytes(b"no image")
    with_fault, *_ = evaluate_bundle(bundle, backend, load_image_folder(tmp_path / "data", "val"))
    assert (with_fault.num_samples, with_fault.num_failed) == (49, 1)
    lost = round(whole.top5 * 50) - round(with_fault.top5 * 49)
    assert lost in (0, 1) and with_fault.top5 * 49 == pytest.approx(round(with_fault.top5 * 49))
    for path in (tmp_path / "data" / "val").glob("*/*"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"none of the 50 images in .* could be read"):
        evaluate_bundle(bundle, backend, load_image_folder(tmp_path / "data", "val"))
    shutil.rmtree(tmp_path / "data" / "val" / "9")
    with pytest.raises(UserError, match=r"other classes than the model \(9 and 10\)"):
        evaluate_bundle(bundle, backend, load_image_folder(tmp_path / "data", "val"))
