"""What a model costs: parameters, floating-point operations, milliseconds.

Operations are those of torch's `FlopCounterMode` (matrix products and convolutions, a multiply
and an add counting two, element-wise work not counted). Two things it cannot see are put right:
kernels that torch fuses (recurrent layers, attention) run unfused while they are counted, and a
Mamba or Mamba-2 layer has the analytic count of `mamba_flops` or `mamba2_flops`, whichever scan
runs it.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from chasm.data.batches import Batch
from chasm.data.datamodule import DataSizes
from chasm.errors import DataError
from chasm.io import write_json
from chasm.models.mamba import Mamba
from chasm.models.mamba2 import Mamba2
from chasm.training.checkpoints import load_module

BATCH_SIZE = 32
"""Images per timed batch, as in the paper's table of costs."""

MAX_LINEAR_WEIGHTS = 2**28
"""Largest linear map that is timed: a gigabyte of float32."""


@dataclass(frozen=True)
class Cost:
    """What one prediction costs, from tokens to units; the backbone is not part of it.

    Attributes
    ----------
    parameters, trained
        All parameters, and those that training changed.
    flops
        Floating-point operations per image.
    milliseconds
        Median time of one batch, None when it was not measured.
    batch_size
        Images of that batch.
    device
        Where it ran.
    """

    parameters: int
    trained: int
    flops: int
    milliseconds: float | None
    batch_size: int
    device: str


def mamba_flops(layer: Mamba, batch: int, tokens: int) -> int:
    """Operations of a Mamba layer: projections, causal convolution, selective scan, gate.

    With I inner channels, N states, K taps and step-size rank R, every token takes

        2 I (2 d + K + R + 2 N + R + d)  +  I (6 N + 4)

    The second term is the scan: per channel and state a product each for the decay, for the
    drive and for the state, an addition, and a product and an addition for the output; per
    channel the product of step size and input, the skip (two) and the gate. Exponentials and
    other functions count nothing, as in torch's counter.

    Parameters
    ----------
    layer
        The layer.
    batch, tokens
        Sequences and their length.
    """
    inner, states = layer.d_inner, layer.d_state
    products = 3 * layer.d_model + layer.d_conv + 2 * layer.dt_rank + 2 * states
    return batch * tokens * inner * (2 * products + 6 * states + 4)


def mamba2_flops(layer: Mamba2, batch: int, tokens: int) -> int:
    """Operations of a Mamba-2 layer: projections, causal convolution, scan, gate.

    With I inner channels, H heads, N states, K taps and M = 2 N per group for the two maps of the
    state, every token takes

        2 d (3 I + M + H) + 2 K (I + M)  +  I (5 N + 4) + H

    The last two terms are the scan as a recurrence, counted as in `mamba_flops`, with a decay per
    head instead of one per channel and state. The matrix products that compute it chunk by chunk
    take more; norms count nothing.

    Parameters
    ----------
    layer
        The layer.
    batch, tokens
        Sequences and their length.
    """
    inner, states, heads = layer.d_inner, layer.d_state, layer.nheads
    maps = 2 * layer.ngroups * states
    products = layer.d_model * (3 * inner + maps + heads) + layer.d_conv * (inner + maps)
    return batch * tokens * (2 * products + inner * (5 * states + 4) + heads)


def count_flops(model: nn.Module, *inputs: Any) -> int:
    """Operations of one call of a model; see the module for what counts.

    Parameters
    ----------
    model
        In the mode in which it is to be counted.
    inputs
        Arguments of its forward.
    """
    counter = FlopCounterMode(display=False)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_unfused())
        corrected = stack.enter_context(_analytic_mamba(model, counter))
        stack.enter_context(counter)
        model(*inputs)
    return counter.get_total_flops() + sum(corrected)


@contextmanager
def _unfused() -> Iterator[None]:
    """Let recurrent layers and attention run as the matrix products that they are."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            warnings.catch_warnings(action="ignore", category=UserWarning),  # on TF32, not used
            torch.backends.mkldnn.flags(enabled=False),
            torch.backends.cudnn.flags(enabled=False),
            sdpa_kernel(SDPBackend.MATH),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _analytic_mamba(model: nn.Module, counter: FlopCounterMode) -> Iterator[list[int]]:
    """Collect, for every call of such a layer, its analytic count minus what was counted."""
    corrections: list[int] = []
    before: list[int] = []

    def enter(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        before.append(counter.get_total_flops())

    def leave(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, Mamba | Mamba2)
        batch, tokens, _ = inputs[0].shape
        counted = counter.get_total_flops() - before.pop()
        if isinstance(layer, Mamba):
            corrections.append(mamba_flops(layer, batch, tokens) - counted)
        else:
            corrections.append(mamba2_flops(layer, batch, tokens) - counted)

    handles = []
    for layer in model.modules():
        if isinstance(layer, Mamba | Mamba2):
            handles.append(layer.register_forward_pre_hook(enter))
            handles.append(layer.register_forward_hook(leave))
    try:
        yield corrections
    finally:
        for handle in handles:
            handle.remove()


def median_milliseconds(
    call: Callable[[], Any], device: torch.device, repeats: int = 9, warmup: int = 3
) -> float:
    """Median time of `repeats` calls after `warmup` calls, the device waited for each time."""

    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1000 * (time.perf_counter() - start)

    for _ in range(warmup):
        once()
    return float(np.median([once() for _ in range(repeats)]))


def device_name(device: torch.device) -> str:
    """Name a device so that a time can be compared: the GPU, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def random_batch(sizes: DataSizes, images: int, device: torch.device) -> Batch:
    """Make a batch of random tokens; its betas are 0."""
    generator = torch.Generator().manual_seed(0)
    cls = torch.randn(images, sizes.n_cls, sizes.cls_width, generator=generator)
    patches = torch.randn(images, sizes.n_patches, sizes.patch_width, generator=generator)
    return Batch(
        cls=cls.to(device),
        patches=patches.to(device),
        betas=torch.zeros(images, sizes.n_voxels, device=device),
        image_id=torch.arange(images, device=device),
        trial=torch.arange(images, device=device),
    )


@torch.no_grad()
def measure(model: nn.Module, sizes: DataSizes, batch_size: int = BATCH_SIZE) -> Cost:
    """Measure a model that maps a `Batch` to its units, on the device that it is on.

    Parameters
    ----------
    model
        Anything whose forward takes a batch; it is put into evaluation mode.
    sizes
        Of the tokens.
    batch_size
        Images per timed batch.
    """
    parameters = list(model.parameters())
    device = parameters[0].device
    model.eval()
    batch = random_batch(sizes, batch_size, device)
    return Cost(
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
        count_flops(model, random_batch(sizes, 1, device)),
        median_milliseconds(lambda: model(batch), device),
        batch_size,
        device_name(device),
    )


@torch.no_grad()
def linear_cost(
    n_parameters: int, n_units: int, device: torch.device, batch_size: int = BATCH_SIZE
) -> Cost:
    """Cost of a linear row in its primal form, one weight per feature and unit plus intercepts.

    Parameters
    ----------
    n_parameters
        Weights and intercepts.
    n_units
        Outputs.
    device
        Where to measure; above `MAX_LINEAR_WEIGHTS` weights the time is None.
    batch_size
        Images per timed batch.
    """
    n_features = n_parameters // n_units - 1
    weights = n_features * n_units
    milliseconds = None
    if weights <= MAX_LINEAR_WEIGHTS:
        layer = nn.Linear(n_features, n_units, device=device)
        features = torch.zeros(batch_size, n_features, device=device)
        milliseconds = median_milliseconds(lambda: layer(features), device)
    return Cost(
        n_parameters, n_parameters, 2 * weights, milliseconds, batch_size, device_name(device)
    )


def cost_of_run(run: Path, *, fresh: bool = False) -> Cost:
    """Measure a finished run's model once, into its ``cost.json``.

    It is measured again on another device, with another number of threads, when `fresh`, or
    where that file is damaged.

    Raises
    ------
    DataError
        If the run has no readable checkpoint.
    """
    path = run / "cost.json"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = None if fresh else _known_cost(path)
    if known is not None and (known.device, known.batch_size) == (device_name(device), BATCH_SIZE):
        return known
    module = load_module(run / "checkpoints" / "best.ckpt")
    assert module.sizes is not None
    cost = measure(module.to(device), module.sizes)
    write_json(path, asdict(cost))
    return cost


def _known_cost(path: Path) -> Cost | None:
    try:
        return read_cost(path)
    except DataError:
        return None


def read_cost(path: Path) -> Cost:
    """Read what `cost_of_run` wrote.

    Raises
    ------
    DataError
        If the file is missing or is something else.
    """
    try:
        return Cost(**json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            path, f"is not a model's cost ({error})", "Delete it; it is measured again."
        ) from error
