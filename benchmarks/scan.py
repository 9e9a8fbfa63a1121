"""Time and memory of the selective scan's back ends, side by side in one run.

    python benchmarks/scan.py                        # every size and back end that this CPU has
    python benchmarks/scan.py --sizes stage1 --threads 4

Each measurement runs forward and backward in a fresh process, back ends taking turns. Memory is
the peak of the process during one forward and backward above what the inputs occupied before it
(outputs and gradients included). "reference" is the published formula: a loop over time with every
state materialised. The largest relative error of any gradient against float64 is in the note.
"""

from __future__ import annotations

import math
from functools import partial
from statistics import median

import torch
from measure import Row, apart_in_turns, extra_memory, finish, options, say, times
from torch import Tensor

from chasm.models.scan import BACKENDS, resolve_backend, selective_scan

LEAST_SECONDS, MOST_REPEATS = 2.0, 30
"""Time that the repeats of a measurement take together at least, if they are not too many."""

Size = tuple[int, int, int, int]
SIZES: dict[str, Size] = {
    "demo": (32, 64, 256, 16),
    "one": (1, 256, 1024, 16),
    "stage1": (32, 256, 1024, 16),
    "stage2": (8, 525, 768, 16),
}
"""Batch, time, channels, states; "stage1" is the paper's local stream, "one" a single image."""
QUICK: dict[str, Size] = {"stage1": (2, 9, 12, 4)}


def make_inputs(size: Size, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Make the arguments of a scan as a Mamba layer gives them, with gradients asked for."""
    batch, n_steps, channels, states = size
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    inputs = {
        "u": normal(batch, n_steps, channels).mT,
        "delta": normal(batch, n_steps, channels).mT,
        "A": -torch.arange(1.0, states + 1).repeat(channels, 1),
        "B": normal(batch, n_steps, states).mT,
        "C": normal(batch, n_steps, states).mT,
        "D": normal(channels),
        "z": normal(batch, n_steps, channels).mT,
        "delta_bias": normal(channels) - 4,
    }
    return {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}


def forward_backward(
    inputs: dict[str, Tensor], backend: str, gradient: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Scan and go back from a gradient of the output; None: of the sum of the outputs."""
    y = selective_scan(**inputs, delta_softplus=True, backend=backend)
    gradient = torch.ones_like(y) if gradient is None else gradient
    return torch.autograd.grad(y, list(inputs.values()), gradient)


def largest_error(backend: str, size: Size) -> float:
    """Give the largest relative error of a float32 gradient, of a few channels of this length."""
    few = (2, size[1], min(24, size[2]), size[3])
    exact = forward_backward(make_inputs(few, torch.float64), "reference")
    found = forward_backward(make_inputs(few), backend)
    return max(
        float((ours - true).norm() / true.norm()) for ours, true in zip(found, exact, strict=True)
    )


def measure(backend: str, size: Size, repeats: int) -> dict[str, float | None]:
    """Measure one back end in this process."""
    # Few steps of every channel start the threads, without memory that the real run could reuse.
    forward_backward(make_inputs((size[0], 4, *size[2:])), backend)
    inputs = make_inputs(size)
    step = partial(forward_backward, inputs, backend, torch.ones_like(inputs["u"]))
    memory = extra_memory(step)
    (first,) = times(step, 1)
    enough = min(MOST_REPEATS, math.ceil(LEAST_SECONDS / first))
    seconds = median(times(step, max(repeats, enough), warm=0))
    return {"seconds": seconds, "memory_mb": memory, "error": largest_error(backend, size)}


def work(size: Size) -> tuple[float, float]:
    """Count bytes and operations of a scan and its gradients at the least.

    Reads u, delta, z, B, C and the gradient of y, writes y and the gradients of the five. Per
    channel and state: forward a product for the exponent, its exponential (counted as one), three
    products and three sums; backward that again and ten more.
    """
    batch, n_steps, channels, states = size
    sequences, maps = batch * n_steps * channels, batch * n_steps * states
    return 4.0 * (8 * sequences + 6 * maps), float(26 * sequences * states)


def main() -> None:
    """Run the benchmark and show the table."""
    parser = options(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=2, help="turns each back end takes")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    sizes = QUICK if given.quick else {name: SIZES[name] for name in given.sizes}
    if given.worker:
        (size,) = sizes.values()
        say(measure(given.worker, size, given.repeats))
        return
    cpu = torch.device("cpu")
    backends = ["reference", *(n for n in BACKENDS if n != "reference" and _runs(n, cpu))]
    rows: list[Row] = []
    for name, size in sizes.items():
        common = ["--sizes", name, "--repeats", given.repeats, "--threads", given.threads]
        common += ["--quick"] * given.quick
        ways = {backend: ["--worker", backend, *common] for backend in backends}
        n_bytes, flops = work(size)
        for way, found in apart_in_turns(__file__, ways, given.rounds).items():
            rows.append(
                Row(
                    "scan",
                    f"{name}: {' x '.join(map(str, size))}",
                    way,
                    float(found["seconds"] or 0),
                    found["memory_mb"],
                    None if way == "reference" else "reference",
                    n_bytes,
                    flops,
                    f"gradients within {found['error']:.0e}",
                )
            )
    finish(rows, given)


def _runs(backend: str, device: torch.device) -> bool:
    return BACKENDS[backend].available(device) and resolve_backend(device, backend) == backend


if __name__ == "__main__":
    main()
