import numpy as np
import pytest

from ablations.effects import CoalitionValues, TestSet
from chasm.evaluation.regions import Region


def make_region(name, units, n_units, atlas="a", level="roi"):
    weights = np.zeros(n_units)
    weights[units] = 1
    return Region(name, level, atlas, weights, np.flatnonzero(weights))


def make_test_set(n_images=40, n_units=24, seed=0, n_regions=4, **changes):
    """Responses that are noise about a train mean; regions of equal numbers of units."""
    rng = np.random.default_rng(seed)
    parts = np.array_split(np.arange(n_units), n_regions)
    fields = {
        "subject": "subj01",
        "dataset": "toy",
        "simulated": True,
        "unit": "voxel",
        "target": rng.normal(0.3, 1, (n_images, n_units)),
        "train_mean": rng.normal(0.3, 0.1, n_units),
        "ceiling": np.resize(np.linspace(0.1, 0.6, 6), n_units),
        "regions": tuple(make_region(f"R{i}", part, n_units) for i, part in enumerate(parts)),
        "early": ("a:R0", "a:R1"),
        "higher": ("a:R2", "a:R3"),
        "n_boot": 100,
    }
    return TestSet(**(fields | changes))


def make_values(test, seed=0, held=False, **changes):
    """Predictions without any structure: identities must hold for them too."""
    rng = np.random.default_rng([seed, 1])

    def coalitions():
        return {
            name: test.train_mean + 0.4 * (test.target - test.train_mean) * strength
            + 0.2 * rng.normal(size=test.target.shape)
            for name, strength in (("none", 0), ("local", 0.6), ("global", 0.5), ("both", 1))
        }  # fmt: skip

    fields = {
        "encoder": "stage 1",
        "model_class": "model",
        "seed": seed,
        "predictions": coalitions(),
        "held": coalitions() if held else None,
    }
    return CoalitionValues(**(fields | changes))


def additive(test, local, global_, **changes):
    """An encoder whose prediction is the train mean + local + global (images, units)."""
    zero = np.zeros_like(local)
    parts = {"none": zero, "local": local, "global": global_, "both": local + global_}
    predictions = {name: test.train_mean + part for name, part in parts.items()}
    fields = {"encoder": "stage 1", "model_class": "model", "seed": 0}
    return CoalitionValues(**(fields | {"predictions": predictions} | changes))


@pytest.fixture
def region():
    return make_region


@pytest.fixture
def test_set():
    return make_test_set


@pytest.fixture
def values_of():
    return make_values


@pytest.fixture
def additive_values():
    return additive
