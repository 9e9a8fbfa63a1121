from dataclasses import replace

import h5py
import numpy as np
import pytest

from chasm.errors import DataError
from chasm.evaluation.predictions import Draws, PredictionFile, PredictionRow, voxel_membership


def parcel_labels(file):
    """Voxels that have the file's parcels, in any order, and two without one."""
    labels = np.concatenate([np.repeat(np.arange(file.n_units), file.units.size), [-1, -1]])
    return np.random.default_rng(0).permutation(labels)


def test_a_file_gives_back_what_was_written(tmp_path, predictions):
    rng = np.random.default_rng(0)
    draws = Draws(7, 3, rng.random((60, 40)), rng.random((60, 40)))
    labels = parcel_labels(predictions(mixed=True))
    written = predictions(
        mixed=True, gate=rng.random((60, 1, 2)), parcel_labels=labels, draws=draws
    )
    read = PredictionFile.read(written.write(tmp_path / "run" / "predictions.h5"))
    assert read.info == written.info
    assert list(read.rows) == list(written.rows)
    for name in ("image_id", "repeats", "parcel_labels"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    assert (read.draws.n, read.draws.seed) == (7, 3)
    for name in ("mean", "variance"):
        np.testing.assert_array_equal(getattr(read.draws, name), np.float32(getattr(draws, name)))
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
    assert read.parcel_labels is None
    assert read.draws is None
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


def other_parcels(file):
    return {"parcel_labels": parcel_labels(file)[1:]}


def bad_gate(file):
    return {"gate": np.full((60, 3, 2), 0.5)}


def gate_of_other_images(file):
    return {"gate": np.full((59, 1, 2), 0.5)}


def one_draw(file):
    return {"draws": Draws(1, 0, file.target, np.zeros_like(file.target))}


def bad_draws(file):
    return {"draws": Draws(3, 0, file.target, np.full_like(file.target, np.nan))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_parcels, r"/parcel_labels: voxels per parcel are not those of /units/size"),
        (bad_gate, r"/gate: shape \(60, 3, 2\), expected \(60, 1 or 40, 2\)"),
        (gate_of_other_images, r"/gate: shape \(59, 1, 2\), expected \(60, 1, 2\)"),
        (one_draw, r"/draws: 1 per image"),
        (bad_draws, r"/draws/variance: 2400 NaN"),
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
    with pytest.raises(DataError, match="reads up to 2"):
        PredictionFile.read(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match="damaged"):
        PredictionFile.read(path)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(DataError, match="not a chasm-predictions file"):
        PredictionFile.read(tmp_path / "other.h5")


def test_labels_of_voxels_are_as_many_as_voxels(predictions):
    file = predictions(unit="voxel")
    labels = np.arange(40) // 5
    gate = np.full((60, 8, 2), 0.5)
    assert replace(file, parcel_labels=labels, gate=gate).gate.shape[1] == 8
    with pytest.raises(DataError, match=r"/gate: shape \(60, 8, 2\), expected \(60, 1 or 40, 2\)"):
        replace(file, gate=gate)
    with pytest.raises(DataError, match=r"/parcel_labels: shape \(39,\), expected \(40,\)"):
        replace(file, parcel_labels=labels[1:])


def test_a_file_of_version_1_is_read(tmp_path, predictions):
    written = predictions()
    path = written.write(tmp_path / "p.h5")
    with h5py.File(path, "a") as file:
        assert file.attrs["format_version"] == 2
        file.attrs["format_version"] = 1
    read = PredictionFile.read(path)
    np.testing.assert_array_equal(read.target, np.float32(written.target))
    assert list(read.rows) == list(written.rows)


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
