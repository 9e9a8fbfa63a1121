"""The simulated demo says what was planted: which tokens predict which areas, and how well."""

import numpy as np
import pytest

from chasm.cli import main
from chasm.data.simulation import load_truth
from chasm.data.store import SubjectStore
from chasm.evaluation.bootstrap import resample_counts
from chasm.evaluation.predictions import PredictionFile
from chasm.noise_ceiling import noise_ceiling

pytestmark = pytest.mark.slow

GROUPS = {
    "Early": ("early",),
    "Higher": ("ventral", "lateral", "parietal"),
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    from pathlib import Path

    recipe = Path(__file__).parents[2] / "experiments" / "stage1.yaml"
    status = main([
        "run", "-c", str(recipe), "--simulate", "--data.dataset_dir", str(folder / "simulated"),
        "--runs", str(folder / "runs"), "--trainer.max_epochs", "2", "--n-boot", "100",
    ])  # fmt: skip
    assert status == 0
    (predictions,) = (folder / "runs").rglob("predictions.h5")
    return folder / "simulated", PredictionFile.read(predictions)


def explained(file, row, weights, counts):
    """Noise-normalised R² of a row, one per resample of the test images."""
    error = np.square(file.rows[row].values - file.target)
    total = np.square(file.train_mean - file.target)
    r2 = 1 - (counts @ error) / (counts @ total)
    ceiling = noise_ceiling(file.units.ncsnr, file.repeats)
    return (r2 * weights).sum(1) / (ceiling * weights).sum()


def contrast(file, first, second, group):
    """Point and 95 % interval of the difference of two rows in a group, images resampled."""
    streams = file.membership["streams"]
    columns = [streams.names.index(name) for name in GROUPS[group]]
    weights = streams.counts[:, columns].sum(1)
    counts = np.concatenate([np.ones((1, file.n_images)), resample_counts(file.n_images, 2000, 0)])
    values = explained(file, first, weights, counts) - explained(file, second, weights, counts)
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return values[0], low, high


def test_early_areas_are_predicted_better_from_patches_than_from_cls(demo):
    point, low, _ = contrast(demo[1], "ridge (patches)", "linear probe (CLS)", "Early")
    assert low > 0, point


def test_higher_areas_gain_from_cls(demo):
    point, low, high = contrast(demo[1], "banded ridge", "ridge (patches)", "Higher")
    assert low > 0, (point, high)


def test_recomputed_ncsnr_is_within_five_per_cent_of_the_truth_in_the_median(demo):
    folder, _ = demo
    truth = load_truth(folder / "nsd", 1)
    store = SubjectStore.open(folder / "subj01.h5")
    assert len(truth.ncsnr_true) == store.n_voxels
    found, planted = np.median(store.voxels["ncsnr"]), np.median(truth.ncsnr_true)
    assert found == pytest.approx(planted, rel=0.05)


def test_the_ideal_observer_reaches_the_ceiling(demo):
    folder, file = demo
    truth = load_truth(folder / "nsd", 1)
    store = SubjectStore.open(folder / "subj01.h5")
    mean, std = store.normalisation("train")
    rows = np.searchsorted(truth.ideal_image_id, file.image_id)
    trial_images = store.trials["image_id"].to_numpy()
    target = np.stack([
        store.zscore(np.flatnonzero(trial_images == image), mean, std).mean(0)
        for image in file.image_id
    ])  # fmt: skip
    ceiling = noise_ceiling(store.voxels["ncsnr"].to_numpy(), file.repeats)
    counts = np.concatenate([np.ones((1, len(target))), resample_counts(len(target), 2000, 0)])
    error = counts @ np.square(truth.ideal[rows] - target)
    r2 = 1 - error / (counts @ np.square(target))
    values = r2.sum(1) / ceiling.sum()
    low, high = np.quantile(values[1:], [0.025, 0.975])
    assert low < 1 < high
    assert values[0] == pytest.approx(1, abs=0.1)
