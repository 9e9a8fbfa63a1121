"""From an NSD tree to one subject store: session by session, masked voxels only.

Memory does not grow with the number of sessions. A voxel that is invalid in any session is kept
out of all of them, and the store is written anew without it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from chasm.data.beta_files import SessionReader, by_trial
from chasm.data.images import FINGERPRINT_IMAGES, Hdf5Images
from chasm.data.nsd import BETA_SCALE, NSDTree, RoiVolume, load_volume
from chasm.data.repeat_noise import recompute_ncsnr
from chasm.data.session_moments import SessionMoments
from chasm.data.store_format import file_facts, is_current, signature
from chasm.data.store_writer import StoreWriter
from chasm.errors import ConfigError, DataError
from chasm.progress import track

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Plan:
    """Everything that is known about a subject before betas are read."""

    tree: NSDTree
    subject: int
    version: str
    mask: np.ndarray
    affine: np.ndarray
    files: dict[int, Path]
    image_ids: np.ndarray
    train: np.ndarray
    images: Hdf5Images

    @property
    def n_trials(self) -> int:
        return self.tree.trials_per_session

    @property
    def session_index(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.files)), self.n_trials)


def prepare_nsd(
    tree: Path,
    subject: int,
    out: Path,
    *,
    version: str = "betas_fithrf_GLMdenoise_RR",
    mask: str = "nsdgeneral",
    sessions: Sequence[int] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the subject store of one NSD subject.

    Parameters
    ----------
    tree
        Folder laid out as NSD's bucket; real or simulated.
    subject
        1 to 8.
    out
        The store to write. Returns at once when it is current; one of the same subject, version
        and tree is made anew when its inputs or options have changed.
    version
        Which betas, NSD's folder name.
    mask
        ROI atlas that selects the voxels: ``nsdgeneral`` those of label 1, any other atlas
        those of labels ≥ 1.
    sessions
        Session numbers, 1-based; default: all whose betas are present.
    overwrite
        Write the store even when it is current, or when something else stands at `out`.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    DataError
        If a file is missing, damaged or of another form. Nothing is written then.
    StoreError
        If the store at `out` is of another data set, subject, beta version or tree.
    """
    out = Path(out)
    plan, roi = _plan(NSDTree(tree), subject, version, mask, sessions)
    made_from = _signature(plan, mask, roi)
    if not overwrite and is_current(out, made_from, _identity(plan)):
        log.info("%s is current", out)
        return out
    reader = SessionReader(plan.mask, plan.n_trials)
    for path in plan.files.values():
        reader.check(path)
    with StoreWriter(
        out,
        n_trials=len(plan.image_ids),
        n_voxels=int(plan.mask.sum()),
        dtype=np.int16,
        scale=BETA_SCALE,
    ) as writer:
        read = _write_betas(plan, reader, writer)
        keep = ~(read.zero | read.constant)
        _check_enough(plan, keep)
        writer.keep(keep)
        read = read.of_kept(keep)
        _write_rest(plan, roi, read, keep, made_from, writer)
    log.info("%s: %d trials, %d voxels", out, len(plan.image_ids), keep.sum())
    return out


def _plan(
    tree: NSDTree, subject: int, version: str, mask: str, sessions: Sequence[int] | None
) -> tuple[_Plan, dict[str, RoiVolume]]:
    """Check everything that can be checked before betas are read."""
    files = _choose_sessions(tree, subject, version, sessions)
    volume = tree.roi(subject, mask)
    wanted = volume.labels == 1 if mask == "nsdgeneral" else volume.labels >= 1
    if not wanted.any():
        rule = "label 1" if mask == "nsdgeneral" else "a label ≥ 1"
        raise DataError(
            tree.roi_folder(subject) / f"{mask}.nii.gz",
            f"no voxel has {rule} (labels: {np.unique(volume.labels)[:8].tolist()})",
            "nsdgeneral keeps label 1, other atlases labels ≥ 1: mend it, or use another --mask",
        )
    roi = {atlas: tree.roi(subject, atlas) for atlas in tree.atlases(subject)}
    for atlas, found in roi.items():
        if found.labels.shape != wanted.shape:
            raise DataError(
                tree.roi_folder(subject) / f"{atlas}.nii.gz",
                f"shape {found.labels.shape} found, {wanted.shape} of the mask expected",
                "Fetch both volumes again, from func1pt8mm",
            )
    image_ids = tree.trial_image_ids(subject, list(files))
    if not tree.stimuli_path.is_file():
        raise DataError(tree.stimuli_path, "no such file", "Fetch nsd_stimuli.hdf5")
    shared = np.sort(tree.design().shared)
    places = np.linspace(0, len(shared) - 1, FINGERPRINT_IMAGES).round().astype(int)
    images = Hdf5Images(tree.stimuli_path, "imgBrick", shared[np.unique(places)].tolist())
    if image_ids.max() >= len(images):
        raise DataError(
            f"{tree.stimuli_path}:imgBrick",
            f"holds {len(images)} images, but subject {subject} saw image id {image_ids.max()}",
            "Use the stimulus file that belongs to this tree's design",
        )
    train = ~np.isin(image_ids, shared)
    few = [
        s for s, part in zip(files, train.reshape(len(files), -1), strict=True) if part.sum() < 2
    ]
    if few:
        raise DataError(
            files[few[0]],
            f"session {few[0]} has fewer than two trials of images that only this subject saw",
            "Leave this session out with --sessions",
        )
    plan = _Plan(tree, subject, version, wanted, volume.affine, files, image_ids, train, images)
    return plan, roi


def _choose_sessions(
    tree: NSDTree, subject: int, version: str, sessions: Sequence[int] | None
) -> dict[int, Path]:
    present = tree.session_files(subject, version)
    if sessions is None:
        missing = set(range(1, max(present) + 1)) - set(present)
        if missing:
            log.warning("subject %d: sessions %s are absent", subject, sorted(missing))
        return present
    if not sessions:
        raise ConfigError("sessions", "is an empty list", "Name at least one, or leave it out")
    for session in sessions:
        if session not in present:
            raise DataError(
                tree.betas_folder(subject, version) / f"betas_session{session:02d}.hdf5",
                f"session {session} is missing; present are {_ranges(list(present))}",
                "Fetch it, or leave it out of --sessions",
            )
    return {session: present[session] for session in sorted(set(sessions))}


def _signature(plan: _Plan, mask: str, roi: dict[str, RoiVolume]) -> str:
    """Digest of the input files and options."""
    tree, subject = plan.tree, plan.subject
    small = [tree.design_path, tree.responses_path(subject)]
    small += [tree.roi_folder(subject) / f"{atlas}.nii.gz" for atlas in roi]
    small.append(tree.betas_folder(subject, plan.version) / "ncsnr.nii.gz")
    names = {atlas: {str(k): v for k, v in volume.names.items()} for atlas, volume in roi.items()}
    return signature(
        {
            "subject": subject,
            "version": plan.version,
            "mask": mask,
            "betas": [file_facts(path) for path in plan.files.values()],
            "files": [file_facts(path) for path in small if path.is_file()],
            "names": names,
            "images": [str(plan.images.path), plan.images.fingerprint],
            "simulated": tree.is_simulated,
            "special": tree.special_images().tolist(),
        }
    )


def _identity(plan: _Plan) -> dict[str, str]:
    """Root attributes that say of what the store is."""
    simulated = plan.tree.is_simulated
    return {
        "subject": f"subj{plan.subject:02d}",
        "dataset": "simulated-nsd" if simulated else "nsd",
        "source": "simulated" if simulated else "nsd",
        "beta_version": plan.version,
        "source_path": str(plan.tree.root),
    }


@dataclass(frozen=True)
class _Read:
    """What was found while the betas were read.

    Attributes
    ----------
    zero, constant
        (mask voxels,) bool: all zero in some session (NSD's mark of an invalid voxel); not zero
        but without variation in some session.
    statistics
        ``train`` (images only this subject saw) and ``all``: mean and standard deviation, each
        (sessions, mask voxels) float32, percent signal change; after `of_kept`, (sessions, voxels).
    """

    zero: np.ndarray
    constant: np.ndarray
    statistics: dict[str, tuple[np.ndarray, np.ndarray]]

    def of_kept(self, keep: np.ndarray) -> _Read:
        """Statistics of the voxels in `keep`, (mask voxels,) bool, only."""
        # Not mean[:, keep], whose rows would not be contiguous.
        statistics = {
            which: (np.compress(keep, mean, axis=1), np.compress(keep, std, axis=1))
            for which, (mean, std) in self.statistics.items()
        }
        return replace(self, statistics=statistics)


def _write_betas(plan: _Plan, reader: SessionReader, writer: StoreWriter) -> _Read:
    """Copy every session's masked betas into the store and take their statistics on the way."""
    shape = (len(plan.files), int(plan.mask.sum()))
    zero, constant = np.zeros((2, shape[1]), dtype=bool)
    statistics = {
        which: (np.empty(shape, np.float32), np.empty(shape, np.float32))
        for which in ("train", "all")
    }
    held_out = ~plan.train.reshape(len(plan.files), -1)

    def write(row: int, betas: np.ndarray) -> None:
        every = SessionMoments.of(betas)
        own = every.without(SessionMoments.of(np.compress(held_out[row], betas, axis=1)))
        zero[every.zero] = True
        constant[every.constant | own.constant] = True
        for which, moments in (("train", own), ("all", every)):
            statistics[which][0][row] = moments.mean / BETA_SCALE
            statistics[which][1][row] = moments.std / BETA_SCALE
        writer.append(by_trial(betas))

    # One session is written while the next one is read; never more than two are in memory.
    with ThreadPoolExecutor(1) as behind:
        last = None
        for row, path in track(list(enumerate(plan.files.values())), "preparing sessions"):
            betas = reader.read(path)
            if last is not None:
                last.result()
            last = behind.submit(write, row, betas)
            del betas
        assert last is not None
        last.result()
    return _Read(zero, constant & ~zero, statistics)


def _check_enough(plan: _Plan, keep: np.ndarray) -> None:
    if keep.mean() < 0.5:
        raise DataError(
            plan.tree.betas_folder(plan.subject, plan.version),
            f"{(~keep).sum()} of {keep.size} voxels of the mask are zero or constant in a session",
            "Use the mask, the betas and the axis order of the same subject and space",
        )
    if not keep.all():
        log.warning("%d of %d voxels are zero or constant: kept out", (~keep).sum(), keep.size)


def _write_rest(
    plan: _Plan,
    roi: dict[str, RoiVolume],
    read: _Read,
    keep: np.ndarray,
    made_from: str,
    writer: StoreWriter,
) -> None:
    """Write everything but the betas."""
    tree, sessions = plan.tree, list(plan.files)
    writer.write_trials(
        session=np.repeat(sessions, plan.n_trials),
        run=tree.trial_runs(sessions),
        image_id=plan.image_ids,
        repeat=tree.design().repeats[tree.trial_indices(sessions)],
    )
    writer.write_normalisation(
        "train", *read.statistics["train"], np.unique(plan.image_ids[plan.train])
    )
    writer.write_normalisation("all", *read.statistics["all"])
    counts = {
        "n_mask": keep.size,
        "n_invalid": int(read.zero.sum()),
        "n_constant": int((~keep & ~read.zero).sum()),
    }
    _write_voxels(plan, keep, read.statistics["all"], counts, writer)
    for atlas, volume in roi.items():
        writer.write_roi(atlas, volume.labels[plan.mask][keep], volume.names)
    writer.write_images(*_image_table(plan), plan.images)
    writer.write_attributes(
        affine=plan.affine,
        volume_shape=plan.mask.shape,
        source_signature=made_from,
        **_identity(plan),
    )


def _image_table(plan: _Plan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids = np.unique(plan.image_ids)
    shared = np.isin(ids, plan.tree.design().shared)
    return ids, shared, np.isin(ids, plan.tree.special_images())


def _write_voxels(
    plan: _Plan,
    keep: np.ndarray,
    statistics: tuple[np.ndarray, np.ndarray],
    counts: dict[str, int],
    writer: StoreWriter,
) -> None:
    """Write places and noise ceilings of the valid voxels."""
    indices = np.argwhere(plan.mask)[keep]
    places = indices @ plan.affine[:3, :3].T + plan.affine[:3, 3]
    ncsnr, facts = recompute_ncsnr(writer, plan.image_ids, plan.session_index, *statistics)
    columns = dict(zip("ijk", indices.T, strict=True)) | dict(zip("xyz", places.T, strict=True))
    columns["ncsnr"] = ncsnr
    path = plan.tree.betas_folder(plan.subject, plan.version) / "ncsnr.nii.gz"
    if path.is_file():
        volume, _ = load_volume(path)
        if volume.shape != plan.mask.shape:
            raise DataError(
                path,
                f"shape {volume.shape} found, {plan.mask.shape} of the mask expected",
                "Fetch it again",
            )
        published = volume[plan.mask][keep]
        columns["ncsnr_published"] = published
        log.info(
            "ncsnr, median over voxels: %.3f here, %.3f published",
            np.nanmedian(ncsnr),
            np.nanmedian(published),
        )
    writer.write_voxels(counts | facts, **columns)


def _ranges(numbers: list[int]) -> str:
    """Write sorted numbers as ranges: [1, 2, 3, 5] → '1–3, 5'."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}–{p[-1]}" for p in parts)
