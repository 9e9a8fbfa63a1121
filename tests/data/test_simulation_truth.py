"""What the simulation plants is what an independent computation finds again."""

import dataclasses
import json

import h5py
import numpy as np
import pytest

from chasm.data.simulation import SimulationConfig, load_truth, simulate
from chasm.data.simulation.atlases import AREAS
from chasm.data.simulation.config import FIELD_OF_VIEW_DEG
from chasm.data.simulation.cortex import AREA_NAMES, SmoothFields, make_cortex
from chasm.data.simulation.design import make_design
from chasm.data.simulation.objects import CATEGORIES
from chasm.data.simulation.responses import (
    contrast_energy,
    gist_features,
    make_signal,
    make_tuning,
)
from chasm.data.simulation.stimuli import PREFERRED_CELL, draw_latents, render
from chasm.errors import ConfigError

# Few voxels and pixels, but as many trials as the demo: estimates are tight.
CONFIG = SimulationConfig.toy(sessions=(10, 10), grids=((14, 16, 12),) * 2,
                              trials_per_session=300, n_shared=300)  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return simulate(CONFIG, tmp_path_factory.mktemp("simulated") / "nsd", [1])


@pytest.fixture(scope="module")
def truth(tree):
    return load_truth(tree, 1)


@pytest.fixture(scope="module")
def scored(tree, truth):
    """Session-z-scored betas of the nsdgeneral voxels, (trials, voxels), by plain NumPy."""
    folder = tree / f"nsddata_betas/ppdata/subj01/func1pt8mm/{CONFIG.beta_version}"
    sessions = []
    for path in sorted(folder.glob("betas_session*.hdf5")):
        with h5py.File(path) as file:
            raw = file["betas"][()].transpose(0, 3, 2, 1)[:, truth.i, truth.j, truth.k] / 300
        sessions.append((raw - raw.mean(axis=0)) / raw.std(axis=0, ddof=1))
    return np.concatenate(sessions)


@pytest.fixture(scope="module")
def trials_of():
    """Trials of each 10k id, (images, 3)."""
    order = make_design(CONFIG).masterordering
    return np.array([np.flatnonzero(order == image) for image in range(1, CONFIG.n_images + 1)])


def test_recomputed_ncsnr_agrees_with_the_truth_in_the_median(scored, truth, trials_of):
    noise = scored[trials_of].var(axis=1, ddof=1).mean(axis=0)
    found = np.sqrt(np.maximum(0, 1 - noise) / noise)
    assert abs(np.median(found / truth.ncsnr_true) - 1) < 0.05
    early = truth.ncsnr_true > np.median(truth.ncsnr_true)
    assert np.corrcoef(found[early], truth.ncsnr_true[early])[0, 1] > 0.8


def test_ideal_observer_explains_the_explainable_variance(scored, truth, trials_of):
    n = CONFIG.n_shared
    target = scored[trials_of[:n]].mean(axis=1)
    reference = scored[trials_of[n:]].reshape(-1, scored.shape[1]).mean(axis=0)

    def explained(images):
        error = ((target[images] - truth.ideal[images]) ** 2).sum(axis=0)
        total = ((target[images] - reference) ** 2).sum(axis=0)
        return (1 - error / total).sum() / truth.NC3.sum()

    rng = np.random.default_rng(0)
    draws = [explained(rng.integers(n, size=n)) for _ in range(200)]
    low, high = np.percentile(draws, [2.5, 97.5])
    assert low < 1 < high
    assert high - low < 0.4
    assert explained(rng.permutation(n)) == pytest.approx(1, abs=0.12)


def test_ideal_image_ids_are_the_shared_images_in_order(truth):
    assert np.array_equal(truth.ideal_image_id, make_design(CONFIG).sharedix - 1)


def test_median_ceiling_of_each_area_is_the_published_one():
    config = SimulationConfig()
    cortex = make_cortex(config, 1)
    q = make_tuning(config, 1, cortex).q
    area = cortex.area[cortex.visual]
    published = {"V1v": 0.37, "V1d": 0.37, "V2v": 0.31, "V2d": 0.31, "hV4": 0.26}
    for name, expected in published.items():
        here = q[area == AREA_NAMES.index(name)]
        assert np.median(here / (here + 1 / 3)) == pytest.approx(expected, abs=0.01)
    higher = np.isin(area, [n for n, a in enumerate(AREAS.values()) if a.stream == "ventral"])
    assert 0.10 <= np.median(q[higher] / (q[higher] + 1 / 3)) <= 0.15
    assert 1500 <= len(q) <= 2500


@pytest.fixture(scope="module")
def drives():
    """Gist, tuning and signal of 200 toy images, with the drives kept."""
    config = dataclasses.replace(CONFIG, local_share_jitter=0.1)
    latents = draw_latents(config, np.arange(200))
    energy = contrast_energy(render(config, latents, row, row) for row in range(200))
    gist = gist_features(latents)
    tuning = make_tuning(config, 1, make_cortex(config, 1))
    return energy, gist, tuning


@pytest.mark.parametrize("interaction", [0.0, 0.3])
def test_signal_holds_exactly_the_planted_shares(drives, interaction):
    energy, gist, tuning = drives
    signal = make_signal(energy, gist, tuning, interaction, keep_drives=True)
    s, local, global_ = (
        array.astype(np.float64) for array in (signal.values, signal.local, signal.global_)
    )
    for array in (s, local, global_):
        assert np.allclose(array.mean(axis=0), 0, atol=1e-5)
        assert np.allclose(array.var(axis=0), 1, atol=1e-4)
    additive = 1 - interaction
    assert np.allclose((s * local).mean(axis=0) ** 2, additive * tuning.w, atol=1e-4)
    assert np.allclose((s * global_).mean(axis=0) ** 2, additive * (1 - tuning.w), atol=1e-4)
    assert np.abs((local * global_).mean(axis=0)).max() < 1e-5
    # No linear read-out of the gist explains the local drive.
    design = np.column_stack([np.ones(len(gist)), gist])
    fitted = design @ np.linalg.lstsq(design, local, rcond=None)[0]
    assert np.abs(fitted).max() < 1e-4


def test_coalition_values_are_the_r2_of_the_drives(drives):
    """A noise-free check of the claim in the truth file: R² over NC of a part is its share."""
    energy, gist, tuning = drives
    signal = make_signal(energy, gist, tuning, 0.0, keep_drives=True)
    q, w = tuning.q, tuning.w
    rng = np.random.default_rng(0)
    response = np.sqrt(q / (1 + q)) * signal.values
    noise = rng.standard_normal((40, *response.shape)) * np.sqrt(1 / (3 * (1 + q)))
    part = np.sqrt(q / (1 + q)) * np.sqrt(w) * signal.local
    error = ((response + noise - part) ** 2).sum(axis=(0, 1))
    total = ((response + noise) ** 2).sum(axis=(0, 1))
    ceiling = q / (q + 1 / 3)
    expected = (w * ceiling).sum() / ceiling.sum()
    assert (1 - error / total).sum() / ceiling.sum() == pytest.approx(expected, abs=0.01)


def test_truth_summary_agrees_with_its_arrays(truth):
    here = np.isin(truth.area, [truth.area_names.index(name) for name in ("FFA-1",)])
    roi = truth.rois["floc-faces"]["FFA-1"]
    assert roi["voxels"] == here.sum() > 0
    weights = truth.NC3[here] / truth.NC3[here].sum()
    assert roi["coalitions"]["none"] == 0
    assert roi["coalitions"]["both"] == 1
    assert roi["coalitions"]["local"] == pytest.approx((weights * truth.w[here]).sum())
    assert roi["coalitions"]["global"] == pytest.approx((weights * (1 - truth.w[here])).sum())
    early, higher = truth.rois["groups"]["Early"], truth.rois["groups"]["Higher"]
    assert early["local_share"] == pytest.approx(0.9, abs=0.03)
    assert higher["local_share"] == pytest.approx(0.2, abs=0.03)
    assert truth.rois["floc-faces"]["aTL-faces"] == {"voxels": 0}


def test_noise_has_unit_variance_and_exponential_correlation():
    fields = SmoothFields((12, 14, 10), 4.0).draw(np.random.default_rng(0), 6000)
    assert np.allclose(fields.var(axis=0), 1, atol=0.12)
    centre = fields[:, 5, 6, 5]
    for lag in (1, 2, 3):
        found = np.mean(centre * fields[:, 5 + lag, 6, 5])
        assert found == pytest.approx(np.exp(-1.8 * lag / 4), abs=0.05)
    # The draws are independent of each other: first half real parts, second imaginary.
    assert abs(np.mean(fields[:3000] * fields[3000:])) < 0.01


def test_residual_noise_has_the_planted_global_part(scored, truth, trials_of):
    """Distant voxels share only the global part of the noise: ten percent."""
    residual = scored[trials_of] - scored[trials_of].mean(axis=1, keepdims=True)
    residual = residual.reshape(-1, scored.shape[1])
    residual /= residual.std(axis=0)
    correlation = residual.T @ residual / len(residual)
    place = np.stack([truth.i, truth.j, truth.k], axis=1) * 1.8
    distance = np.linalg.norm(place[:, None] - place[None], axis=2)
    # On the toy's periodic grid no pair is far apart along every way round: allow for it.
    far = distance > 12
    assert correlation[far].mean() == pytest.approx(0.1 + 0.9 * np.exp(-12 / 4), abs=0.06)
    near = distance == 1.8
    assert correlation[near].mean() == pytest.approx(0.1 + 0.9 * np.exp(-1.8 / 4), abs=0.06)


def test_session_gain_and_offset_vary_by_voxel(tree, truth):
    folder = tree / f"nsddata_betas/ppdata/subj01/func1pt8mm/{CONFIG.beta_version}"
    means, spreads = [], []
    for path in sorted(folder.glob("betas_session*.hdf5")):
        with h5py.File(path) as file:
            raw = file["betas"][()].transpose(0, 3, 2, 1)[:, truth.i, truth.j, truth.k] / 300
        means.append(raw.mean(axis=0))
        spreads.append(np.log(raw.std(axis=0)))
    assert np.std(means, axis=0, ddof=1).mean() == pytest.approx(0.3, abs=0.06)
    assert np.std(spreads, axis=0, ddof=1).mean() == pytest.approx(0.15, abs=0.03)


def grating(contour_deg, cycles_per_degree=1.2, size=96):
    """Image whose bright bars run at an angle counterclockwise from horizontal."""
    right, down = np.meshgrid(np.arange(size), np.arange(size))
    x, y = (right * FIELD_OF_VIEW_DEG / size, -down * FIELD_OF_VIEW_DEG / size)
    across = np.deg2rad(contour_deg + 90)
    wave = np.cos(2 * np.pi * cycles_per_degree * (x * np.cos(across) + y * np.sin(across)))
    return np.repeat((127 + 100 * wave)[..., None], 3, axis=2).astype(np.uint8)


@pytest.mark.parametrize(("frequency", "row"), [(0.6, 0), (1.2, 1), (2.4, 2)])
@pytest.mark.parametrize(("contour", "column"), [(0, 0), (45, 1), (90, 2), (135, 3)])
def test_energy_channels_prefer_their_grating(frequency, row, contour, column):
    energy = contrast_energy([grating(contour, frequency)])[0].mean(axis=(1, 2)).reshape(3, 4)
    assert np.unravel_index(energy.argmax(), energy.shape) == (row, column)


def test_local_drive_follows_the_quadrant_of_its_receptive_field():
    config = SimulationConfig()
    tuning = make_tuning(config, 1, make_cortex(config, 1))
    small = (tuning.sigma < 0.8) & (np.abs(tuning.x) > 0.8) & (np.abs(tuning.y) > 0.8)
    tuning = dataclasses.replace(
        tuning, **{field: values[small] for field, values in vars(tuning).items()}
    )
    rng = np.random.default_rng(0)
    shown = rng.random((100, 2, 2)) < 0.5  # images, (lower, upper), (left, right)
    contrast = np.repeat(np.repeat(shown[:, ::-1], 32, axis=1), 32, axis=2)[..., None]
    noise = rng.integers(-100, 100, (100, 64, 64, 1))
    images = np.repeat(120 + contrast * noise, 3, axis=3).astype(np.uint8)
    gist = rng.standard_normal((100, 14))
    local = make_signal(contrast_energy(images), gist, tuning, 0.0, keep_drives=True).local
    n_voxels = local.shape[1]
    assert n_voxels > 50
    both = np.corrcoef(local.T, shown.reshape(100, 4).T)
    response = both[:n_voxels, n_voxels:].reshape(-1, 2, 2)
    own = response[np.arange(n_voxels), (tuning.y > 0).astype(int), (tuning.x > 0).astype(int)]
    assert (own == response.max(axis=(1, 2))).mean() > 0.98
    assert np.median(own) > 0.6


def test_retinotopy_is_contralateral_and_by_quadrant():
    cortex = make_cortex(SimulationConfig(), 1)
    tuning = make_tuning(SimulationConfig(), 1, cortex)
    right = cortex.right[cortex.visual]
    area = np.array(AREA_NAMES)[cortex.area[cortex.visual]]
    assert (tuning.x[right] <= 1e-9).all()
    assert (tuning.x[~right] >= -1e-9).all()
    for name in ("V1", "V2", "V3"):
        assert (tuning.y[area == name + "v"] >= -1e-9).all()
        assert (tuning.y[area == name + "d"] <= 1e-9).all()
    sizes = [tuning.sigma[area == name].mean() for name in ("V1v", "V2v", "V3v", "hV4", "PPA")]
    assert sizes == sorted(sizes)


def test_objects_are_painted_where_the_latents_say():
    config = SimulationConfig.toy()
    latents = draw_latents(config, np.arange(40))
    empty = dataclasses.replace(latents, category=np.full_like(latents.category, -1))
    seen = 0
    for row in range(40):
        if latents.category[row, 1] >= 0:
            continue
        changed = (
            render(config, latents, row, row) != render(config, empty, row, row)
        ).any(axis=2)  # fmt: skip
        rows, columns = np.nonzero(changed)
        x = (columns.mean() + 0.5) / 48 * FIELD_OF_VIEW_DEG - FIELD_OF_VIEW_DEG / 2
        y = FIELD_OF_VIEW_DEG / 2 - (rows.mean() + 0.5) / 48 * FIELD_OF_VIEW_DEG
        reach = latents.size[row, 0] / 2
        assert abs(x - latents.x[row, 0]) < 0.6 * reach
        assert abs(y - latents.y[row, 0]) < 0.6 * reach
        seen += 1
    assert seen > 5


@pytest.mark.parametrize(("dial", "low", "high"), [(0.0, 0.05, 0.17), (1.0, 0.85, 1.0)])
def test_dial_ties_category_to_position(dial, low, high):
    config = SimulationConfig.toy(category_position=dial)
    latents = draw_latents(config, np.arange(400))
    first = latents.category[:, 0].astype(int)
    cell = np.rint(np.stack([latents.x[:, 0], latents.y[:, 0]], axis=1) / 2.2)
    preferred = np.array([PREFERRED_CELL[name] for name in CATEGORIES])[first]
    assert low <= (cell == preferred).all(axis=1).mean() <= high


def test_full_config_is_nsd():
    full = SimulationConfig.full()
    assert (full.n_stimuli, full.n_images, full.n_trials) == (73000, 10000, 30000)
    assert full.special_sessions == 30
    design = make_design(full)
    assert design.stimpattern.shape == (40, 12, 75)
    assert np.array_equal(design.stimpattern.sum(axis=2)[0], [63, 62] * 6)
    special = np.bincount(design.masterordering[: 30 * 750], minlength=10001)[1:1001] == 3
    assert 450 < special.sum() < 600  # NSD: 515


def test_demo_has_enough_images_for_validation_and_test():
    demo = SimulationConfig()
    seen = np.bincount(
        make_design(demo).masterordering[: demo.special_sessions * 300],
        minlength=demo.n_images + 1,
    )[1 : demo.n_shared + 1]
    assert (seen == 3).sum() >= 200
    assert (seen < 3).sum() >= 100


@pytest.mark.parametrize("config", [SimulationConfig(), SimulationConfig.toy(seed=3, n_shared=20)])
def test_config_survives_json(config):
    assert SimulationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 8),
        ("sessions", (4, 0, 3)),
        ("trials_per_session", 61),
        ("n_shared", 80),
        ("grids", ((14, 16, 12),)),
        ("local_share", (0.9, 1.2, 0.1)),
        ("interaction", 1.0),
        ("category_position", -0.1),
        ("betas_format", "mgh"),
    ],
)
def test_unusable_values_are_named(field, value):
    with pytest.raises(ConfigError, match=f"SimulationConfig:{field}: found"):
        SimulationConfig.toy(**{field: value})
