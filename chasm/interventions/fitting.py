"""Learn from train images what operations need: statistics, best constants, a linear map."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from chasm.errors import ConfigError
from chasm.interventions.hooks import intervene, record
from chasm.interventions.reference import (
    Covariance,
    LinearMap,
    Moments,
    Reference,
    TokenScatter,
    swap_source,
)
from chasm.interventions.specification import INPUTS, Intervention
from chasm.progress import bar, track

Run = Callable[[Any], Any]
"""Pass one batch through a model, e.g. the model itself or its ``from_streams``."""

PENALTIES = torch.logspace(-4, 4, 33, dtype=torch.float64)
"""Ridge penalties that are tried, relative to the variance of a standardised feature."""


def collect(
    module: nn.Module, batches: Iterable[Any], sites: Collection[str], run: Run | None = None
) -> Reference:
    """Compute the mean and variance of what passes sites of a model, in eval mode.

    Parameters
    ----------
    module
        Model that has the sites.
    batches
        Of train images, each image once; every batch is what `run` takes.
    sites
        Their names.
    run
        Passes a batch through all of these sites; the model itself where None.

    Raises
    ------
    ConfigError
        If the model has no such site, there is no batch, or nothing passes a site.
    """
    run = run or module
    moments = {name: Moments() for name in sites}
    sources = {name: Covariance() for name in sites if name in INPUTS}
    with evaluating(module), torch.no_grad(), record(module, sites) as values:
        for batch in _tracked(batches, "statistics of train images"):
            run(batch)
            for name, value in values.items():
                moments[name].update(value)
                if name in sources:
                    sources[name].update(swap_source(name, value))
            values.clear()
    for name, found in moments.items():
        if not found.n:
            raise ConfigError(
                f"intervention:{name}",
                "no image passed this site",
                "Give batches of train images and run the half of the model that has it.",
            )
    return Reference(
        mean={name: found.mean.float() for name, found in moments.items()},
        variance={name: found.variance.float() for name, found in moments.items()},
        sources={name: TokenScatter(found.mean, found.variance) for name, found in sources.items()},
    )


def fit_optimal(
    module: nn.Module,
    reference: Reference,
    batches: Sequence[Any],
    targets: Sequence[Tensor],
    sites: Collection[str],
    run: Run | None = None,
    steps: int = 50,
) -> dict[str, Tensor]:
    """Find constants that, put in at some sites together, leave the least squared error.

    L-BFGS over all images at once, in units of each element's standard deviation, from the means
    on; the best constants on the way are taken, so they never do worse than the means on these
    images. Elements that do not vary keep their mean. The model is in eval mode and not changed.

    Parameters
    ----------
    module
        Model that has the sites.
    reference
        Statistics of these sites.
    batches
        Of train images; every batch is what `run` takes, e.g. streams computed before (without
        gradients, but not in inference mode).
    targets
        (images, units) for each batch, on the device where the model predicts.
    sites
        Their names, e.g. all sites of one stream.
    run
        Passes a batch through these sites and gives (images, units); the model itself where None.
    steps
        Iterations at most.

    Returns
    -------
    dict
        Site to its constant, for `Reference.optimal`.

    Raises
    ------
    ConfigError
        If the model has no such site, its statistics are missing, nothing passes it, or the
        error is not finite.
    """
    predict = run or module
    put_in = [Intervention(name, "value") for name in sites]
    means, stds = {}, {}
    for name in sites:
        if name not in reference.mean:
            raise ConfigError(f"intervention:{name}", "no statistics", "Collect this site first.")
        means[name] = reference.mean[name].to(targets[0])
        stds[name] = reference.variance[name].sqrt().to(targets[0])
    shifts = {name: torch.zeros_like(mean).requires_grad_() for name, mean in means.items()}
    optimizer = torch.optim.LBFGS(
        list(shifts.values()), max_iter=steps, history_size=10, line_search_fn="strong_wolfe"
    )
    count = sum(target.numel() for target in targets)
    least, best = float("inf"), {name: reference.mean[name] for name in sites}

    def error_and_gradient() -> Tensor:
        nonlocal least, best
        optimizer.zero_grad()
        total = torch.zeros((), device=targets[0].device)
        for batch, target in zip(batches, targets, strict=True):
            constants = {name: (means[name] + stds[name] * shifts[name])[None] for name in sites}
            with intervene(module, put_in, donors=constants):
                error = (predict(batch) - target).square().sum() / count
            slopes = torch.autograd.grad(error, list(shifts.values()), materialize_grads=True)
            for shift, slope in zip(shifts.values(), slopes, strict=True):
                shift.grad = slope if shift.grad is None else shift.grad + slope
            total += error.detach()
        if least == float("inf") and not total.isfinite():
            raise ConfigError(
                f"intervention:{', '.join(sites)}",
                f"the error with the means is {float(total)}",
                "Give finite targets and a model that predicts finite values.",
            )
        if float(total) < least:
            least = float(total)
            best = {name: constants[name][0].detach().to(reference.mean[name]) for name in sites}
        display.advance(task)
        return total

    with bar() as display, evaluating(module), torch.enable_grad():
        task = display.add_task("optimal constants", total=None)
        optimizer.step(error_and_gradient)
    return best


def fit_patches_from_cls(
    batches: Iterable[Mapping[str, Any]], seed: int = 0, n_outputs: int = 512
) -> LinearMap:
    """Ridge regression of all patch tokens on the flattened CLS tokens, for ``residualise``.

    Features are standardised. One penalty serves all outputs: the one of `PENALTIES` with the
    least generalised cross-validation error (Golub et al. 1979), averaged over standardised
    outputs drawn at random. Patches are never held all at once: the memory is that of the map,
    604 MB from 768 features to 256 patches of width 768.

    Parameters
    ----------
    batches
        Of train images, with ``cls`` and ``patches``; gone through twice, in any order.
    seed, n_outputs
        Of the outputs that choose the penalty, and how many.

    Raises
    ------
    ConfigError
        If there is no batch, or the second time gives other images than the first.
    """
    joint, chosen = Covariance(), torch.empty(0, dtype=torch.int64)
    for batch in _tracked(batches, "CLS to patches: penalty"):
        cls, patches = batch["cls"].flatten(1), batch["patches"].flatten(1)
        if not joint.n:
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(patches.shape[1], generator=generator)[:n_outputs]
        joint.update(torch.cat([cls, patches[:, chosen.to(patches.device)]], dim=1))
    if not joint.n:
        raise ConfigError("residualise:batches", "there is none", "Give train images.")
    n_features = len(joint.mean) - len(chosen)
    cls_mean, inverse = joint.mean[:n_features].float(), _ridge_inverse(joint, n_features)
    weights, seen = torch.empty(0), 0
    for batch in _tracked(batches, "CLS to patches: weights"):
        cls, patches = batch["cls"].flatten(1).float(), batch["patches"].flatten(1).float()
        if not seen:
            # Any constant may be taken off, as centred CLS sum to 0; this one keeps digits.
            offset = patches.mean(0)
            weights = torch.zeros(n_features, patches.shape[1], device=patches.device)
            cls_mean, inverse = cls_mean.to(cls), inverse.to(cls)
        weights.addmm_(inverse @ (cls - cls_mean).T, patches - offset)
        seen += len(cls)
    if seen != joint.n:
        raise ConfigError(
            "residualise:batches",
            f"{joint.n} images the first time, {seen} the second",
            "Give a list or a loader that can be gone through twice.",
        )
    return LinearMap(cls_mean, weights)


def _ridge_inverse(joint: Covariance, n_features: int) -> Tensor:
    """Inverse of the penalised scatter of the features, (features, features) float32."""
    covariance = joint.variance
    variance = covariance.diagonal()
    inverse = torch.where(variance > 1e-12 * variance.max(), variance.rsqrt(), 0.0)
    correlation = inverse[:, None] * covariance * inverse
    power, axes = torch.linalg.eigh(correlation[:n_features, :n_features])
    power = power.clamp(min=0)
    shared = (axes.T @ correlation[:n_features, n_features:]).square().sum(1)
    total = correlation.diagonal()[n_features:].sum()
    shrink = 1 / (power + PENALTIES[:, None])
    left = total - (shared * (2 * shrink - power * shrink.square())).sum(1)
    free = 1 - (1 + (power * shrink).sum(1)) / joint.n
    error = torch.where(free > 0, left / free.square(), torch.inf)
    scaled = inverse[:n_features, None] * axes
    return ((scaled * shrink[error.argmin()]) @ scaled.T / joint.n).float()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a model in eval mode; afterwards every part is in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _tracked(batches: Iterable[Any], description: str) -> Iterator[Any]:
    return track(batches, description, len(batches) if isinstance(batches, Sized) else None)
