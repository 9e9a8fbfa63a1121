import json
import shutil

import h5py
import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.io import savemat

from chasm.data.nsd import (
    ATLAS_LABELS,
    NSD_SUBJECTS,
    STREAM_GROUPS,
    NSDTree,
    from_nsd_ids,
    read_ctab,
    to_nsd_ids,
)
from chasm.errors import DataError

from .nsd_tree import (
    SESSIONS,
    SPECIAL_SESSIONS,
    TRIALS,
    VERSION,
    write_responses,
    write_tree,
)


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "nsd")


@given(st.lists(st.integers(1, 73000), min_size=1), st.sampled_from([np.int32, np.uint32, float]))
def test_ids_go_there_and_back(ids, dtype):
    image_ids = from_nsd_ids(np.array(ids, dtype=dtype))
    assert image_ids.dtype == np.int64
    assert image_ids.tolist() == [i - 1 for i in ids]
    assert to_nsd_ids(image_ids).tolist() == ids


def test_the_largest_uint16_and_zero():
    assert from_nsd_ids(np.array([1, 65535], dtype=np.uint16)).tolist() == [0, 65534]
    assert to_nsd_ids(np.array([65535], dtype=np.uint16)).tolist() == [65536]
    with pytest.raises(ValueError, match="start at 1"):
        from_nsd_ids(np.array([0], dtype=np.uint16))


def test_trials_show_the_images_of_the_design(tree):
    got = NSDTree(tree.root).trial_image_ids(1, [2, 4])
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, np.concatenate([tree.image_ids(2), tree.image_ids(4)]))


def test_repeats_count_earlier_presentations(tree):
    seen, expected = {}, []
    for image in tree.ordering.tolist():
        expected.append(seen.get(image, 0))
        seen[image] = expected[-1] + 1
    np.testing.assert_array_equal(NSDTree(tree.root).design().repeats, expected)


def test_special_images_are_the_shared_ones_finished_early(tree):
    expected = []
    for ten_k, image in enumerate(tree.sharedix.tolist(), start=1):
        trials = np.flatnonzero(tree.ordering == ten_k)
        if trials.max() < SPECIAL_SESSIONS * TRIALS:
            expected.append(image - 1)
    assert 0 < len(expected) < len(tree.sharedix)
    assert NSDTree(tree.root).special_images().tolist() == sorted(expected)


def test_runs_come_from_the_design(tree):
    runs = NSDTree(tree.root).trial_runs([1, 2])
    assert runs.tolist() == ([1] * 16 + [2] * 14) * 2


def test_without_a_marker_nsd_facts_hold(tree):
    (tree.root / "SIMULATED.json").unlink()
    real = NSDTree(tree.root)
    assert not real.is_simulated
    assert (real.special_sessions, real.trials_per_session) == (30, 750)


def test_published_tables():
    assert NSD_SUBJECTS[1].nsdgeneral_voxels == 15724
    assert min(facts.sessions for facts in NSD_SUBJECTS.values()) == 30
    grouped = [label for group in STREAM_GROUPS.values() for label in group]
    assert sorted(grouped) == sorted(ATLAS_LABELS["streams"])
    assert len(ATLAS_LABELS["Kastner2015"]) == 25
    assert ATLAS_LABELS["Kastner2015"][17:23] == tuple(f"IPS{i}" for i in range(6))


def test_labels_are_named_by_ctab_or_tables_or_numbers(tree):
    reader = NSDTree(tree.root)
    roi = reader.roi(1, "streams")
    np.testing.assert_array_equal(roi.labels, tree.streams)
    assert roi.names == dict(enumerate(ATLAS_LABELS["streams"], start=1))
    labels = tree.root / "nsddata/freesurfer/subj01/label"
    labels.mkdir(parents=True)
    (labels / "streams.mgz.ctab").write_text("0  Unknown 0 0 0 0\n1   first   9 9 9 0\n\n")
    assert reader.roi(1, "streams").names[1] == "first"
    assert read_ctab(labels / "streams.mgz.ctab") == {1: "first"}
    assert reader.label_names(1, "mine", np.array([-1, 0, 4])) == {4: "mine-4"}
    assert reader.atlases(1) == ["nsdgeneral", "streams"]


def test_sessions_are_those_present(tree):
    reader = NSDTree(tree.root)
    assert reader.subjects() == [1]
    assert reader.sessions(1, VERSION) == [1, 2, 3, 4]
    tree.session(2).rename(tree.session(2, "nii.gz"))
    assert reader.sessions(1) == [1, 2, 3, 4]
    tree.session(3).unlink()
    assert reader.sessions(1) == [1, 2, 4]


def test_responses_are_compared_with_the_design(tree):
    ids = np.concatenate([tree.image_ids(s) for s in range(1, 5)])
    write_responses(tree, ids)
    assert NSDTree(tree.root).trial_image_ids(1, [1, 2, 3, 4]).tolist() == ids.tolist()
    ids[TRIALS + 5] += 1
    write_responses(tree, ids)
    NSDTree(tree.root).trial_image_ids(1, [1])
    with pytest.raises(DataError, match=r"responses\.tsv:73KID: differs .* session 2"):
        NSDTree(tree.root).trial_image_ids(1, [1, 2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.check_subject(3), "subject 3 is not in this tree, which has subj01"),
        (lambda t: t.sessions(1, "betas_other"), f"there are {VERSION}"),
        (lambda t: t.roi(1, "floc-faces"), "no ROI atlas 'floc-faces'; there are nsdgeneral"),
        (lambda t: t.trial_image_ids(3, [1]), "covers 2 subjects and 4 sessions"),
        (lambda t: t.trial_image_ids(1, [5]), "subject 1, session 5 asked for"),
    ],
)
def test_what_is_not_there_is_said(tree, call, message):
    with pytest.raises(DataError) as error:
        call(NSDTree(tree.root))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_damaged_files_are_named(tree, tmp_path):
    with pytest.raises(DataError, match="has no folder 'nsddata'"):
        NSDTree(tmp_path)
    (tree.roi_folder / "streams.nii.gz").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"streams\.nii\.gz: not a readable NIfTI"):
        NSDTree(tree.root).roi(1, "streams")
    four = nib.Nifti1Image(np.zeros((2, 2, 2, 2), np.int16), np.eye(4))
    nib.save(four, tree.roi_folder / "streams.nii.gz")
    with pytest.raises(DataError, match=r"shape \(2, 2, 2, 2\) found"):
        NSDTree(tree.root).roi(1, "streams")
    (tree.root / "SIMULATED.json").write_text(json.dumps({"simulated": True}))
    with pytest.raises(DataError, match=r"SIMULATED\.json: not the marker"):
        _ = NSDTree(tree.root).is_simulated


def test_a_damaged_design_is_named(tree):
    path = NSDTree(tree.root).design_path
    good = {"masterordering": tree.ordering[None], "subjectim": tree.subjectim}
    savemat(path, good)
    with pytest.raises(DataError, match=r"nsd_expdesign\.mat:sharedix: is missing"):
        NSDTree(tree.root).design()
    savemat(path, good | {"sharedix": tree.sharedix[None] - tree.sharedix.min()})
    with pytest.raises(DataError, match="an id below 1"):
        NSDTree(tree.root).design()
    savemat(path, good | {"sharedix": tree.sharedix[None, ::-1]})
    with pytest.raises(DataError, match="subjectim: does not go with"):
        NSDTree(tree.root).design()
    path.write_bytes(b"nothing at all")
    with pytest.raises(DataError, match="not a readable MATLAB 5 file"):
        NSDTree(tree.root).design()
    path.unlink()
    with pytest.raises(DataError, match="no such file"):
        NSDTree(tree.root).design()


@pytest.mark.parametrize("told_by", ["design", "stimuli", "betas"])
def test_a_simulated_tree_without_its_marker_is_refused(tree, told_by):
    paths = {"stimuli": tree.stimuli, "betas": tree.session(1)}
    (tree.root / "SIMULATED.json").unlink()
    assert not NSDTree(tree.root).is_simulated  # nothing says so yet
    if told_by == "design":
        with NSDTree(tree.root).design_path.open("r+b") as file:
            file.write(b"MATLAB 5.0 MAT-file, simulated NSD design".ljust(116))
    else:
        with h5py.File(paths[told_by], "r+") as file:
            file.attrs["simulated"] = True
    with pytest.raises(DataError, match=r"SIMULATED\.json: no such file, but .*simul") as error:
        NSDTree(tree.root)
    assert "Put SIMULATED.json back" in error.value.remedy


def test_what_the_simulator_writes_says_so(toy_tree, tmp_path):
    """Each file alone gives the tree away."""
    root = shutil.copytree(toy_tree, tmp_path / "nsd")
    (root / "SIMULATED.json").unlink()
    telling = [
        root / "nsddata/experiments/nsd/nsd_expdesign.mat",
        root / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5",
        next(root.glob("nsddata_betas/ppdata/subj01/*/*/betas_session01.hdf5")),
    ]
    for path in telling:
        with pytest.raises(DataError, match=path.name):
            NSDTree(root)
        path.unlink()
    assert not NSDTree(root).is_simulated


def test_tables_that_are_no_text_are_named(tree):
    path = write_responses(tree, np.zeros(SESSIONS * TRIALS, int))
    path.write_bytes(b"SESSION\t73KID\n\xff\xfe\n")
    with pytest.raises(DataError, match=r"responses\.tsv: not a readable table"):
        NSDTree(tree.root).trial_image_ids(1, [1])
    path.write_bytes(b"\xff\xfeS\x00E\x00")
    with pytest.raises(DataError, match=r"responses\.tsv: not a readable table"):
        NSDTree(tree.root).trial_image_ids(1, [1])
    table = tree.root / "nsddata/freesurfer/subj01/label/streams.mgz.ctab"
    table.parent.mkdir(parents=True)
    table.write_bytes(b"1 \xff")
    with pytest.raises(DataError, match=r"streams\.mgz\.ctab: not a readable label table"):
        NSDTree(tree.root).roi(1, "streams")
