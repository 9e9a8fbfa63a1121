"""The simulated tree has NSD's files, shapes, types and ids."""

import json
import shutil
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.ndimage

from chasm.data.prepare import prepare_nsd
from chasm.data.simulation import SimulationConfig, generate, load_truth, simulate
from chasm.data.simulation.cortex import AREA_NAMES, make_cortex
from chasm.data.simulation.writer import Tree
from chasm.data.store import SubjectStore
from chasm.errors import ChasmError, ConfigError, DataError

CONFIG = SimulationConfig.toy()
VERSION = CONFIG.beta_version
ATLASES = {
    "nsdgeneral": 1,
    "prf-visualrois": 7,
    "prf-eccrois": 5,
    "floc-faces": 5,
    "floc-bodies": 4,
    "floc-places": 3,
    "floc-words": 5,
    "streams": 7,
    "Kastner2015": 25,
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return simulate(CONFIG, tmp_path_factory.mktemp("simulated") / "nsd", [1, 2])


@pytest.fixture(scope="module")
def design(tree):
    return scipy.io.loadmat(tree / "nsddata/experiments/nsd/nsd_expdesign.mat")


def volume(path):
    return np.asanyarray(nib.load(path).dataobj)


def anatomy(tree, subject=1):
    return tree / f"nsddata/ppdata/subj{subject:02d}/func1pt8mm"


def session(tree, number, subject=1, suffix="hdf5"):
    folder = tree / f"nsddata_betas/ppdata/subj{subject:02d}/func1pt8mm/{VERSION}"
    return folder / f"betas_session{number:02d}.{suffix}"


def files(root):
    names = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
    return {str(n): (root / n).read_bytes() for n in names if n.name != ".simulate.lock"}


def test_design_file_has_nsd_fields_shapes_and_types(design):
    images, trials = 80, 240
    expected = {
        "masterordering": ((1, trials), np.uint16),
        "subjectim": ((3, images), np.int32),
        "sharedix": ((1, 32), np.int32),
        "basiccnt": ((3, 4), np.uint16),
    }
    for field, (shape, dtype) in expected.items():
        assert (design[field].shape, design[field].dtype) == (shape, dtype), field
    assert design["stimpattern"].dtype == np.uint8
    assert (design["stimpattern"].sum(axis=(1, 2), dtype=int) == 60).all()


def test_design_shows_each_image_three_times_with_one_based_ids(design):
    ordering = design["masterordering"][0].astype(int)
    assert np.array_equal(np.sort(ordering), np.repeat(np.arange(1, 81), 3))
    assert (ordering[1:] != ordering[:-1]).all()
    subjectim, shared = design["subjectim"].astype(int), design["sharedix"][0].astype(int)
    assert (subjectim[:, :32] == shared).all()
    own = subjectim[:, 32:].ravel()
    everything = np.concatenate([shared, own])
    assert np.array_equal(np.sort(everything), np.arange(1, len(everything) + 1))
    for column, trials in enumerate(ordering.reshape(4, 60)):
        shown = [list(trials).count(image) for image in set(trials)]
        assert list(design["basiccnt"][:, column]) == [shown.count(k) for k in (1, 2, 3)]


def test_marker_states_what_the_tree_is(tree, design):
    marker = json.loads((tree / "SIMULATED.json").read_text())
    assert marker["simulated"] is True
    assert SimulationConfig.from_dict(marker["config"]) == CONFIG
    assert marker["special_sessions"] == 3
    assert marker["trials_per_session"] == 60
    assert marker["sessions"] == {"1": 4, "2": 4, "3": 3}
    assert marker["subjects_written"] == [1, 2]
    # The clean split of every subject has train, validation and test images.
    seen = np.bincount(design["masterordering"][0, : 3 * 60], minlength=81)[1:33]
    assert 10 <= (seen == 3).sum() <= 22


def test_hdf5_betas_have_nsd_axes_chunks_and_scale(tree):
    brain = volume(anatomy(tree) / "brainmask.nii.gz")
    with h5py.File(session(tree, 1)) as file:
        betas = file["betas"]
        assert (betas.shape, betas.dtype) == ((60, *brain.shape[::-1]), np.int16)
        assert (betas.chunks, betas.compression) == ((60, 1, 1, 1), None)
        values = betas[()].transpose(3, 2, 1, 0)
    assert (values[brain == 0] == 0).all()
    visual = values[volume(anatomy(tree) / "roi/nsdgeneral.nii.gz") == 1] / 300
    assert 0.3 < visual.std(axis=1).mean() < 5
    assert (visual.std(axis=1) > 0).all()
    assert len(list(session(tree, 1).parent.glob("betas_session*"))) == 4


def test_voxels_invalid_in_a_session_are_zero_there_and_have_no_ncsnr(tree):
    brain = volume(anatomy(tree) / "brainmask.nii.gz") == 1
    invalid = np.zeros(brain.shape, bool)
    for number in range(1, 5):
        with h5py.File(session(tree, number)) as file:
            zero = (file["betas"][()] == 0).all(axis=0).T & brain
        assert 1 <= zero.sum() <= 5
        invalid |= zero
    assert (volume(anatomy(tree) / "roi/nsdgeneral.nii.gz")[invalid] == -1).all()
    ncsnr = volume(session(tree, 1).parent / "ncsnr.nii.gz")
    assert np.array_equal(np.isnan(ncsnr[brain]), invalid[brain])


def test_nifti_betas_equal_hdf5_transposed(tree, tmp_path):
    other = simulate(SimulationConfig.toy(betas_format="nii.gz"), tmp_path / "nii", [1])
    image = nib.load(session(other, 2, suffix="nii.gz"))
    assert image.get_data_dtype() == np.int16
    with h5py.File(session(tree, 2)) as file:
        assert np.array_equal(np.asanyarray(image.dataobj), file["betas"][()].transpose(3, 2, 1, 0))
    name = "ncsnr.nii.gz"
    ours = volume(session(other, 1).parent / name)
    assert np.array_equal(ours, volume(session(tree, 1).parent / name), equal_nan=True)


def test_full_allocation_changes_no_value(tree, tmp_path):
    other = simulate(SimulationConfig.toy(allocate_all_chunks=True), tmp_path / "all", [1])
    with h5py.File(session(tree, 1)) as few, h5py.File(session(other, 1)) as every:
        assert np.array_equal(few["betas"][()], every["betas"][()])
        chunks = every["betas"].id.get_num_chunks()
        assert few["betas"].id.get_num_chunks() < chunks == np.prod(every["betas"].shape[1:])


@pytest.mark.parametrize("atlas", ATLASES)
def test_roi_volumes_and_label_tables(tree, atlas):
    folder = anatomy(tree) / "roi"
    both, left, right = (volume(folder / f"{side}{atlas}.nii.gz") for side in ("", "lh.", "rh."))
    assert np.array_equal(both, np.maximum(left, right))
    assert (np.minimum(left, right) == -1).all()
    assert both.min() == -1
    assert (both == 0).any()
    assert both.max() <= ATLASES[atlas]
    nsdgeneral = volume(folder / "nsdgeneral.nii.gz")
    assert (nsdgeneral[both > 0] == 1).all()
    assert np.array_equal(both == -1, nsdgeneral == -1)
    middle = both.shape[0] / 2
    assert (np.nonzero(left >= 0)[0] < middle).all()
    table = tree / f"nsddata/freesurfer/subj01/label/{atlas}.mgz.ctab"
    labels = [int(line.split()[0]) for line in table.read_text().splitlines()]
    assert labels == list(range(ATLASES[atlas] + 1))
    assert (tree / f"nsddata/freesurfer/fsaverage/label/{atlas}.mgz.ctab").is_file()


def test_affine_is_1p8_mm_ras_with_centred_origin(tree):
    image = nib.load(anatomy(tree) / "roi/nsdgeneral.nii.gz")
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert np.allclose(image.header.get_zooms(), 1.8)
    centre = image.affine @ [*((np.array(image.shape) - 1) / 2), 1]
    assert np.allclose(centre[:3], 0, atol=1e-5)


def test_ncsnr_file_equals_a_plain_computation(tree, design):
    mask = volume(anatomy(tree) / "roi/nsdgeneral.nii.gz") == 1
    scored = []
    for number in range(1, 5):
        with h5py.File(session(tree, number)) as file:
            raw = file["betas"][()].transpose(3, 2, 1, 0)[mask].astype(float)
        scored.append((raw - raw.mean(1, keepdims=True)) / raw.std(1, ddof=1, keepdims=True))
    scored = np.concatenate(scored, axis=1)
    ordering = design["masterordering"][0]
    noise = np.mean(
        [scored[:, ordering == i].var(axis=1, ddof=1) for i in range(1, 81)],
        axis=0,
    )
    expected = np.sqrt(np.maximum(0, 1 - noise) / noise)
    found = volume(session(tree, 1).parent / "ncsnr.nii.gz")
    assert np.allclose(found[mask], expected, atol=2e-3)
    assert np.isnan(found[volume(anatomy(tree) / "brainmask.nii.gz") == 0]).all()


def test_meanbeta_is_times_300_and_onoffbeta_is_not(tree):
    mask = volume(anatomy(tree) / "roi/nsdgeneral.nii.gz") == 1
    total = np.zeros(mask.sum())
    for number in range(1, 5):
        with h5py.File(session(tree, number)) as file:
            total += file["betas"][()].transpose(3, 2, 1, 0)[mask].mean(axis=1) / 4
    meanbeta = volume(session(tree, 1).parent / "meanbeta.nii.gz")
    assert meanbeta.dtype == np.float32
    assert np.allclose(meanbeta[mask], total, atol=0.05)
    assert np.allclose(volume(anatomy(tree) / "onoffbeta.nii.gz")[mask] * 300, total, atol=0.05)


@pytest.mark.parametrize("subject", [1, 2])
def test_responses_table_follows_the_betas(tree, design, subject):
    path = tree / f"nsddata/ppdata/subj{subject:02d}/behav/responses.tsv"
    table = pd.read_csv(path, sep="\t")
    expected = "SUBJECT SESSION RUN TRIAL 73KID 10KID TIME ISOLD ISCORRECT RT"
    assert " ".join(table.columns[:10]) == expected
    assert table.columns[-1] == "MISSINGDATA"
    ordering = design["masterordering"][0].astype(int)
    assert np.array_equal(table["10KID"], ordering)
    assert np.array_equal(table["73KID"], design["subjectim"][subject - 1][ordering - 1])
    assert np.array_equal(table["SESSION"], np.repeat([1, 2, 3, 4], 60))
    assert np.array_equal(table["RUN"][:60], np.repeat(np.arange(1, 13), 5))
    assert np.array_equal(table["TRIAL"][:60], np.tile(np.arange(1, 6), 12))
    seen: set[int] = set()
    for image, old in zip(ordering, table["ISOLD"], strict=True):
        assert old == (image in seen)
        seen.add(int(image))
    assert np.array_equal(table["MEMORYRECENT"].isna(), table["ISOLD"] == 0)


def test_stimulus_table_points_at_trials(tree, design):
    table = pd.read_csv(tree / "nsddata/experiments/nsd/nsd_stim_info_merged.csv", index_col=0)
    assert np.array_equal(table["nsdId"], np.arange(CONFIG.n_stimuli))
    assert set(np.flatnonzero(table["shared1000"])) == set(design["sharedix"][0] - 1)
    ordering = design["masterordering"][0].astype(int)
    for subject in (1, 2, 3):
        own = table[table[f"subject{subject}"] == 1]
        assert set(own["nsdId"] + 1) == set(design["subjectim"][subject - 1].tolist())
        for repeat in range(3):
            trials = own[f"subject{subject}_rep{repeat}"].to_numpy()
            images = design["subjectim"][subject - 1][ordering[trials - 1] - 1]
            assert np.array_equal(images, own["nsdId"] + 1)
        others = table[table[f"subject{subject}"] == 0]
        assert (others[f"subject{subject}_rep0"] == 0).all()


def test_only_images_of_written_subjects_are_rendered(tree, design):
    rows = np.unique(design["subjectim"][:2].astype(int)) - 1
    with h5py.File(tree / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5") as file:
        brick = file["imgBrick"]
        assert (brick.shape, brick.dtype) == ((176, 48, 48, 3), np.uint8)
        assert brick.chunks == (1, 48, 48, 3)
        spread = brick[()].reshape(176, -1).std(axis=1)
    assert np.array_equal(np.flatnonzero(spread > 5), rows)
    assert (np.delete(spread, rows) == 0).all()


def test_truth_follows_the_mask(tree):
    truth = load_truth(tree, 2)
    mask = volume(anatomy(tree, 2) / "roi/nsdgeneral.nii.gz") == 1
    assert np.array_equal(np.stack([truth.i, truth.j, truth.k]), np.nonzero(mask))
    assert truth.ideal.dtype == np.float32
    assert truth.ideal.shape == (32, mask.sum())
    assert all(np.isfinite(value).all() for value in vars(truth).values()
               if isinstance(value, np.ndarray))  # fmt: skip
    with pytest.raises(DataError, match=r"no truth for subject 3"):
        load_truth(tree, 3)


def test_extending_gives_the_same_bytes_as_writing_at_once(tree, tmp_path):
    for order in ([1], [2]), ([2], [1]):
        out = tmp_path / str(order[0][0])
        for subjects in order:
            simulate(CONFIG, out, subjects)
        ours, at_once = files(out), files(tree)
        assert ours.keys() == at_once.keys()
        assert [name for name in ours if ours[name] != at_once[name]] == []


def test_a_current_tree_is_left_alone_and_a_lost_file_is_mended(tree, tmp_path):
    out = simulate(CONFIG, tmp_path / "nsd", [1])
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    simulate(CONFIG, out, [1])
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before
    session(out, 2).unlink()
    simulate(CONFIG, out, [1])
    assert session(out, 2).read_bytes() == session(tree, 2).read_bytes()


def test_every_lost_file_is_noticed_and_written_again(tree, tmp_path):
    out = shutil.copytree(tree, tmp_path / "nsd")
    whole = files(out)
    plan = Tree(out, CONFIG)
    known = {*plan.common_files(), *plan.subject_files(1), *plan.subject_files(2)}
    named = {str(path.relative_to(out)) for path in known}
    assert named == whole.keys() - {"SIMULATED.json"}
    for lost in (plan.common_files(), plan.subject_files(1)):
        for path in lost:
            path.unlink()
            assert generate._unfinished(plan, [1]) == [1], path
        simulate(CONFIG, out, [1])
        now = files(out)
        assert [name for name in whole if now.get(name) != whole[name]] == []


def test_adding_a_subject_keeps_image_fingerprint_and_pixels(tmp_path):
    out = simulate(CONFIG, tmp_path / "nsd", [1])
    store = SubjectStore.open(prepare_nsd(out, 1, tmp_path / "subj01.h5"))
    before = store.open_images()
    fingerprint, pixels = before.fingerprint, before.read(store.images.ids)
    simulate(CONFIG, out, [2])
    after = store.open_images()
    assert after.fingerprint == fingerprint
    np.testing.assert_array_equal(after.read(store.images.ids), pixels)
    second = SubjectStore.open(prepare_nsd(out, 2, tmp_path / "subj02.h5"))
    assert second.image_fingerprint == fingerprint


def test_interruption_leaves_whole_sessions_and_is_continued(tree, tmp_path, monkeypatch):
    out = tmp_path / "nsd"
    draw = generate.session_betas

    def interrupted(config, subject, number, *rest):
        if number == 3:
            raise KeyboardInterrupt
        return draw(config, subject, number, *rest)

    monkeypatch.setattr(generate, "session_betas", interrupted)
    with pytest.raises(KeyboardInterrupt):
        simulate(CONFIG, out, [1])
    monkeypatch.undo()
    assert sorted(p.name for p in session(out, 1).parent.iterdir()) == [
        "betas_session01.hdf5",
        "betas_session02.hdf5",
    ]
    assert json.loads((out / "SIMULATED.json").read_text())["subjects_written"] == []
    simulate(CONFIG, out, [1])
    assert session(out, 3).read_bytes() == session(tree, 3).read_bytes()


def test_another_config_is_refused(tree):
    before = files(tree)
    with pytest.raises(ConfigError, match=r"SIMULATED.json:config.seed: .* 0, now 5"):
        simulate(SimulationConfig.toy(seed=5), tree, [1])
    assert files(tree) == before


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "nsddata").mkdir()
    with pytest.raises(ConfigError, match="real data is never mixed with simulated"):
        simulate(CONFIG, tmp_path, [1])
    assert [p.name for p in tmp_path.iterdir()] == ["nsddata"]


@pytest.mark.parametrize("subjects", [[], [0], [1, 4]])
def test_unknown_subjects_are_refused_before_anything_is_written(tmp_path, subjects):
    with pytest.raises(ChasmError, match="Choose from 1 to 3"):
        simulate(CONFIG, tmp_path / "new", subjects)
    assert not Path(tmp_path / "new").exists()


def test_seed_changes_images_and_betas(tree, tmp_path):
    other = simulate(SimulationConfig.toy(seed=1), tmp_path / "nsd", [1])
    assert session(other, 1).read_bytes() != session(tree, 1).read_bytes()
    stimuli = "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5"
    assert (other / stimuli).read_bytes() != (tree / stimuli).read_bytes()


def test_areas_are_contiguous_in_each_hemisphere():
    cortex = make_cortex(SimulationConfig(), 1)
    neighbours = np.ones((3, 3, 3))
    for name in ("V1v", "V1d", "V2v", "V3d", "hV4", "FFA-1", "EBA", "PPA", "OPA", "VWFA-2"):
        for side in (False, True):
            here = (cortex.area == AREA_NAMES.index(name)) & (cortex.right == side)
            assert here.sum() >= 5, name
            _, pieces = scipy.ndimage.label(cortex.volume(here, False, bool), neighbours)
            assert pieces == 1, (name, side)


def test_the_bytes_do_not_depend_on_the_number_of_threads(tmp_path, monkeypatch):
    from threadpoolctl import threadpool_info, threadpool_limits

    from chasm.data.simulation import generate

    seen = set()

    def watched(*args, **options):
        seen.update(p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas")
        return make_signal(*args, **options)

    make_signal = generate.make_signal
    monkeypatch.setattr(generate, "make_signal", watched)
    with threadpool_limits(2, user_api="blas"):
        simulate(CONFIG, tmp_path / "nsd", [1])
    assert seen == {1}
