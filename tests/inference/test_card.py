"""Model cards: what a model was trained on and its scores, or that there are none."""

import logging
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from chasm.evaluation.predictions import PredictionFile
from chasm.inference.card import model_card
from chasm.inference.encoder import read_trained
from chasm.inference.maps import make_map
from chasm.noise_ceiling import noise_ceiling


@pytest.fixture
def copy(tested_run, tmp_path):
    shutil.copytree(tested_run, tmp_path / "run")
    return tmp_path / "run"


def rows_of(card):
    """Rows of the score table: name -> cells."""
    part = card.split("## Scores")[1].split("## Use")[0]
    lines = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [c.strip() for c in cells[1:]] for cells in lines}


def test_the_scores_are_those_of_the_report(tested_run):
    rows = rows_of(model_card(read_trained(tested_run)))
    scores = pd.read_csv(tested_run / "report" / "scores.csv")
    scores = scores[(scores["target"] == "target") & (scores["level"] == "all")]
    for name, shown in (
        ("stage 1", "**stage 1**"), ("banded ridge", "banded ridge"),
        ("mean pattern", "mean pattern"), ("noise ceiling", "noise ceiling"),
    ):  # fmt: skip
        part = scores[scores["row"] == name].set_index("metric")
        line = part.loc["pattern_correlation"]
        expected = f"{line['value']:.3f} [{line['low']:.3f}, {line['high']:.3f}]"
        assert expected in rows[shown], (name, rows[shown])
    assert "best baseline" in model_card(read_trained(tested_run))


def test_what_it_was_trained_on_is_said(tested_run):
    card = model_card(read_trained(tested_run))
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "chasm-fmri"
    for words in (
        "**SIMULATED.**", "subj01", "simulated-nsd", "recipe smoke", "split", "clean",
        "train images", "to train", "weight-free", "betas_fithrf_GLMdenoise_RR", "torch 2",
        "val/mse", "Apache-2.0",
    ):  # fmt: skip
        assert words.lower() in card.lower(), words
    assert "None" not in card
    assert " nan" not in card
    assert "[nan" not in card


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("chasm"), "propagate", True)
    return caplog


def another_checkpoint(run):
    saved = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    saved["epoch"] = 99
    torch.save(saved, run / "checkpoints" / "best.ckpt")


def other_predictions(run):
    file = PredictionFile.read(run / "predictions.h5")
    file.write(run / "predictions.h5")
    with (run / "predictions.h5").open("ab") as stream:
        stream.write(b" ")


def broken_table(run):
    (run / "report" / "scores.csv").write_text("a,b\n1,2\n")


@pytest.mark.parametrize("change", [another_checkpoint, other_predictions, broken_table])
def test_scores_of_something_else_are_left_out(copy, change, said):
    change(copy)
    assert "Not tested" in model_card(read_trained(copy))
    assert "the card has no scores" in said.text


def test_an_untested_run_says_so(stage1_run):
    assert "Not tested" in model_card(read_trained(stage1_run))


@torch.inference_mode()
def test_score_maps_hold_the_scores_of_every_voxel(tested_run):
    file = PredictionFile.read(tested_run / "predictions.h5")
    trained = read_trained(tested_run)
    labels = trained.module.parcellation.labels.numpy()
    predicted, target = file.rows["stage 1"].values, file.target
    error = ((target - predicted) ** 2).sum(axis=0)
    expected = 1 - error / ((target - file.train_mean) ** 2).sum(axis=0)
    for what, units in (
        ("r2", expected),
        ("ceiling", noise_ceiling(file.units.ncsnr, file.repeats)),
    ):
        found = make_map(tested_run, what)
        np.testing.assert_allclose(found.values[labels >= 0], units[labels[labels >= 0]], rtol=1e-4)
        assert np.isnan(found.values[labels < 0]).all()
    ridge = make_map(tested_run, "r2", row="banded ridge")
    assert not np.allclose(ridge.values, make_map(tested_run, "r2").values, equal_nan=True)
    assert ridge.title.endswith("R² of banded ridge")
