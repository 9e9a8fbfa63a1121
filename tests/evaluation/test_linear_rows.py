"""Linear rows kept beside the runs: found again, fitted anew when anything changed."""

import logging

import numpy as np
import pytest

from chasm.evaluation import linear_rows as kept
from chasm.evaluation.linear_rows import linear_key, linear_rows
from chasm.models.baselines import (
    ALPHAS,
    BANDS,
    BaselinePrediction,
    LinearEncoder,
    linear_baselines,
)

FACTS = {
    "tokens": "pyramid-0123",
    "rows": (np.arange(6), np.arange(6, 9)),
    "responses": np.arange(12, dtype=np.float32).reshape(6, 2),
    "seed": 0,
    "cls_layers": [12],
    "n_folds": 5,
}


@pytest.fixture
def fit():
    """A fit that counts its calls."""

    def once():
        once.calls += 1
        values = np.random.default_rng(once.calls).normal(size=(3, 2)).astype(np.float32)
        return {
            "ridge": BaselinePrediction(values, 10, {"spaces": ["cls"], "alpha_median": 2.5}),
            "linear probe (CLS)": BaselinePrediction(-values, 4, {"folds": 5}),
        }

    once.calls = 0
    return once


def test_rows_are_fitted_once_and_come_back_whole(tmp_path, fit):
    first = linear_rows(tmp_path, "key", fit)
    again = linear_rows(tmp_path, "key", fit)
    assert fit.calls == 1
    assert list(again) == list(first) == ["ridge", "linear probe (CLS)"]
    for name, row in first.items():
        np.testing.assert_array_equal(again[name].values, row.values)
        assert (again[name].n_parameters, again[name].details) == (row.n_parameters, row.details)
    linear_rows(tmp_path, "another", fit)
    assert fit.calls == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another.h5", "key.h5"]


@pytest.mark.parametrize("kept_bytes", [0, 200])
def test_a_damaged_file_is_written_again(kept_bytes, tmp_path, fit, caplog):
    linear_rows(tmp_path, "key", fit)
    path = tmp_path / "key.h5"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with caplog.at_level(logging.WARNING, logger=kept.__name__):
        linear_rows(tmp_path, "key", fit)
    assert fit.calls == 2
    assert "key.h5 cannot be read" in caplog.text
    linear_rows(tmp_path, "key", fit)
    assert fit.calls == 2


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": "pyramid-4567"},
        {"rows": (np.arange(6)[::-1], np.arange(6, 9))},
        {"rows": (np.arange(6), np.arange(5, 8))},
        {"responses": FACTS["responses"] + 1},
        {"responses": FACTS["responses"].reshape(2, 6)},
        {"seed": 1},
        {"cls_layers": [11]},
        {"n_folds": 4},
    ],
)
def test_the_key_depends_on_everything_that_is_fitted(change):
    assert linear_key(**FACTS) == linear_key(**FACTS)
    assert linear_key(**(FACTS | change)) != linear_key(**FACTS)


@pytest.mark.parametrize(
    "change",
    [
        {"another": LinearEncoder(("cls",))},
        {"ridge": LinearEncoder(("patches",))},
        {"ridge": LinearEncoder(("cls", "patches"), alphas=ALPHAS * 2)},
        {"banded ridge": LinearEncoder(("cls", "patches"), shares=BANDS[:-1])},
    ],
)
def test_the_key_depends_on_what_is_searched(change, monkeypatch):
    before = linear_key(**FACTS)
    monkeypatch.setattr(kept, "linear_baselines", lambda *_: linear_baselines() | change)
    assert linear_key(**FACTS) != before


def test_the_key_depends_on_the_solver(monkeypatch):
    before = linear_key(**FACTS)
    monkeypatch.setattr(kept, "version", lambda package: "0.0")
    assert linear_key(**FACTS) != before
