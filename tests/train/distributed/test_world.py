"""Devices, ranks and their share of the machine."""

from __future__ import annotations

import pytest
import torch

from data_pipeline.common.errors import UserError
from train.distributed.world import check_rank_count, choose_device, cpu_share, open_world


def test_more_ranks_than_gpus_is_an_error_with_both_numbers() -> None:
    with pytest.raises(UserError, match=r"4 processes on this machine, but it has 2 GPU\(s\): use --nproc 2"):
        check_rank_count(4, "cuda", num_gpus=2)
    check_rank_count(2, "cuda", num_gpus=2)
    check_rank_count(4, "cpu", num_gpus=0)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="this machine has a GPU; the error is for those without"
)
def test_cuda_without_a_gpu_is_an_error() -> None:
    with pytest.raises(UserError, match="sees no GPU"):
        choose_device("cuda")
    assert choose_device("auto") == "cpu"


def test_float32_is_exact_in_a_run_and_restored_after_it() -> None:
    before = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    with open_world("cpu"):
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"  # type: ignore[attr-defined]
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cudnn.conv.fp32_precision == before  # type: ignore[attr-defined]


def test_rank_gets_its_share_of_the_cores() -> None:
    assert cpu_share(1) >= cpu_share(2) >= cpu_share(10_000) == 1
