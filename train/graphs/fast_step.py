"""The fast step: the plain step's arithmetic on tensors that stay where they are, captured and replayed.

Without DistributedDataParallel: with several ranks, gradients are summed by a collective between two captured
parts, so that its time-out and message are those of the plain step. What changes from step to step is written
to static tensors before; state is updated in place. So what is captured at one step is right for all others
of the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.loading.batches import Batch
from train.config.schema import RunConfig
from train.distributed.world import World
from train.graphs.capture import Capture, Work
from train.health.metrics import AccuracyMeter
from train.inputs.packed import Arrays, StaticArrays, layout_of
from train.inputs.pass_inputs import PassInputs, arrays_of, images_on_device, inputs_of
from train.inputs.values import StepValues, values_of
from train.models.batch_norm import ghost_sums_of
from train.models.dropout import masks_of
from train.models.parts import set_training
from train.optim.sgd import Apply, apply_fused
from train.step import StepParts, count_losses, end_step, start_values, training_inputs

# Shapes: N samples of a micro-batch, H and W rows and columns, C classes.

ForwardFn = Callable[[PassInputs], Tensor]
"""A micro-batch's logits, (N, C), from its images before any augmentation."""

PART = 64
"""Numbers: each gradient begins at a multiple of this in their sum, so that kernels read whole vectors."""


def why_not(config: RunConfig, world: World) -> str | None:
    """Return why a run cannot take the fast step; None if it can."""
    if config.log_noise_scale:
        return "log_noise_scale measures the gradient of each part by hooks"
    if world.world_size == 1:
        return None
    if config.parallel == "hybrid":
        return "parallel=hybrid exchanges activations inside of the passes"
    if config.compress != "none":
        return f"compress={config.compress} rounds gradients where DistributedDataParallel sums them"
    if config.model.has_batch_norm and config.model.norm_batch is None:
        return "norms take their statistics over all ranks inside of the passes"
    return None


def plain_forward(parts: StepParts, inputs: PassInputs) -> Tensor:
    """Compute the logits (N, C) by the network's own layers."""
    inputs_NCHW = training_inputs(inputs, parts.normalize)
    with parts.precision.autocast():
        logits_NC: Tensor = parts.network(inputs_NCHW)
    return logits_NC


class FastStep:
    """One optimiser step, in the place of `train.step.train_step` with these parts.

    One rank with one micro-batch has one captured part; otherwise each pass is one, and what follows the sum
    of the gradients is the last. Each shape of micro-batch is captured by itself.

    Args:
        parts: `why_not` must be None for their configuration and ranks.
        capture: how the work is done again and again.
        forward: None for `plain_forward`.
        apply: how the optimiser changes the weights: as torch does, or by `train.compile.update`.
        before: is called before each step, outside of what is captured, for what the host must look after.
    """

    def __init__(
        self,
        parts: StepParts,
        capture: Capture,
        forward: ForwardFn | None = None,
        apply: Apply = apply_fused,
        before: Callable[[], object] | None = None,
    ) -> None:
        assert why_not(parts.config, parts.world) is None
        self.parts, self.capture = parts, capture
        self.forward = forward or partial(plain_forward, parts)
        self.apply, self.before = apply, before
        device, network = parts.world.device, parts.network
        self._places = places_of(network)
        self._parameters = [module.get_parameter(name) for module, name in self._places]
        self._leaves = [nn.Parameter(parameter.detach()) for parameter in self._parameters]
        self._buffers = list(network.buffers())
        self._buffers_before = [torch.empty_like(buffer) for buffer in self._buffers]
        self._meter = AccuracyMeter(device)
        parts.scaler.scale(torch.ones((), device=device))  # makes its tensors, outside of what is captured
        set_training(network, parts.config.freeze)
        self._ghosts = ghost_sums_of(network)
        self._values: StepValues | None = None
        self._static_values: StaticArrays | None = None
        self._passes: dict[Any, tuple[StaticArrays, PassInputs]] = {}  # by shape
        self._replays: dict[Any, Work] = {}
        self._gradients: dict[Any, Sequence[Tensor]] = {}  # of captured wholes
        self._sum: Tensor | None = None
        self._summed: list[Tensor] = []  # views of the sum, one for each parameter

    def __call__(self, batches: Sequence[Batch], learning_rate: float, step: int) -> AccuracyMeter:
        """Forward, backward and update for one global batch; see `train.step.train_step`."""
        if self.before is not None:
            self.before()
        self._write_values(start_values(self.parts, learning_rate, step))
        if self.parts.world.world_size == 1 and len(batches) == 1:
            key, inputs = self._write_inputs(batches[0])
            self._run(("whole", key), partial(self._whole, key, inputs))
            self._show_gradients(self._gradients[key])
            return self._meter.copied()
        if self._sum is None:
            self._sum, self._summed = make_sum(self._parameters)
        for number, batch in enumerate(batches):
            key, inputs = self._write_inputs(batch)
            kind = "first" if number == 0 else "later"
            self._run((kind, key), partial(self._pass, inputs, is_first=number == 0))
        self._sum_over_ranks(step)
        self._run("end", self._end)
        self._show_gradients(self._summed)
        return self._meter.copied()

    def _run(self, name: Any, work: Work) -> None:
        if name not in self._replays:
            self._replays[name] = self.capture(work)
        self._replays[name]()

    def _write_values(self, arrays: Arrays) -> None:
        if self._static_values is None:
            self._static_values = StaticArrays(arrays, self.parts.world.device)
            self._values = values_of(self._static_values.tensors)
        self._static_values.write(arrays)

    def _write_inputs(self, batch: Batch) -> tuple[Any, PassInputs]:
        """Write a micro-batch to the tensors for its shape; also return what the shape is known by."""
        images_NHWC = images_on_device(batch.images, self.parts.world.device)
        arrays = arrays_of(batch, images_NHWC.shape[1])
        key = (images_NHWC.shape, layout_of(arrays))
        if key not in self._passes:
            static = StaticArrays(arrays, images_NHWC.device)
            self._passes[key] = static, inputs_of(torch.empty_like(images_NHWC), static.tensors)
        static, inputs = self._passes[key]
        inputs.images.copy_(images_NHWC)
        static.write(arrays)
        return key, inputs

    def _show_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Let `.grad` be the gradients of this step, which a step of another kind may have replaced."""
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient

    def _sum_over_ranks(self, step: int) -> None:
        if self.parts.world.world_size == 1:
            return
        assert self._sum is not None
        with self.parts.world.named_collective(f"the sum of gradients of step {step + 1}"):
            dist.all_reduce(self._sum)
            if self._ghosts is not None:
                dist.all_reduce(self._ghosts)

    # What follows is captured.

    def _whole(self, key: Any, inputs: PassInputs) -> None:
        """The one pass of a step on one rank, and its end."""
        self._start()
        gradients = self._gradients[key] = self._differentiate(inputs)
        self._update(gradients, ghost_sums_of(self.parts.network))

    def _pass(self, inputs: PassInputs, *, is_first: bool) -> None:
        """One of several passes, or one of several ranks: gradients are added up in `_sum`."""
        if is_first:
            self._start()
        gradients = self._differentiate(inputs)
        (torch._foreach_copy_ if is_first else torch._foreach_add_)(self._summed, gradients)
        if self._ghosts is not None:
            sums = ghost_sums_of(self.parts.network)
            assert sums is not None
            self._ghosts.copy_(sums)  # of all passes so far

    def _end(self) -> None:
        set_training(self.parts.network, self.parts.config.freeze)
        self._update(self._summed, self._ghosts)

    def _start(self) -> None:
        self._meter.clear()
        if self._buffers:
            torch._foreach_copy_(self._buffers_before, self._buffers)

    def _differentiate(self, inputs: PassInputs) -> list[Tensor]:
        """Run a pass forward and backward; return the gradients, in the memory formats of the parameters."""
        assert self._values is not None
        set_training(self.parts.network, self.parts.config.freeze)
        masks = masks_of(self.parts.network)
        masks.keys_L2, masks.rows_N = self._values.keys, inputs.rows
        with self._leaves_in_place():
            loss = count_losses(self.parts, inputs, self.forward(inputs), self._meter)
        masks.rows_N = None  # those of a pass are nobody else's
        gradients = torch.autograd.grad(loss, self._leaves)
        return [
            grad if grad.stride() == parameter.stride() else torch.empty_like(parameter).copy_(grad)
            for parameter, grad in zip(self._parameters, gradients, strict=True)
        ]

    @contextmanager
    def _leaves_in_place(self) -> Iterator[None]:
        """Let the network compute with other leaves of autograd, whose memory is that of its parameters.

        DistributedDataParallel keeps the parameters' own nodes, which belong to the stream on which it was
        made: a backward pass that ends at them waits for that stream, and no graph can be captured.
        """
        for (module, name), leaf in zip(self._places, self._leaves, strict=True):
            module._parameters[name] = leaf
        try:
            yield
        finally:
            for (module, name), parameter in zip(self._places, self._parameters, strict=True):
                module._parameters[name] = parameter

    def leaves(self) -> dict[Tensor, Tensor]:
        """Return the parameters of the network by what stands for each in a pass."""
        return dict(zip(self._leaves, self._parameters, strict=True))

    def _update(self, gradients: Sequence[Tensor], ghosts: Tensor | None) -> None:
        parts, values = self.parts, self._values
        assert values is not None
        self._show_gradients(gradients)
        parts.scaler.unscale_(parts.optimizer)
        skip = parts.guard.should_skip(gradients, values.step)
        end_step(parts, values, skip, ghosts, self._buffers_before, self._meter, self.apply)


def places_of(network: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the modules and names of the parameters that are trained, in the order of `parameters()`."""
    return [
        (module, name)
        for module in network.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    ]


def make_sum(parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Make one tensor for all parameters' gradients, float32, and its views in their memory formats."""
    sizes = [-(-parameter.numel() // PART) * PART for parameter in parameters]
    whole = torch.zeros(sum(sizes), device=parameters[0].device)
    parts = zip(torch.split(whole, sizes), parameters, strict=True)
    return whole, [part.as_strided(parameter.shape, parameter.stride()) for part, parameter in parts]
