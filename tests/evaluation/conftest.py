import numpy as np
import pytest

from chasm.evaluation.predictions import (
    AlternativeTarget,
    Membership,
    PredictionFile,
    PredictionRow,
    RunInfo,
    Units,
)

STREAMS = ("early", "midventral", "midlateral", "midparietal", "ventral", "lateral", "parietal")
AREAS = ("V1v", "V1d", "V2v", "V2d", "V3v", "V3d", "hV4")


def make_predictions(
    n_images=60, n_units=40, *, unit="parcel", seed=0, max_repeats=3, mixed=False, **changes
):
    """A plausible predictions file: signal, repeats, a model better than two baselines."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(8, 31, n_units) if unit == "parcel" else np.ones(n_units, int)
    train_mean = rng.normal(0, 0.15, n_units)
    snr = np.linspace(1.4, 0.2, n_units)
    signal_sd = snr / np.sqrt(1 + snr**2)
    latent = rng.normal(size=(n_images, 12)) @ rng.normal(size=(12, n_units)) / np.sqrt(12)
    signal = latent * signal_sd + train_mean
    noise_sd = 1 / np.sqrt(1 + snr**2)
    repeats = rng.integers(1, 4, n_images) if mixed else np.full(n_images, max_repeats)
    trials = signal[:, None] + noise_sd * rng.normal(size=(n_images, max_repeats, n_units))
    trials[np.arange(max_repeats)[None, :] >= repeats[:, None]] = np.nan
    target = np.nanmean(trials, axis=1)

    def prediction(quality):
        error = signal_sd * np.sqrt(1 - quality**2) * rng.normal(size=signal.shape)
        return quality * (quality * (signal - train_mean) + error) + train_mean

    share = np.zeros((n_units, len(STREAMS)), int)
    bounds = np.linspace(0, len(STREAMS) * 0.999, n_units)
    for u, bound in enumerate(bounds):
        inside = round(sizes[u] * (1 - (bound % 1) * 0.4))
        share[u, int(bound)] = inside
        share[u, min(int(bound) + 1, len(STREAMS) - 1)] += sizes[u] - inside
    areas = np.zeros((n_units, len(AREAS)), int)
    early = np.arange(max(n_units // 3, 1))
    areas[early, early % len(AREAS)] = sizes[early]
    position = np.stack([np.linspace(-40, 40, n_units), rng.normal(-70, 9, n_units),
                         rng.normal(0, 12, n_units)], axis=1)  # fmt: skip
    fields = {
        "image_id": rng.permutation(73000)[:n_images],
        "repeats": repeats,
        "target": target,
        "train_mean": train_mean,
        "rows": {
            "ridge": PredictionRow(prediction(0.72), "baseline", 7890, {"alpha_median": 3.0}),
            "linear probe (CLS)": PredictionRow(prediction(0.6), "baseline", 1230),
            "stage 1": PredictionRow(prediction(0.85), "model", 4_200_000, {"target": "top_p"}),
        },
        "units": Units(sizes, snr, position),
        "membership": {
            "streams": Membership(share, STREAMS),
            "prf-visualrois": Membership(areas, AREAS),
        },
        "repeat_targets": trials,
        "targets": {"top_p": AlternativeTarget(target + 0.2, train_mean + 0.2)},
        "info": RunInfo(
            subject="subj01",
            dataset="nsd",
            simulated=True,
            unit=unit,
            split="clean",
            weights_label="weight-free",
            model="DualStreamEncoder",
            backbone="pyramid",
            config="model:\n  d_model: 128\ntrainer:\n  max_epochs: 30\n",
            fingerprints={"store": "3f9a", "tokens": "77bc"},
        ),
    }
    return PredictionFile(**(fields | changes))


@pytest.fixture
def predictions():
    return make_predictions


@pytest.fixture
def naive_pearson():
    """Pearson r of two vectors, written out."""

    def pearson(a, b):
        a, b = a - a.mean(), b - b.mean()
        return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))

    return pearson
