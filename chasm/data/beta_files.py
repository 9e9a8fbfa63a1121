"""Single-trial betas of one NSD session, masked voxels only, from .hdf5 or .nii.gz.

NSD's .hdf5 keeps each voxel's trials in one chunk of its own, so it is read voxel by voxel; a
.nii.gz keeps whole volumes, so it is read in blocks of trials. Neither is ever held as a whole.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from chasm.data.store_format import open_hdf5
from chasm.errors import DataError

_BLOCK_BYTES = 48 << 20
_VOXELS_AT_ONCE = 256
_FETCH = "Fetch this session again"


class SessionReader:
    """Read the betas of the voxels in a mask, one session at a time.

    Parameters
    ----------
    mask
        (X, Y, Z) bool.
    n_trials
        Trials of a session.
    """

    def __init__(self, mask: np.ndarray, n_trials: int) -> None:
        self._mask, self._n_trials = mask, n_trials
        axes = np.nonzero(mask)
        order = np.lexsort(axes)  # that of the file, whose axes are reversed
        self._rows = order.tolist()
        self._chunks = [(0, *zyx) for zyx in np.stack(axes[::-1], axis=1)[order].tolist()]

    def check(self, path: Path) -> None:
        """Check a beta file's form without reading its values.

        Parameters
        ----------
        path
            betas_sessionYY.hdf5 or .nii.gz.

        Raises
        ------
        DataError
            If the file is truncated, its values are not int16, its axes are in another order, or
            it has another number of trials.
        """
        shape = self._mask.shape
        if path.name.endswith(".hdf5"):
            expected = (self._n_trials, *shape[::-1])
            with _open_hdf5(path) as file:
                betas = file["betas"]
                where = f"{path}:betas"
                _check_form(where, betas.shape, betas.dtype, expected, "(trials, Z, Y, X)")
            return
        betas = _open_nifti(path)
        _check_form(path, betas.shape, betas.dtype, (*shape, self._n_trials), "(X, Y, Z, trials)")

    def read(self, path: Path) -> np.ndarray:
        """Read the betas of a session.

        Parameters
        ----------
        path
            betas_sessionYY.hdf5 or .nii.gz.

        Returns
        -------
        np.ndarray
            (voxels, trials) int16, percent signal change × 300; voxels in C order of the mask.

        Raises
        ------
        DataError
            As `check`, or if values cannot be read.
        """
        self.check(path)
        try:
            if not path.name.endswith(".hdf5"):
                return _read_nifti(path, self._mask)
            with _open_hdf5(path) as file:
                return self._read_hdf5(file["betas"])
        except (OSError, EOFError, ValueError, zlib.error) as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(path, f"is damaged or truncated ({line})", _FETCH) from error

    def _read_hdf5(self, betas: h5py.Dataset) -> np.ndarray:
        plain = betas.id.get_create_plist().get_nfilters() == 0
        if betas.chunks == (self._n_trials, 1, 1, 1) and plain:
            return self._read_voxel_chunks(betas)
        if betas.chunks is not None and betas.chunks[1] > 1:
            return _read_trial_blocks(betas, self._mask)
        return _read_slabs(betas, self._mask)

    def _read_voxel_chunks(self, betas: h5py.Dataset) -> np.ndarray:
        """Read one raw chunk per voxel; a chunk that was never written holds zeros."""
        result = np.empty((len(self._rows), self._n_trials), dtype=np.int16)
        raw, read = result.view(np.uint8), betas.id.read_direct_chunk
        for row, chunk in zip(self._rows, self._chunks, strict=True):
            try:
                read(chunk, out=raw[row])
            except (OSError, RuntimeError):
                result[row] = betas[(slice(None), *chunk[1:])]
        return result


def by_trial(betas: np.ndarray) -> np.ndarray:
    """Turn (voxels, trials) into contiguous (trials, voxels), some voxels at a time."""
    result = np.empty(betas.shape[::-1], dtype=betas.dtype)
    for start in range(0, len(betas), _VOXELS_AT_ONCE):
        result[:, start : start + _VOXELS_AT_ONCE] = betas[start : start + _VOXELS_AT_ONCE].T
    return result


def _open_hdf5(path: Path) -> h5py.File:
    file = open_hdf5(path, _FETCH)
    if not isinstance(file.get("betas"), h5py.Dataset):
        names = ", ".join(file) or "nothing"
        file.close()
        raise DataError(f"{path}:betas", f"no such dataset; the file holds {names}", _FETCH)
    return file


def _open_nifti(path: Path) -> Any:
    """Open a beta volume for reading forward in blocks; the handle stays with the result."""
    import nibabel as nib

    try:
        image: Any = nib.Nifti1Image.from_filename(path, keep_file_open=True)
    except (OSError, EOFError, ValueError, zlib.error, nib.filebasedimages.ImageFileError) as error:
        raise DataError(path, f"is no readable NIfTI file ({error})", _FETCH) from error
    slope, intercept = image.dataobj.slope, image.dataobj.inter
    if (slope, intercept) != (1.0, 0.0):
        raise DataError(
            f"{path}:scl_slope",
            f"values are scaled by {slope}, but NSD stores int16 = percent signal change × 300",
            _FETCH,
        )
    return image.dataobj


def _check_form(
    where: object, shape: tuple[int, ...], dtype: Any, expected: tuple[int, ...], axes: str
) -> None:
    shape = tuple(int(n) for n in shape)
    if shape != expected:
        if len(shape) == len(expected) and shape[1:] == expected[1:] and "trials, " in axes:
            problem = f"{shape[0]} trials found, {expected[0]} expected"
        elif shape[:-1] == expected[:-1]:
            problem = f"{shape[-1]} trials found, {expected[-1]} expected"
        elif sorted(shape) == sorted(expected):
            problem = f"axes are in the wrong order: {shape} found, {axes} = {expected} expected"
        else:
            problem = f"shape {shape} found, {axes} = {expected} expected"
        raise DataError(
            where, problem, "Fetch this session again, or use the mask that belongs to it"
        )
    if dtype != np.int16:
        raise DataError(
            where,
            f"{dtype} values found, int16 (percent signal change × 300) expected",
            "Use NSD's own func1pt8mm betas; other responses enter by `chasm prepare arrays`",
        )


def _read_slabs(betas: h5py.Dataset, mask: np.ndarray) -> np.ndarray:
    x, y, z = np.nonzero(mask)
    result = np.empty((len(x), betas.shape[0]), dtype=np.int16)
    for slab in np.unique(z):
        here = z == slab
        result[here] = betas[:, int(slab)][:, y[here], x[here]].T
    return result


def _read_trial_blocks(betas: h5py.Dataset, mask: np.ndarray) -> np.ndarray:
    n_trials, chunk = betas.shape[0], betas.chunks[0]
    block = max(1, _BLOCK_BYTES // (2 * mask.size * chunk)) * chunk
    flat = np.flatnonzero(mask.transpose(2, 1, 0))
    # `flat` runs in C order of (Z, Y, X); put voxels in C order of (X, Y, Z).
    order = np.empty(mask.shape, dtype=np.int64)
    order.transpose(2, 1, 0)[mask.transpose(2, 1, 0)] = np.arange(len(flat))
    flat = flat[order[mask]]
    result = np.empty((len(flat), n_trials), dtype=np.int16)
    for start in range(0, n_trials, block):
        part = betas[start : start + block]
        result[:, start : start + len(part)] = part.reshape(len(part), -1)[:, flat].T
    return result


def _read_nifti(path: Path, mask: np.ndarray) -> np.ndarray:
    betas = _open_nifti(path)
    n_trials = betas.shape[3]
    block = max(1, _BLOCK_BYTES // (2 * mask.size))
    result = np.empty((int(mask.sum()), n_trials), dtype=np.int16)
    for start in range(0, n_trials, block):
        part = np.asarray(betas[..., start : start + block])
        result[:, start : start + part.shape[3]] = part[mask]
    return result
