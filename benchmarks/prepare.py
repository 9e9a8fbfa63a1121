"""Time and memory of `chasm prepare` on a full-size simulated subject in NSD's layout.

    python benchmarks/prepare.py                     # makes 1.6 GB of files in a temporary folder
    python benchmarks/prepare.py --folder FOLDER     # keeps them for the next run

Every run is a fresh process with the beta files in the page cache; imports are not timed, and
memory is the peak of the whole process, imports included. "needed bytes" reads the chunks of the
mask's voxels by h5py's fastest call and does nothing else; "float64 volumes" reads whole sessions
as floating-point numbers, divides by 300, masks and z-scores, as is customary.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import nibabel as nib
import numpy as np
import scipy.io  # noqa: F401  read by `prepare_nsd` later, which would count as its time

from chasm.data.prepare import prepare_nsd
from chasm.memory import keep_freed_memory

if TYPE_CHECKING:
    from measure import Row

# measure.py and nsd_size.py import torch and scipy.ndimage, which are no part of preparing:
# they are imported where the workers do not come.

log = logging.getLogger(__name__)

HDF5, NIFTI = "betas_fithrf_GLMdenoise_RR", "betas_fithrf"
"""Folders of the tree that hold the sessions as .hdf5 and session 1 as .nii.gz."""
SESSIONS = (2, 8, 40)
STORE = "subj01.h5"


def ours(root: Path, version: str, sessions: list[int]) -> None:
    """Prepare a store."""
    prepare_nsd(root, 1, root / STORE, version=version, sessions=sessions, overwrite=True)


def needed_bytes(root: Path, version: str, sessions: list[int]) -> None:
    """Read the voxels of the mask in the order of the file: (voxels, trials)."""
    z, y, x = np.nonzero(_mask(root).T)
    places = list(zip([0] * len(z), z.tolist(), y.tolist(), x.tolist(), strict=True))
    for session in sessions:
        with h5py.File(_session(root, version, session), "r") as file:
            betas = file["betas"]
            result = np.empty((len(places), betas.shape[0]), np.int16)
            raw, read = result.view(np.uint8), betas.id.read_direct_chunk
            for row, place in zip(raw, places, strict=True):
                read(place, out=row)


def decompression(root: Path, version: str, sessions: list[int]) -> None:
    """Read a .nii.gz to its end and keep nothing."""
    for session in sessions:
        with gzip.open(_session(root, version, session)) as stream:
            while stream.read(1 << 24):
                pass


def float64_volumes(root: Path, version: str, sessions: list[int]) -> None:
    """Read whole sessions as float64, then mask and z-score."""
    mask, result = _mask(root), []
    for session in sessions:
        path = _session(root, version, session)
        if path.suffix == ".hdf5":
            with h5py.File(path, "r") as file:
                volumes = file["betas"][:] / 300
            betas = volumes[:, mask.T]
        else:
            betas = nib.load(path).get_fdata()[mask].T / 300
        result.append((betas - betas.mean(axis=0)) / betas.std(axis=0, ddof=1))
    np.concatenate(result)


WAYS: dict[str, Callable[[Path, str, list[int]], None]] = {
    "ours": ours,
    "needed bytes": needed_bytes,
    "decompression": decompression,
    "float64 volumes": float64_volumes,
}


def _mask(root: Path) -> np.ndarray:
    path = root / "nsddata/ppdata/subj01/func1pt8mm/roi/nsdgeneral.nii.gz"
    return np.asarray(nib.load(path).dataobj) == 1


def _session(root: Path, version: str, session: int) -> Path:
    folder = root / f"nsddata_betas/ppdata/subj01/func1pt8mm/{version}"
    return next(folder.glob(f"betas_session{session:02d}.*"))


def work(way: str, root: Path, version: str, n_sessions: int) -> dict[str, float]:
    """Measure one way in this process."""
    for path in (root / "nsddata_betas").rglob("betas_session01.*"):
        with path.open("rb", buffering=0) as stream:  # into the page cache
            while stream.read(1 << 20):
                pass
    keep_freed_memory()  # as the command line does
    before = _peak_mb()
    start = time.perf_counter()
    WAYS[way](root, version, list(range(1, n_sessions + 1)))
    found = {
        "seconds": time.perf_counter() - start, "memory_mb": _peak_mb(), "imports_mb": before
    }  # fmt: skip
    (root / STORE).unlink(missing_ok=True)
    return found


def _peak_mb() -> float:
    """Give the peak of this process's resident memory in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1.024e-3 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(root: Path, quick: bool, rounds: int) -> list[Row]:
    """Measure every case; the ways of a case take turns."""
    import nsd_size
    from measure import Row, apart_in_turns

    from chasm.progress import track

    tree = nsd_size.make_tree(root, quick)
    if not (root / f"nsddata_betas/ppdata/subj01/func1pt8mm/{NIFTI}").is_dir():
        nsd_size.write_nifti_session(tree, tree.betas(1).with_name(NIFTI))
    os.sync()  # what was just written is not to be flushed during a measurement
    cases = [(f"{n} sessions", HDF5, n, ["needed bytes", "ours"]) for n in SESSIONS]
    cases[0][3].append("float64 volumes")
    cases.append(("1 session, .nii.gz", NIFTI, 1, ["decompression", "ours", "float64 volumes"]))
    mask = int(_mask(root).sum())
    rows = []
    for case, version, n, ways in track(cases, "preparing"):
        found: dict[str, Any] = {}
        for group in (ways[:2], ways[2:]):  # whole volumes last, and alone: they fill the memory
            given = {way: ["--worker", way, root, version, n] for way in group}
            try:
                found |= apart_in_turns(__file__, given, rounds if group == ways[:2] else 1)
            except RuntimeError as error:
                if group == ways[:2]:
                    raise
                log.warning("not measured, perhaps for want of memory: %s", error)
                ways = ways[:2]
        for way in ways:
            result = found[way]
            floor = result["seconds"] / found[ways[0]]["seconds"]
            rows.append(
                Row(
                    "prepare", case, way, result["seconds"], result["memory_mb"],
                    reference=None if way != "ours" else ways[2] if len(ways) > 2 else ways[0],
                    bytes=2.0 * mask * tree_trials(quick) * n,
                    note=f"{result['seconds'] / n:.2f} s per session, {floor:.2f} x {ways[0]}",
                )
            )  # fmt: skip
    return rows


def tree_trials(quick: bool) -> int:
    """Give the trials of a session of the tree."""
    return 75 if quick else 750


def main() -> None:
    """Run the benchmark and show the table."""
    if sys.argv[1:2] == ["--worker"]:
        way, root, version, n = sys.argv[2:]
        sys.stdout.write(json.dumps(work(way, Path(root), version, int(n))) + "\n")
        return
    from measure import finish, options

    parser = options(__doc__, repeats=5)
    parser.add_argument("--folder", type=Path, help="where the simulated tree is made and kept")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chasm-prepare-") as folder:
        root = given.folder or Path(folder)
        rows = measure(root, given.quick, 1 if given.quick else given.repeats)
    finish(rows, given)


if __name__ == "__main__":
    main()
