"""Images that another library lends are kept until the device has copied them, and no longer."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from train.inputs.borrowed import Lender


class LateEvent:
    """An event of a device that is behind, until `reached` says otherwise."""

    reached = False

    def record(self) -> None: ...

    def query(self) -> bool:
        return self.reached


def test_lent_memory_is_kept_until_its_copy_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    lender = Lender(LateEvent)
    lent = torch.arange(6)
    alive = weakref.ref(lent)
    copy = lender.take_over(lent)
    assert copy.tolist() == list(range(6)) and copy.data_ptr() != lent.data_ptr()
    del lent
    lender.take_over(torch.zeros(1))
    gc.collect()
    assert alive() is not None
    monkeypatch.setattr(LateEvent, "reached", True)
    lender.take_over(torch.zeros(1))
    gc.collect()
    assert alive() is None


@pytest.mark.gpu
def test_copy_is_whole_although_the_lender_overwrites_at_once() -> None:
    lender = Lender()
    busy = torch.randn(8192, 8192, device="cuda")
    for _ in range(10):
        busy = busy @ busy / 8192  # the copy waits behind this
    lent = torch.full((1 << 20,), 7, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    busy = busy @ busy
    copy = lender.take_over(lent)
    del lent
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        for _ in range(4):
            torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
    assert bool((copy == 7).all())
