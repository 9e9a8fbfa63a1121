"""What is learned from train images: moments, best constants, the map from CLS to patches."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn

from chasm.errors import ConfigError
from chasm.interventions import (
    Intervention,
    Reference,
    collect,
    evaluating,
    fit_optimal,
    fit_patches_from_cls,
    intervene,
    on_stream,
)
from chasm.interventions.fitting import PENALTIES
from chasm.models.sites import Site, sites_of
from chasm.progress import track


def in_batches(whole, size):
    count = len(next(iter(whole.values())))
    rows = torch.arange(count).split(size)
    return [{key: value[part] for key, value in whole.items()} for part in rows]


@pytest.mark.parametrize("size", [1, 7, 40])
def test_moments_are_those_of_all_images_at_once(size, module_of, batch_of):
    model, whole = module_of("stage 1"), batch_of(40)
    sites = ["features.cls", "features.patches", "local.out"]
    found = collect(model, in_batches(whole, size), sites)
    with torch.no_grad():
        values = {"features.cls": whole["cls"], "features.patches": whole["patches"],
                  "local.out": model.streams(whole)["local.out"]}  # fmt: skip
    for site, value in values.items():
        exact = value.double().numpy()
        np.testing.assert_allclose(found.mean[site], exact.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.variance[site], exact.var(0), rtol=1e-4, atol=1e-9)
    assert found.sources.keys() == {"features.cls", "features.patches"}
    for site, vector in {"features.cls": whole["cls"][:, -1],
                         "features.patches": whole["patches"].mean(1)}.items():  # fmt: skip
        np.testing.assert_allclose(
            found.sources[site].covariance,
            np.cov(vector.double().numpy(), rowvar=False, ddof=0), atol=1e-6,
        )  # fmt: skip


def test_moments_keep_their_digits_beside_a_large_mean():
    model = Site("a")
    values = 1e4 + torch.randn(1000, 3, dtype=torch.float64)
    found = collect(model, values.split(10), ["a"])
    np.testing.assert_allclose(found.variance["a"], values.numpy().var(0), rtol=1e-5)


def test_statistics_are_those_of_eval_mode_and_modes_return(module_of, batch_of):
    model = module_of("stage 2").train()
    modes = [part.training for part in model.modules()]
    assert True in modes
    assert False in modes  # the frozen Stage 1
    site = "stage2.patches"  # of the decoder, which adds noise in training
    found = collect(model, [batch_of()], [site]).mean[site]
    assert [part.training for part in model.modules()] == modes
    expected = model.eval().streams(batch_of())[site].mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    model.train()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError
    assert [part.training for part in model.modules()] == modes


def test_a_site_that_no_train_image_passed_is_an_error(module_of, batch_of):
    model = module_of("stage 1")
    with pytest.raises(ConfigError, match=r"intervention:gate: no image passed"):
        collect(model, [batch_of()], ["gate"], model.streams)
    with pytest.raises(ConfigError, match="no image passed"):
        collect(model, [], ["gate"])
    with pytest.raises(ConfigError, match="has no such site"):
        collect(model, [batch_of()], ["nowhere"])


def streams_and_targets(model, batch_of, n=24, size=10):
    with torch.no_grad():
        batches = [model.streams(part) for part in in_batches(batch_of(n), size)]
        shape = model.from_streams(batches[0]).shape[1]
    generator = torch.Generator().manual_seed(1)
    targets = [torch.randn(len(next(iter(part.values()))), shape, generator=generator)
               for part in batches]  # fmt: skip
    return batches, targets


def error_with(model, sites, constants, batches, targets, operation="optimal"):
    reference = Reference(**{operation: constants})
    put_in = [Intervention(site, operation) for site in sites]
    total = 0.0
    for batch, target in zip(batches, targets, strict=True):
        with torch.no_grad(), intervene(model, put_in, reference):
            total += float((model.from_streams(batch) - target).square().sum())
    return total / sum(target.numel() for target in targets)


@pytest.mark.parametrize(
    ("name", "stream"),
    list(
        itertools.product(["stage 1", "spatial", "stage 2", "stage 2 (MLP)"], ["local", "global"])
    ),
)
def test_the_best_constants_do_better_than_the_means(name, stream, module_of, batch_of):
    model = module_of(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches, targets = streams_and_targets(model, batch_of)
    sites = [part.site for part in on_stream(model, stream, "mean")]
    reference = collect(model, batches, sites, model.from_streams)
    args = (model, reference, batches, targets, sites, model.from_streams)
    best = fit_optimal(*args, steps=4)
    means = error_with(model, sites, reference.mean, batches, targets, "mean")
    assert error_with(model, sites, best, batches, targets) < means
    # No step at all: the means.
    kept = fit_optimal(*args, steps=0)
    assert error_with(model, sites, kept, batches, targets) == pytest.approx(means, rel=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not part._forward_hooks for part in model.modules())


def test_the_best_constants_on_the_way_are_taken_not_the_last():
    model, values, target = Line(torch.eye(3)), torch.randn(30, 3), torch.randn(30, 3)
    reference = collect(model, [values], ["a"])
    last_was_worse = False
    for steps in range(1, 9):
        errors = []

        def run(batch, errors=errors):
            found = torch.sin(9 * model(batch)) - model(batch)
            errors.append((found.detach() - target).square().mean().item())
            return found

        best = fit_optimal(model, reference, [values], [target], ["a"], run, steps)["a"]
        found = torch.sin(9 * best) - best
        assert (found - target).square().mean().item() == pytest.approx(min(errors), rel=1e-5)
        last_was_worse |= errors[-1] > min(errors) * 1.0001
    assert last_was_worse


def test_the_best_constant_of_a_linear_model_is_the_mean_of_what_is_left(module_of, batch_of):
    model = module_of("banded ridge")
    batches, targets = streams_and_targets(model, batch_of)
    reference = collect(model, batches, ["linear.cls"], model.from_streams)
    found = fit_optimal(
        model, reference, batches, targets, ["linear.cls"], model.from_streams
    )["linear.cls"]  # fmt: skip
    left = [target - model.path.bias - part["linear.patches"]
            for part, target in zip(batches, targets, strict=True)]  # fmt: skip
    torch.testing.assert_close(found, torch.cat(left).mean(0), rtol=1e-3, atol=1e-3)


class Line(nn.Module):
    """A site that is read by fixed weights; another one that is passed but not read."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights
        self.a, self.unread = Site("a"), Site("unread")

    def forward(self, value):
        self.unread(value)
        return self.a(value) @ self.weights


def test_a_constant_is_right_by_least_squares_and_elements_that_do_not_vary_stay():
    values, weights = torch.randn(50, 3), torch.randn(3, 3)
    values[:, 2] = 1.5
    target = torch.randn(50, 3)
    model = Line(weights)
    reference = collect(model, [values], ["a", "unread"])
    found = fit_optimal(model, reference, [values], [target], ["a", "unread"])
    assert found["a"][2] == 1.5
    exact = np.linalg.lstsq(weights[:2].T.numpy(), (target.mean(0) - 1.5 * weights[2]).numpy())[0]
    np.testing.assert_allclose(found["a"][:2], exact, rtol=1e-3, atol=1e-3)
    assert torch.equal(found["unread"], reference.mean["unread"])


def test_an_error_that_is_no_number_is_refused():
    model, values = Line(torch.eye(3)), torch.randn(9, 3)
    reference = collect(model, [values], ["a"])
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ConfigError, match=f"intervention:a: the error .* {bad}"):
            fit_optimal(model, reference, [values], [torch.full((9, 3), bad)], ["a"])


def test_best_constants_need_statistics_a_passed_site_and_show_inside_a_progress_bar():
    values, target = torch.randn(9, 3), torch.randn(9, 3)
    model = Line(torch.eye(3))
    with pytest.raises(ConfigError, match="intervention:a: no statistics"):
        fit_optimal(model, Reference(), [values], [target], ["a"])
    reference = collect(model, [values], ["a"])
    with pytest.raises(ConfigError, match="nothing passed this site"):
        fit_optimal(model, reference, [values], [target], ["a"], lambda x: model.weights.sum() + x)
    for _ in track([0], "conditions"):
        assert fit_optimal(model, reference, [values], [target], ["a"])


def tokens_with_shared_part(n=60, features=(2, 3), patches=(4, 5), seed=0):
    rng = np.random.default_rng(seed)
    cls = rng.normal(2, np.arange(1, 7), (n, 6))
    shared = cls @ rng.normal(size=(6, 20)) / 4
    other = rng.normal(size=(n, 20)) * 2 - 1
    return {"cls": torch.from_numpy(cls).float().view(n, *features),
            "patches": torch.from_numpy(shared + other).float().view(n, *patches)}  # fmt: skip


def by_hand(whole):
    """Ridge of scikit-learn on standardised features, penalty by GCV from its hat matrix."""
    x, y = (whole[key].flatten(1).double().numpy() for key in ("cls", "patches"))
    n = len(x)
    z = (x - x.mean(0)) / x.std(0)
    standard = (y - y.mean(0)) / y.std(0)
    errors = []
    for penalty in PENALTIES.numpy():
        hat = z @ np.linalg.solve(z.T @ z + n * penalty * np.eye(z.shape[1]), z.T)
        left = np.square(standard - hat @ standard).mean()
        errors.append(left / (1 - (1 + np.trace(hat)) / n) ** 2)
    best = int(np.argmin(errors))
    fitted = Ridge(alpha=n * PENALTIES.numpy()[best]).fit(z, y)
    return best, y - (fitted.predict(z) - y.mean(0))


@pytest.mark.parametrize(("n", "size"), [(60, 60), (60, 7), (12, 5)])
def test_residual_patches_are_those_of_ridge_by_hand(n, size):
    whole = tokens_with_shared_part(n)
    best, expected = by_hand(whole)
    assert 0 < best < len(PENALTIES) - 1
    linear = fit_patches_from_cls(in_batches(whole, size))
    model = Site("features.patches")
    residualise = Intervention("features.patches", "residualise")
    with intervene(model, [residualise], Reference(patches_from_cls=linear), batch=whole):
        found = model(whole["patches"])
    np.testing.assert_allclose(found.flatten(1), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.mean(0), whole["patches"].mean(0), rtol=0, atol=1e-4)


def test_a_few_outputs_choose_nearly_the_same_map():
    whole = tokens_with_shared_part()
    full, few = (fit_patches_from_cls([whole], n_outputs=k) for k in (512, 2))
    ratio = (few.weights - full.weights).norm() / full.weights.norm()
    assert 0 < ratio < 0.2
    again = fit_patches_from_cls([whole], n_outputs=2)
    assert torch.equal(few.weights, again.weights)


def test_the_map_keeps_its_digits_beside_large_means():
    whole = tokens_with_shared_part()
    far = {"cls": whole["cls"], "patches": whole["patches"] + 2.0**12}
    # What float32 keeps of the sum, so that both have the same values.
    near = {"cls": whole["cls"], "patches": far["patches"] - 2.0**12}
    maps = [fit_patches_from_cls(in_batches(part, 7)).weights for part in (near, far)]
    torch.testing.assert_close(*maps, rtol=0, atol=1e-5)


def test_features_that_do_not_vary_get_no_weight():
    whole = tokens_with_shared_part()
    whole["cls"][:, 0, 1] = 3.0
    linear = fit_patches_from_cls([whole])
    assert linear.weights.isfinite().all()
    assert not linear.weights[1].any()


def test_the_map_needs_the_same_images_twice():
    batches = in_batches(tokens_with_shared_part(), 20)
    with pytest.raises(ConfigError, match="there is none"):
        fit_patches_from_cls([])
    with pytest.raises(ConfigError, match="60 images the first time, 0 the second"):
        fit_patches_from_cls(iter(batches))


def test_sites_of_equal_names_are_one(module_of, batch_of):
    model, batch = module_of("stage 2"), batch_of()
    inner = [part for part in model.modules()
             if isinstance(part, Site) and part.name == "features.cls"]  # fmt: skip
    assert len(inner) == 2
    assert sites_of(model)["features.cls"] is model.cls_site
    with torch.no_grad(), intervene(model, [Intervention("features.cls", "zero")]):
        streams = model.streams(batch)
    with torch.no_grad():
        expected = model.stage1.streams(batch | {"cls": torch.zeros_like(batch["cls"])})
    assert torch.equal(streams["global.out"], expected["global.out"])
