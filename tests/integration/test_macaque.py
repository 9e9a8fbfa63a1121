"""Real recordings, where they are: images + responses -> store -> tokens -> Stage 1 -> table."""

import os
from pathlib import Path

import pandas as pd
import pytest

from chasm.cli import main
from chasm.data.store import SubjectStore

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("MACAQUE", ROOT.parent / "shared" / "data" / "macaque_v4"))

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="the macaque V4 recordings are not on this machine (set MACAQUE)"
)


@pytest.mark.parametrize(
    ("session", "responses", "units"),
    [("201025", "responses_avg", 89), ("210325", "responses_raw", 50)],
)
def test_recordings_go_from_arrays_to_a_table(session, responses, units, tmp_path, capsys):
    data = tmp_path / "macaque_v4"
    assert main([
        "prepare", "arrays", "--dataset", "macaque_v4", "--name", session,
        "--images", str(FOLDER / f"images_{session}.zip"),
        "--responses", str(FOLDER / f"{responses}_{session}.npy"),
        "--out", str(data / f"{session}.h5"),
    ]) == 0  # fmt: skip
    store = SubjectStore.open(data / f"{session}.h5")
    assert store.n_voxels == units
    assert main([
        "run", "-c", str(ROOT / "experiments" / "macaque.yaml"), "--data.subject", session,
        "--data.dataset_dir", str(data), "--runs", str(tmp_path / "runs"), "--n-boot", "200",
        "--trainer.max_epochs", "2", "--model.init_args.encoder.init_args.d_model", "32",
    ]) == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert "SIMULATED" not in shown
    (path,) = (tmp_path / "runs").rglob("scores.csv")
    scores = pd.read_csv(path)
    ridge = scores.query(
        "row == 'ridge' and metric == 'voxelwise_correlation_mean' and region == 'all'"
    )
    assert ridge["value"].item() > 0.2, "ridge on texture features predicts V4"
