"""Costs: operations against counts by hand, times, files."""

import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from chasm.data.datamodule import DataSizes
from chasm.errors import DataError
from chasm.evaluation import cost as costs
from chasm.evaluation.cost import (
    cost_of_run,
    count_flops,
    linear_cost,
    mamba2_flops,
    mamba_flops,
    measure,
    median_milliseconds,
    random_batch,
    read_cost,
)
from chasm.models.mamba import Mamba, ResidualMamba
from chasm.models.mamba2 import Mamba2
from chasm.training.recipes import Recipe
from chasm.training.runs import fit, load

CPU = torch.device("cpu")
BATCH, TOKENS = 3, 5


def counted_by_hand_mamba():
    """d 4, inner 8, states 2, taps 3, step-size rank 1, for one token; multiply and add are two."""
    projections = 2 * (4 * 16 + 8 * (1 + 2 * 2) + 1 * 8 + 8 * 4)
    convolution = 2 * 8 * 3
    per_state = 1 + 1 + 2 + 2  # decay's exponent, drive, state update, output
    per_channel = 1 + 2 + 1  # step times input, skip, gate
    return projections + convolution + 8 * (2 * per_state + per_channel)


def small_mamba(**options):
    return Mamba(4, d_state=2, d_conv=3, expand=2, dt_rank=1, **options)


def test_mamba_has_its_analytic_count_whichever_scan_runs():
    x = torch.randn(BATCH, TOKENS, 4)
    expected = BATCH * TOKENS * counted_by_hand_mamba()
    assert mamba_flops(small_mamba(), BATCH, TOKENS) == expected
    for scan in ("torch", "reference"):
        assert count_flops(small_mamba(scan=scan), x) == expected
    one = torch.randn(BATCH, 1, 4)
    assert count_flops(small_mamba(), one) == BATCH * counted_by_hand_mamba()
    block = nn.Sequential(ResidualMamba(4, 2, 3, 2), nn.Linear(4, 6))
    inner = mamba_flops(block[0].mamba, BATCH, TOKENS)
    assert count_flops(block, x) == inner + BATCH * TOKENS * 2 * 4 * 6


def test_mamba2_has_its_analytic_count_whichever_scan_runs():
    # d 4, inner 8, heads 2, groups 2 of 3 states, taps 5, for one token
    projections = 2 * (4 * (8 + (8 + 12) + 2) + 8 * 4)
    convolution = 2 * 5 * (8 + 12)
    per_state = 1 + 2 + 2  # drive, state update, output
    per_channel = 1 + 2 + 1  # step times input, skip, gate
    by_hand = projections + convolution + 8 * (3 * per_state + per_channel) + 2
    options = {"d_state": 3, "d_conv": 5, "headdim": 4, "ngroups": 2}
    assert mamba2_flops(Mamba2(4, **options), BATCH, TOKENS) == BATCH * TOKENS * by_hand
    for scan in ("torch", "reference"):
        layer = Mamba2(4, **options, scan=scan, chunk_size=2)
        assert count_flops(layer, torch.randn(BATCH, TOKENS, 4)) == BATCH * TOKENS * by_hand


@pytest.mark.parametrize(("kind", "gates"), [(nn.GRU, 3), (nn.LSTM, 4)])
def test_recurrent_layers_are_counted(kind, gates):
    layer = kind(8, 6, 2, batch_first=True).eval()
    by_hand = BATCH * TOKENS * 2 * gates * 6 * ((8 + 6) + (6 + 6))
    assert count_flops(layer, torch.randn(BATCH, TOKENS, 8)) == by_hand


def test_attention_is_counted():
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True).eval()
    matrices = 4 * 8 * 8 + 2 * 8 * 16
    attention = 2 * TOKENS * 8  # scores and weighted values, per token
    by_hand = BATCH * TOKENS * 2 * (matrices + attention)
    assert count_flops(layer, torch.randn(BATCH, TOKENS, 8)) == by_hand


def test_counting_leaves_no_trace():
    model = nn.Sequential(small_mamba(), nn.Linear(4, 2))
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    count_flops(model, torch.randn(1, 2, 4))
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled) == before
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


def test_the_median_ignores_warm_up_and_outliers():
    naps = iter([0.05, 0.05, 0.05, 0.001, 0.001, 0.001, 0.06, 0.001])
    found = median_milliseconds(lambda: time.sleep(next(naps)), CPU, repeats=5, warmup=3)
    assert 1 <= found < 20
    assert next(naps, None) is None


class Halves(nn.Module):
    """A stand-in for an encoding module: one linear map is trained, one is not."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.second = nn.Linear(4, 3).requires_grad_(False)

    def forward(self, batch):
        return self.second(self.first(batch["cls"][:, 0]))


def test_a_model_is_measured_per_image():
    sizes = DataSizes(2, 6, 4, 5, 21, 3)
    batch = random_batch(sizes, 7, CPU)
    assert batch["cls"].shape == (7, 2, 6)
    assert batch["patches"].shape == (7, 4, 5)
    assert batch["betas"].shape == (7, 21)
    found = measure(Halves(), sizes, batch_size=7)
    assert (found.parameters, found.trained) == (28 + 15, 28)
    assert found.flops == 2 * (6 * 4 + 4 * 3)
    assert found.batch_size == 7
    assert found.milliseconds > 0
    assert found.device == f"CPU, {torch.get_num_threads()} threads"


def test_linear_rows_have_one_weight_per_feature_and_unit(monkeypatch):
    found = linear_cost(n_parameters=5 * (11 + 1), n_units=5, device=CPU)
    assert (found.parameters, found.trained, found.flops) == (60, 60, 2 * 11 * 5)
    assert found.milliseconds > 0
    monkeypatch.setattr(costs, "MAX_LINEAR_WEIGHTS", 54)
    assert linear_cost(60, 5, CPU).milliseconds is None


def tokens(sizes):
    batch = random_batch(sizes, 1, CPU)
    return batch["cls"], batch["patches"]


@pytest.fixture(scope="module")
def finished(toy_dataset, tmp_path_factory):
    """Finished run of the smallest recipe; its cost.json is written by the tests."""
    recipe = Path(__file__).parents[2] / "experiments" / "smoke.yaml"
    return fit(
        Recipe(
            [
                "-c", str(recipe), "--data.dataset_dir", str(toy_dataset),
                "--runs", str(tmp_path_factory.mktemp("runs")), "--trainer.max_epochs", "1",
            ]
        )
    )  # fmt: skip


def test_a_run_is_measured_once(finished, monkeypatch):
    first = cost_of_run(finished)
    assert read_cost(finished / "cost.json") == first
    model = load(finished)[0]
    assert first.parameters == sum(p.numel() for p in model.parameters())
    assert first.flops == count_flops(model.encoder, *tokens(model.sizes))
    written = (finished / "cost.json").stat().st_mtime_ns
    assert cost_of_run(finished) == first
    assert (finished / "cost.json").stat().st_mtime_ns == written
    monkeypatch.setattr(costs, "device_name", lambda device: "another machine")
    assert cost_of_run(finished).device == "another machine"
    assert read_cost(finished / "cost.json").device == "another machine"
    (finished / "cost.json").write_text("{")
    assert cost_of_run(finished).flops == first.flops


def test_a_damaged_cost_is_named(tmp_path):
    path = tmp_path / "cost.json"
    with pytest.raises(DataError, match=r"cost\.json"):
        read_cost(path)
    path.write_text("{")
    with pytest.raises(DataError, match="is not a model's cost"):
        read_cost(path)
    path.write_text(json.dumps({"parameters": 1}))
    with pytest.raises(DataError, match=r"cost\.json"):
        read_cost(path)
