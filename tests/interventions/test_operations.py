"""What each operation puts in place of a tensor, against NumPy or by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from chasm.errors import ConfigError
from chasm.interventions import Intervention, Reference, collect, derangements
from chasm.interventions.operations import Given, replacement
from chasm.interventions.reference import LinearMap
from chasm.models.sites import Site


class Inputs(nn.Module):
    """Nothing but the two input sites."""

    def __init__(self):
        super().__init__()
        self.cls, self.patches = Site("features.cls"), Site("features.patches")

    def forward(self, batch):
        return self.cls(batch["cls"]), self.patches(batch["patches"])


def wide_batch(n, widths=(5, 5), first=0):
    """Images with correlated channels of different scale; n_cls 2, 6 patches."""
    rng = np.random.default_rng([7, first])
    mix = [np.random.default_rng(i).normal(size=(w, w)) for i, w in enumerate(widths)]
    cls, patches = (
        torch.from_numpy(rng.normal(1, 1, (n, k, w)) @ m).float()
        for k, w, m in zip((2, 6), widths, mix, strict=True)
    )
    return {"cls": cls, "patches": patches, "image_id": torch.arange(first, first + n)}


def reference_of(batch):
    return collect(Inputs(), [batch], ["features.cls", "features.patches"])


def replaced(batch, site, operation, reference=None, **options):
    key = site.removeprefix("features.")
    given = Given(reference or Reference(), batch)
    return replacement(batch[key], Intervention(site, operation, **options), given)


def test_mean_and_zero():
    batch = wide_batch(9)
    reference = reference_of(wide_batch(40, first=100))
    made = replaced(batch, "features.cls", "mean", reference)
    expected = wide_batch(40, first=100)["cls"].double().mean(0).float()
    torch.testing.assert_close(made, expected.expand(9, 2, 5))
    assert not replaced(batch, "features.cls", "zero").any()


def test_tokens_limit_an_operation_to_positions():
    batch = wide_batch(4)
    made = replaced(batch, "features.cls", "zero", tokens=(1,))
    assert torch.equal(made[:, 0], batch["cls"][:, 0])
    assert not made[:, 1].any()
    assert batch["cls"].all()  # what came in is as it was
    with pytest.raises(ConfigError, match=r"features\.cls\.tokens.*\[2\].*\(4, 2, 5\)"):
        replaced(batch, "features.cls", "zero", tokens=(2,))


def test_noise_has_the_moments_of_the_train_images():
    reference = reference_of(wide_batch(50))
    n = 4000
    batch = wide_batch(n)
    made = replaced(batch, "features.cls", "noise", reference).double().numpy()
    mean, variance = reference.mean["features.cls"], reference.variance["features.cls"]
    z = (made.mean(0) - mean.numpy()) / (variance.numpy() / n) ** 0.5
    assert np.abs(z).max() < 4
    z = (made.var(0) / variance.numpy() - 1) / (2 / n) ** 0.5
    assert np.abs(z).max() < 4
    flat = np.corrcoef(made.reshape(n, -1).T) - np.eye(10)
    assert np.abs(flat).max() < 4.5 / n**0.5
    power = np.square(made).sum((1, 2)).mean()
    train = wide_batch(50)["cls"].square().sum((1, 2)).mean()
    assert power == pytest.approx(float(train), rel=0.02)


def test_noise_depends_on_seed_site_and_image():
    batch = wide_batch(3)
    reference = reference_of(wide_batch(50))
    first = replaced(batch, "features.cls", "noise", reference)
    assert not torch.equal(first, replaced(batch, "features.cls", "noise", reference, seed=1))
    assert not torch.equal(first[0], first[1])
    reference.mean["other"] = reference.mean["features.cls"]
    reference.variance["other"] = reference.variance["features.cls"]
    elsewhere = replacement(batch["cls"], Intervention("other", "noise"), Given(reference, batch))
    assert not torch.equal(first, elsewhere)


def test_positions_are_permuted_in_each_image_by_itself():
    batch = wide_batch(40)
    made = replaced(batch, "features.patches", "shuffle_space")
    orders = []
    for before, after in zip(batch["patches"], made, strict=True):
        order = (after[:, None] == before[None]).all(-1).int().argmax(1)
        assert sorted(order.tolist()) == list(range(6))
        assert torch.equal(before[order], after)
        orders.append(tuple(order.tolist()))
    assert len(set(orders)) > 30
    pooled = {"cls": batch["cls"][:, 0], "image_id": batch["image_id"]}
    with pytest.raises(ConfigError, match="no positions"):
        replaced(pooled, "features.cls", "shuffle_space")


def test_routes_of_equal_widths_are_swapped_as_they_are():
    batch = wide_batch(4)
    to_global = replaced(batch, "features.cls", "route_swap")
    expected = batch["patches"].mean(1, keepdim=True).expand(4, 2, 5)
    torch.testing.assert_close(to_global, expected)
    to_local = replaced(batch, "features.patches", "route_swap")
    torch.testing.assert_close(to_local, batch["cls"][:, 1:].expand(4, 6, 5))


@pytest.mark.parametrize(
    ("site", "widths"), [("features.cls", (7, 3)), ("features.patches", (3, 7))]
)
def test_routes_of_unequal_widths_are_projected_to_the_moments_of_the_place(site, widths):
    train = wide_batch(400, widths)
    reference = reference_of(train)
    made = replaced(train, site, "route_swap", reference)
    own = train[site.removeprefix("features.")]
    torch.testing.assert_close(made.mean(0), own.mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        made.var(0, correction=0), own.var(0, correction=0), rtol=2e-3, atol=0
    )
    # It is a linear function of the other kind of token, and the same at all positions.
    source = train["patches"].mean(1) if site == "features.cls" else train["cls"][:, -1]
    design = np.column_stack([np.ones(400), source.numpy()])
    left = np.linalg.lstsq(design, made.flatten(1).numpy(), rcond=None)[1]
    assert left.max() < 1e-6 * made.var(0).min() * 400
    z = (made - made.mean(0)) / made.std(0)
    torch.testing.assert_close(z, z[:, :1].expand_as(z), rtol=0, atol=1e-3)
    again = replaced(train, site, "route_swap", reference)
    assert torch.equal(made, again)
    assert not torch.allclose(made, replaced(train, site, "route_swap", reference, seed=1))


def test_a_channel_that_never_varies_does_no_harm_to_a_projection():
    train = wide_batch(60, (7, 3))
    train["patches"][..., 1] = 2.0
    made = replaced(train, "features.cls", "route_swap", reference_of(train))
    assert made.isfinite().all()
    torch.testing.assert_close(made.std(0), train["cls"].std(0), rtol=1e-3, atol=0)


def test_patches_lose_what_the_map_predicts():
    batch = wide_batch(4)
    weights = torch.randn(10, 30)
    linear = LinearMap(torch.randn(10), weights)
    made = replaced(batch, "features.patches", "residualise", Reference(patches_from_cls=linear))
    predicted = (batch["cls"].reshape(4, 10) - linear.cls_mean) @ weights
    torch.testing.assert_close(made, batch["patches"] - predicted.reshape(4, 6, 5))


@pytest.mark.parametrize(
    ("site", "operation"),
    [
        ("features.cls", "mean"),
        ("features.cls", "noise"),
        ("features.cls", "route_swap"),
        ("features.patches", "route_swap"),
        ("features.patches", "shuffle_space"),
        ("features.patches", "residualise"),
    ],
)
def test_the_batch_an_image_is_in_changes_nothing(site, operation):
    train = wide_batch(30, (7, 3))
    reference = reference_of(train)
    reference.patches_from_cls = LinearMap(torch.randn(14), torch.randn(14, 18))
    whole = replaced(train, site, operation, reference)
    order = torch.randperm(30)
    for rows in (*order.split(7), torch.tensor([3])):
        part = {name: value[rows] for name, value in train.items()}
        made = replaced(part, site, operation, reference)
        torch.testing.assert_close(made, whole[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["clean", "donors"])
def test_given_values_are_put_in_one_for_all_or_one_each(name):
    operation = {"clean": "clean", "donors": "resample"}[name]
    value, other = torch.zeros(3, 4, dtype=torch.float64), torch.arange(12.0).view(3, 4)
    made = replacement(value, Intervention("a", operation), Given(**{name: {"a": other}}))
    assert made.dtype == value.dtype
    assert torch.equal(made, other.double())
    made = replacement(value, Intervention("a", operation), Given(**{name: {"a": other[:1]}}))
    assert torch.equal(made, other[:1].double().expand(3, 4))
    with pytest.raises(ConfigError, match=r"intervention:a: .*\(2, 4\).*\(3, 4\)"):
        replacement(value, Intervention("a", operation), Given(**{name: {"a": other[:2]}}))


@pytest.mark.parametrize(
    ("site", "operation", "missing"),
    [
        ("a", "mean", "no statistics of train images"),
        ("a", "noise", "no statistics of train images"),
        ("a", "optimal", "no optimal constant"),
        ("a", "clean", "no clean value"),
        ("a", "resample", "no values to put in"),
        ("a", "value", "no values to put in"),
        ("features.patches", "shuffle_space", "no batch with 'image_id'"),
        ("features.patches", "route_swap", "no batch with 'cls'"),
        ("features.patches", "residualise", "no linear map"),
    ],
)
def test_what_an_operation_lacks_is_named(site, operation, missing):
    with pytest.raises(ConfigError, match=f"{site}.*{missing}"):
        replacement(torch.zeros(2, 3, 4), Intervention(site, operation), Given())


def test_a_projection_without_moments_is_named():
    batch = wide_batch(3, (7, 3))
    with pytest.raises(ConfigError, match=r"no moments of features\.patches"):
        replaced(batch, "features.cls", "route_swap")


@pytest.mark.parametrize("operation", ["noise", "shuffle_space"])
def test_ids_of_another_batch_are_refused(operation):
    batch = wide_batch(4)
    reference = reference_of(batch)
    for n in (1, 3):
        other = batch | {"image_id": torch.arange(n)}
        with pytest.raises(ConfigError, match=f"{n} image_id, 4 images"):
            replaced(other, "features.patches", operation, reference)


def test_no_image_is_its_own_donor_and_all_serve_equally():
    donors = derangements(12, 5, seed=1)
    assert donors.shape == (5, 12)
    assert not (donors == torch.arange(12)).any()
    for row in donors:
        assert sorted(row.tolist()) == list(range(12))
    for column in donors.T:
        assert len(set(column.tolist())) == 5
    assert torch.equal(donors, derangements(12, 5, seed=1))
    assert not torch.equal(donors, derangements(12, 5, seed=2))
    assert not (derangements(4, 3) == torch.arange(4)).any()


@pytest.mark.parametrize(("images", "donors"), [(1, 1), (5, 5), (5, 0), (0, 1)])
def test_donors_need_more_images(images, donors):
    with pytest.raises(ConfigError, match=f"{donors} for each of {images} images"):
        derangements(images, donors)
