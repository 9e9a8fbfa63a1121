"""The gate's shares: from parcels to voxels, over images and areas."""

from dataclasses import replace

import numpy as np
import pytest

from chasm.evaluation import gates
from chasm.evaluation.regions import make_regions


def gate_of(n_images, n_parcels, seed=0):
    share = np.random.default_rng(seed).uniform(0.1, 0.9, (n_images, n_parcels))
    return np.stack([share, 1 - share], axis=2)


@pytest.fixture
def voxel_file(predictions):
    """40 voxels in 6 parcels of 6, four without one."""
    labels = np.repeat(np.arange(7), 6)[:40]
    labels[labels == 6] = -1
    rng = np.random.default_rng(0)
    labels = rng.permutation(labels)
    return predictions(unit="voxel", parcel_labels=labels, gate=gate_of(60, 6))


def test_a_model_without_a_gate_has_no_section(predictions):
    file = predictions()
    assert gates.image_shares(file) is None
    assert gates.unit_shares(file) is None
    assert gates.gate_table(file, make_regions(file.units, {})) is None


def test_one_gate_per_image_is_described_over_images_only(predictions):
    file = predictions(gate=gate_of(60, 1))
    share = file.gate[:, 0, 0]
    np.testing.assert_allclose(gates.image_shares(file), share)
    assert gates.unit_shares(file) is None
    frame = gates.gate_table(file, make_regions(file.units, file.membership))
    assert list(frame["region"]) == ["all"]
    line = frame.iloc[0]
    assert line["mean"] == pytest.approx(share.mean())
    assert line["sd_images"] == pytest.approx(share.std())
    assert (line["low"], line["high"]) == pytest.approx(tuple(np.quantile(share, [0.025, 0.975])))
    assert np.isnan(line["sd_units"])
    assert gates.region_figure(frame) is None
    grid = gates.gate_grid(frame, "parcel")
    assert grid.lines[0].cells[-1] == "–"
    assert "one gate per image" in grid.note


def test_a_voxel_has_the_gate_of_its_parcel(voxel_file):
    shares = gates.unit_shares(voxel_file)
    for voxel, parcel in enumerate(voxel_file.parcel_labels):
        if parcel < 0:
            assert np.isnan(shares[:, voxel]).all()
        else:
            np.testing.assert_array_equal(shares[:, voxel], voxel_file.gate[:, parcel, 0])
    assert np.isnan(shares).all(axis=0).sum() == 4


@pytest.mark.parametrize("unit", ["parcel", "voxel"])
def test_shares_of_areas_agree_with_plain_loops(predictions, voxel_file, unit):
    file = voxel_file if unit == "voxel" else predictions(gate=gate_of(60, 40))
    frame = gates.gate_table(file, make_regions(file.units, file.membership)).set_index("region")
    shares = gates.unit_shares(file)
    higher = file.membership["streams"].counts[:, 4:].sum(axis=1)
    for region, weights in (("all", file.units.size), ("Higher", higher)):
        used = np.repeat(np.arange(40), weights)
        used = used[np.isfinite(shares[0, used])]
        per_image = shares[:, used].mean(axis=1)
        assert frame.loc[region, "mean"] == pytest.approx(per_image.mean())
        assert frame.loc[region, "sd_images"] == pytest.approx(per_image.std())
        assert frame.loc[region, "high"] == pytest.approx(np.quantile(per_image, 0.975))
        per_unit = shares[:, used].mean(axis=0)
        assert frame.loc[region, "sd_units"] == pytest.approx(per_unit.std())


def test_areas_without_a_parcel_are_left_out(voxel_file):
    first = voxel_file.membership["prf-visualrois"].counts[:, 0] > 0
    labels = np.where(first, -1, np.repeat(np.arange(6), 7)[:40])
    file = replace(voxel_file, parcel_labels=labels)
    frame = gates.gate_table(file, make_regions(file.units, file.membership))
    names = set(frame.loc[frame["atlas"] == "prf-visualrois", "region"])
    assert "V1v" not in names
    assert "V1d" in names
    axes = gates.region_figure(frame).axes[0]
    assert "V1v" not in {tick.get_text() for tick in axes.get_yticklabels()}


def test_the_table_shows_groups(voxel_file):
    frame = gates.gate_table(voxel_file, make_regions(voxel_file.units, voxel_file.membership))
    grid = gates.gate_grid(frame, "voxel")
    assert [line.label for line in grid.lines] == ["all", "Early", "Mid", "Higher"]
    assert grid.lines[0].cells[0] == f"{frame['mean'].iloc[0]:.3f}"
    assert grid.columns[-1] == "SD over voxels"
    assert "one gate per image" not in grid.note


def test_a_gate_that_hardly_varies_does_not_look_as_if_it_did():
    axes = gates.image_figure(np.full(20, 0.5) + 1e-4 * np.arange(20)).axes[0]
    low, high = axes.get_xlim()
    assert high - low > 0.1
