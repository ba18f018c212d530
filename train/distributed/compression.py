"""Gradients that travel in fewer bytes, by PyTorch's own hooks of DistributedDataParallel.

`bf16` rounds each gradient to bfloat16 on its way: half the bytes. `powersgd` sends, of each layer's
gradient, two thin matrices whose product is near it, and adds what that left out to the next step's.

Source: Vogels et al. 2019, "PowerSGD"; torch.distributed.algorithms.ddp_comm_hooks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

PLAIN_STEPS = 2
"""DDP orders its buckets anew after the first step; what is remembered by bucket can begin only then."""


class PowerSGD:
    """What PowerSGD remembers from step to step on this rank: the errors, and where to look first.

    Args:
        parallel: whose gradients are compressed from here on.
        rank: of the matrices that travel.
        start: as many steps at first send whole gradients.
        seed: the same on all ranks.
    """

    def __init__(self, parallel: DistributedDataParallel, *, rank: int, start: int, seed: int) -> None:
        self.state = powerSGD_hook.PowerSGDState(
            process_group=None,
            matrix_approximation_rank=rank,
            start_powerSGD_iter=max(PLAIN_STEPS, start),
            # a gradient of zeros, as behind dead units, would else be divided by its length
            orthogonalization_epsilon=1e-8,
            random_seed=seed % 2**32,
        )
        self._guesses: dict[int, Tensor] = {}
        parallel.register_comm_hook(self.state, powerSGD_hook.powerSGD_hook)

    @torch.no_grad()
    def end_step(self, skip: Tensor) -> None:
        """Let a skipped step leave no trace but that its errors, and those before it, are forgotten.

        Args:
            skip: (), 1 where the step was skipped; its gradients may be NaN, and so what is remembered.
        """
        skipped = skip.bool()
        for error in self.state.error_dict.values():
            error.masked_fill_(skipped, 0.0)
        for bucket, guess in self.state.q_memory_dict.items():
            before = self._guesses.get(bucket)
            if before is None:  # its first step: any guess will do that is the same on all ranks
                random = torch.Generator().manual_seed(bucket)
                before = torch.randn(guess.shape, generator=random).to(guess)
            guess.copy_(torch.where(skipped, before, guess))
            self._guesses[bucket] = guess.clone()
