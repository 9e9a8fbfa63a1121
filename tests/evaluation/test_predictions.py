from dataclasses import replace

import h5py
import numpy as np
import pytest

from chasm.errors import DataError
from chasm.evaluation.predictions import PredictionFile, PredictionRow, voxel_membership


def test_a_file_gives_back_what_was_written(tmp_path, predictions):
    gate = np.random.default_rng(0).random((60, 1, 2))
    written = predictions(mixed=True, gate=gate)
    read = PredictionFile.read(written.write(tmp_path / "run" / "predictions.h5"))
    assert read.info == written.info
    assert list(read.rows) == list(written.rows)
    for name in ("image_id", "repeats"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    for name in ("target", "train_mean", "repeat_targets", "gate"):
        expected = np.asarray(getattr(written, name), dtype=np.float32)
        np.testing.assert_array_equal(getattr(read, name), expected)
    for name, row in written.rows.items():
        assert (read.rows[name].kind, read.rows[name].n_parameters, read.rows[name].details) == (
            row.kind,
            row.n_parameters,
            row.details,
        )
        np.testing.assert_array_equal(read.rows[name].values, np.float32(row.values))
    assert read.membership["streams"].names == written.membership["streams"].names
    np.testing.assert_array_equal(
        read.membership["streams"].counts, written.membership["streams"].counts
    )
    np.testing.assert_array_equal(read.units.size, written.units.size)
    assert read.targets["top_p"].ncsnr is None
    assert read.targets["top_p"].rows == {}


def test_a_target_keeps_the_rows_fitted_to_it(tmp_path, predictions):
    file = predictions()
    own = PredictionRow(file.target + 1, "baseline", 5, {"alpha": 2.0}, "top_p")
    other = replace(file.targets["top_p"], ncsnr=file.units.ncsnr, rows={"ridge": own})
    model = replace(file.rows["stage 1"], trained_on="top_p")
    file = replace(file, targets={"top_p": other}, rows={**file.rows, "stage 1": model})
    read = PredictionFile.read(file.write(tmp_path / "p.h5"))
    assert {name: row.trained_on for name, row in read.rows.items()} == {
        "ridge": "target", "linear probe (CLS)": "target", "stage 1": "top_p",
    }  # fmt: skip
    (found,) = read.targets["top_p"].rows.values()
    assert (found.kind, found.n_parameters, found.details, found.trained_on) == (
        "baseline", 5, {"alpha": 2.0}, "top_p",
    )  # fmt: skip
    np.testing.assert_array_equal(found.values, np.float32(own.values))
    np.testing.assert_array_equal(read.targets["top_p"].ncsnr, np.float32(file.units.ncsnr))


def test_optional_parts_may_be_absent(tmp_path, predictions):
    written = predictions(repeat_targets=None, targets={}, membership={}, rows={})
    read = PredictionFile.read(written.write(tmp_path / "p.h5"))
    assert read.repeat_targets is None
    assert read.gate is None
    assert (read.targets, read.membership, read.rows) == ({}, {}, {})


def bad_target(file):
    target = file.target.copy()
    target[3, 4] = np.nan
    return {"target": target}


def bad_ids(file):
    return {"image_id": np.zeros_like(file.image_id)}


def bad_shape(file):
    return {"rows": {"ridge": PredictionRow(file.target[:, :-1], "baseline")}}


def reserved(file):
    return {"rows": {"mean pattern": PredictionRow(file.target, "baseline")}}


def own_row(file, name, values):
    row = PredictionRow(values, "baseline", trained_on="top_p")
    return {"targets": {"top_p": replace(file.targets["top_p"], rows={name: row})}}


def unknown_own_row(file):
    return own_row(file, "lasso", file.target)


def bad_own_row(file):
    return own_row(file, "ridge", file.target[:, 1:])


def no_trials(file):
    return {"repeats": np.zeros_like(file.repeats)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (bad_target, r"/target: 1 NaN"),
        (bad_ids, "an image occurs twice"),
        (bad_shape, r"/predictions/ridge: shape \(60, 39\), expected \(60, 40\)"),
        (reserved, "cannot be used for a row"),
        (no_trials, "without a trial"),
        (unknown_own_row, r"/targets/top_p/predictions/lasso: there is no row of this name"),
        (bad_own_row, r"/targets/top_p/predictions/ridge: shape \(60, 39\)"),
    ],
)
def test_bad_content_is_named(predictions, change, message):
    file = predictions()
    with pytest.raises(DataError, match=message):
        replace(file, **change(file))


def test_damaged_files_are_named(tmp_path, predictions):
    path = predictions().write(tmp_path / "p.h5")
    with pytest.raises(DataError, match="no such file"):
        PredictionFile.read(tmp_path / "none.h5")
    with h5py.File(path, "a") as file:
        del file["target"]
    with pytest.raises(DataError, match="damaged or incomplete"):
        PredictionFile.read(path)
    predictions().write(path)
    with h5py.File(path, "a") as file:
        file.attrs["format_version"] = 99
    with pytest.raises(DataError, match="reads up to 1"):
        PredictionFile.read(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match="damaged"):
        PredictionFile.read(path)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(DataError, match="not a chasm-predictions file"):
        PredictionFile.read(tmp_path / "other.h5")


def test_a_failed_write_leaves_the_old_file(tmp_path, predictions):
    path = predictions().write(tmp_path / "p.h5")
    before = path.read_bytes()
    with pytest.raises(TypeError):
        predictions(
            rows={"x": PredictionRow(predictions().target, "model", 1, {"a": object()})}
        ).write(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_voxel_membership():
    table = voxel_membership(
        np.array([-1, 0, 1, 3, 1, 2]), {0: "none", 1: "V1v", 2: "V1d", 3: "V2v"}
    )
    assert table.names == ("V1v", "V1d", "V2v")
    np.testing.assert_array_equal(table.counts.sum(axis=0), [2, 1, 1])
    np.testing.assert_array_equal(table.counts[3], [0, 0, 1])
