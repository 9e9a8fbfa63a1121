"""Parcellations against naive loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chasm.errors import ConfigError, DataError
from chasm.parcellation import (
    Parcellation,
    atlas_bounded,
    make_parcellation,
    sequential,
    spatial,
    top_counts,
)


def naive_top_p(values, labels, p):
    """Loop over images and parcels, sorting in NumPy."""
    out = np.empty((len(values), labels.max() + 1))
    for i, row in enumerate(values):
        for k in range(labels.max() + 1):
            member = row[labels == k]
            count = max(1, math.floor(p * len(member) + 1e-9))
            out[i, k] = np.sort(member)[::-1][:count].mean()
    return out


@st.composite
def unequal_labels(draw):
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
    none = draw(st.integers(0, 5))
    labels = np.concatenate([np.full(s, k) for k, s in enumerate(sizes)] + [np.full(none, -1)])
    order = np.random.default_rng(draw(st.integers(0, 99))).permutation(len(labels))
    return labels[order]


@settings(max_examples=60, deadline=None)
@given(unequal_labels(), st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.99, 1.0]), st.integers(0, 10**6))
def test_aggregate_equals_loop(labels, p, seed):
    values = np.random.default_rng(seed).normal(size=(3, len(labels)))
    parcels = Parcellation(labels)
    top = parcels.aggregate(torch.tensor(values), "top_p", p)
    np.testing.assert_allclose(top.numpy(), naive_top_p(values, labels, p), rtol=1e-12)
    mean = np.stack([values[:, labels == k].mean(1) for k in range(labels.max() + 1)], 1)
    np.testing.assert_allclose(parcels.aggregate(torch.tensor(values)).numpy(), mean, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(unequal_labels())
def test_expand_inverts_aggregate_of_constant_parcels(labels):
    parcels = Parcellation(labels)
    values = torch.arange(parcels.n_parcels, dtype=torch.float64).expand(2, -1)
    voxels = parcels.expand(values, fill=-7.0)
    assert voxels.shape == (2, len(labels))
    np.testing.assert_array_equal(voxels[0].numpy(), np.where(labels >= 0, labels, -7))
    assert torch.equal(parcels.aggregate(voxels), values)
    assert torch.equal(parcels.aggregate(voxels, "top_p", 0.7), values)


def test_top_counts_of_the_paper():
    assert top_counts(torch.tensor([30, 10, 1, 100]), 0.7).tolist() == [21, 7, 1, 70]


def test_sequential_leaves_the_remainder_out():
    parcels = sequential(15724, 30)
    assert (parcels.n_parcels, parcels.n_voxels) == (524, 15724)
    assert parcels.sizes.unique().tolist() == [30]
    assert parcels.labels[[0, 29, 30, 15719]].tolist() == [0, 0, 1, 523]
    assert (parcels.labels[15720:] == -1).all()


def ball(radius=9):
    grid = np.stack(np.meshgrid(*[np.arange(-radius, radius + 1)] * 3, indexing="ij"), -1)
    points = grid.reshape(-1, 3)
    return points[np.linalg.norm(points, axis=1) <= radius]


def test_spatial_parcels_are_compact_and_of_similar_size():
    points = ball()
    parcels = spatial(points, 30)
    assert parcels.n_parcels == round(len(points) / 30)
    assert (parcels.labels >= 0).all()
    assert parcels.sizes.min() >= 30 / 2.2
    assert parcels.sizes.max() <= 30 * 2.2
    centres = parcels.aggregate(torch.tensor(points.T, dtype=torch.float64)).T
    spread = (torch.tensor(points) - centres[parcels.labels]).norm(dim=1).mean()
    runs = sequential(len(points), 30)
    centres = runs.aggregate(torch.tensor(points.T, dtype=torch.float64)).T
    inside = runs.labels >= 0
    run_spread = (torch.tensor(points)[inside] - centres[runs.labels[inside]]).norm(dim=1).mean()
    assert spread < 2.2  # a ball of 30 voxels has a mean radius of 1.4
    assert spread < 0.7 * run_spread
    assert spatial(points, 30).fingerprint() == parcels.fingerprint() != runs.fingerprint()


def test_atlas_parcels_never_cross_a_border():
    points = ball(6)
    regions = np.where(points[:, 0] > 2, 7, np.where(points[:, 1] > 0, 0, -1))
    parcels = atlas_bounded(regions, points, 20)
    assert (parcels.labels >= 0).all()
    weights = parcels.roi_weights(regions, {7: "V7"})[:, 0]
    assert set((weights / parcels.sizes).tolist()) == {0.0, 1.0}
    small = np.where(np.arange(len(points)) < 3, 5, 7)
    assert atlas_bounded(small, points, 20).sizes[0] == 3


def test_roi_weights_count_voxels():
    parcels = Parcellation([0, 0, 1, -1, 1, 1])
    counts = parcels.roi_weights([2, 1, 2, 2, -1, 2], {2: "V2", 1: "V1", 5: "absent"})
    assert counts.tolist() == [[1, 1, 0], [2, 0, 0]]
    assert parcels.roi_weights([0] * 6, {}).shape == (2, 0)


def test_nan_reaches_only_its_parcel():
    parcels = Parcellation([0, 0, 1, 1, -1])
    values = torch.tensor([[1.0, math.nan, 3.0, 5.0, math.nan]])
    for how in ("mean", "top_p"):
        assert parcels.aggregate(values, how, 1.0).isnan().tolist() == [[True, False]]


def test_gradient_goes_to_the_top_voxels():
    parcels = Parcellation([0, 0, 0, 1, 1])
    values = torch.tensor([[3.0, 1.0, 2.0, 5.0, 4.0]], requires_grad=True)
    parcels.aggregate(values, "top_p", 0.7).sum().backward()
    assert values.grad.tolist() == [[0.5, 0.0, 0.5, 1.0, 0.0]]


def test_state_dict_replaces_the_assignment():
    source, target = Parcellation([0, 0, 1, 1]), Parcellation([0, 1, 2, -1])
    target.load_state_dict(source.state_dict())
    assert list(source.state_dict()) == ["labels"]
    assert target.n_parcels == 2
    values = torch.tensor([1.0, 3.0, 5.0, 7.0])
    assert target.aggregate(values).tolist() == [2.0, 6.0]
    assert target.fingerprint() == source.fingerprint()


@pytest.mark.parametrize("labels", [[0, 2], [-1, -1], [0, -2], [0.0, 1.0], [[0, 1]], []])
def test_bad_labels(labels):
    with pytest.raises(DataError, match="labels"):
        Parcellation(labels)


def test_bad_arguments():
    parcels = Parcellation([0, 0, 1])
    with pytest.raises(DataError, match="length 4, expected 3 voxels"):
        parcels.aggregate(torch.zeros(1, 4))
    with pytest.raises(DataError, match="length 3, expected 2 parcels"):
        parcels.expand(torch.zeros(1, 3))
    with pytest.raises(ConfigError, match="top_p"):
        parcels.aggregate(torch.zeros(1, 3), "median")
    with pytest.raises(ConfigError, match="0 < p <= 1"):
        parcels.aggregate(torch.zeros(1, 3), "top_p", 0.0)
    with pytest.raises(ConfigError, match="found 4, expected 1 to 3"):
        sequential(3, 4)
    with pytest.raises(ConfigError, match="needs voxel coordinates"):
        make_parcellation("spatial", 3, 1)
    with pytest.raises(ConfigError, match="atlas"):
        make_parcellation("atlas", 8, 2, coordinates=ball(1)[:1].repeat(8, 0))
    with pytest.raises(ConfigError, match='Use "sequential", "spatial" or "atlas"'):
        make_parcellation("random", 3, 1)
    with pytest.raises(DataError, match="same place"):
        make_parcellation("spatial", 3, 1, coordinates=np.full((3, 3), -1))
    with pytest.raises(DataError, match="1 voxels have no finite"):
        spatial([[0, 0, 0], [0, 0, math.nan]], 1)


def test_make_parcellation_builds_each_kind():
    points = ball(4)
    regions = (points[:, 0] > 0).astype(int)
    n = len(points)
    assert make_parcellation("sequential", n, 10).fingerprint() == sequential(n, 10).fingerprint()
    made = make_parcellation("spatial", n, 10, points)
    assert made.fingerprint() == spatial(points, 10).fingerprint()
    made = make_parcellation("atlas", n, 10, points, regions)
    assert made.fingerprint() == atlas_bounded(regions, points, 10).fingerprint()
