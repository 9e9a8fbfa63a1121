"""Writing a subject store: rows are streamed in, and the file appears only when it is complete."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from chasm.data.images import StoredImages
from chasm.data.store_format import (
    FORMAT,
    FORMAT_VERSION,
    TRIAL_FIELDS,
    VOXEL_FIELDS,
    validate,
)
from chasm.errors import StoreError
from chasm.io import atomic_path

_DTYPES = {"session": np.int16, "run": np.int16, "image_id": np.int64, "repeat": np.int16}
_INDEX_FIELDS = ("i", "j", "k")
_BLOCK_BYTES = 16 << 20


class StoreWriter:
    """Write one subject store; use it as a context manager.

    When the block ends well the file is validated and moved to its name; when it raises,
    nothing is left and an older file is untouched.

    Parameters
    ----------
    path
        The store to make.
    n_trials, n_voxels
        Shape of the betas.
    dtype
        int16 or float32.
    scale
        Stored value / scale is the unit of the responses.
    """

    def __init__(
        self, path: Path, *, n_trials: int, n_voxels: int, dtype: Any, scale: float
    ) -> None:
        self._target = path
        self._shape = (n_trials, n_voxels)
        self._dtype = np.dtype(dtype)
        self._scale = float(scale)
        self._stack = ExitStack()

    def __enter__(self) -> StoreWriter:
        with self._stack:  # which takes everything back if something fails
            self._temporary = self._stack.enter_context(atomic_path(self._target))
            self._create()
            self._stack = self._stack.pop_all()
        return self

    def _create(self) -> None:
        """Begin a file of the present shape."""
        self._row, self._hash = 0, hashlib.sha256()
        self._file = self._stack.enter_context(
            h5py.File(self._temporary, "w", alignment_threshold=4096, alignment_interval=4096)
        )
        # Its place in the file is known at once, so that rows are written without HDF5, which
        # lets one thread in at a time and may be reading.
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        self._betas = self._file.create_dataset(
            "betas", shape=self._shape, dtype=self._dtype, dcpl=layout
        )
        self._betas.attrs["scale"] = self._scale
        self._file.create_group("rois")
        self._file.flush()
        self._offset = self._betas.id.get_offset()
        self._rows = self._stack.enter_context(self._temporary.open("r+b", buffering=0))
        self._claim(int(np.prod(self._shape)) * self._dtype.itemsize)

    def _claim(self, n_bytes: int) -> None:
        """Have the disk's space for the betas now: a full disk is known, and writing is faster."""
        if not hasattr(os, "posix_fallocate"):  # macOS, Windows
            return
        try:
            os.posix_fallocate(self._rows.fileno(), self._offset, n_bytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                return  # a file system without it: rows take their space as they come
            raise StoreError(
                self._target,
                f"its betas take {n_bytes / 1e9:,.1f} GB, and {os.strerror(error.errno).lower()}",
                "Free that much, or write the store elsewhere",
            ) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, traceback)
            return
        with self._stack:
            if self._row != self._shape[0]:
                raise StoreError(
                    f"{self._target}:/betas",
                    f"{self._row} of {self._shape[0]} trials were written",
                    "Append every trial before closing",
                )
            self._file.attrs["fingerprint"] = self._fingerprint()
            validate(self._target, self._file)

    def append(self, rows: np.ndarray) -> None:
        """Add trials: (n, voxels) stored values, in the order of `write_trials`.

        May be called by another thread than the one that uses HDF5.
        """
        rows = np.ascontiguousarray(rows, dtype=self._dtype)
        if self._row + len(rows) > self._shape[0]:
            raise StoreError(
                f"{self._target}:/betas",
                f"more than {self._shape[0]} trials were written",
                "Append as many as were announced",
            )
        self._rows.seek(self._offset + self._row * self._shape[1] * self._dtype.itemsize)
        view = rows.data.cast("B")
        while view:
            view = view[self._rows.write(view) :]
        self._hash.update(rows.data)
        self._row += len(rows)

    def read(self, trials: np.ndarray) -> np.ndarray:
        """Read appended trials by index: (n, voxels); runs of neighbours are read at once."""
        result = np.empty((len(trials), self._shape[1]), self._dtype)
        _read_rows(self._rows.fileno(), self._offset, trials, result)
        return result

    def keep(self, voxels: np.ndarray) -> None:
        """Leave voxels out of the trials appended so far and of all that is written from now on.

        Parameters
        ----------
        voxels
            (voxels,) bool, those to keep. The file is written anew unless it is all of them.
        """
        if voxels.all():
            return
        before, columns, n_rows = self._shape[1], np.flatnonzero(voxels), self._row
        offset = self._offset
        self._rows.close()
        self._file.close()
        with self._temporary.open("rb", buffering=0) as old:
            # The old content stays readable by its handle, and goes with it.
            self._temporary.unlink()
            self._shape = (self._shape[0], len(columns))
            self._create()
            block = max(1, _BLOCK_BYTES // (before * self._dtype.itemsize))
            for start in range(0, n_rows, block):
                trials = np.arange(start, min(start + block, n_rows))
                rows = np.empty((len(trials), before), self._dtype)
                _read_rows(old.fileno(), offset, trials, rows)
                self.append(np.take(rows, columns, axis=1))

    def write_trials(self, **columns: np.ndarray) -> None:
        """Write `session` (1-based), `run`, `image_id` and `repeat` (0-based), each (trials,)."""
        for name in TRIAL_FIELDS:
            self._file[f"trials/{name}"] = np.asarray(columns[name], _DTYPES[name])

    def write_voxels(self, counts: Mapping[str, int], **columns: np.ndarray) -> None:
        """Write the columns of /voxels that are known, each (voxels,), and how many were left out.

        Parameters
        ----------
        counts
            Attributes of the group, e.g. ``n_constant``.
        columns
            Any of `VOXEL_FIELDS`; indices not given become −1, other fields NaN.
        """
        group = self._file.create_group("voxels")
        for name in VOXEL_FIELDS:
            index = name in _INDEX_FIELDS
            values = columns.get(name, np.full(self._shape[1], -1 if index else np.nan))
            group[name] = np.asarray(values, np.int32 if index else np.float32)
        group.attrs.update(counts)

    def write_roi(self, atlas: str, labels: np.ndarray, names: Mapping[int, str]) -> None:
        """Write one atlas: labels (voxels,) −1/0/k and the name of each k."""
        group = self._file.create_group(f"rois/{atlas}")
        group["labels"] = np.asarray(labels, np.int16)
        group.attrs["names"] = json.dumps({str(k): name for k, name in names.items()})

    def write_images(
        self,
        ids: np.ndarray,
        shared: np.ndarray,
        special: np.ndarray,
        source: StoredImages,
    ) -> None:
        """Write which images have trials, (images,) each, and where their pixels are."""
        group = self._file.create_group("images")
        group["ids"] = np.asarray(ids, np.int64)
        group["shared"] = np.asarray(shared, bool)
        group["special"] = np.asarray(special, bool)
        group.attrs.update(
            kind=source.kind,
            path=str(source.path),
            key=source.key,
            fingerprint=source.fingerprint,
            fingerprint_ids=np.asarray(source.sample_ids, np.int64),
        )

    def write_normalisation(
        self, which: str, mean: np.ndarray, std: np.ndarray, image_ids: np.ndarray | None = None
    ) -> None:
        """Write session statistics, (sessions, voxels) each, in units of value / scale."""
        group = self._file.create_group(f"normalisation/{which}")
        group["mean"] = np.asarray(mean, np.float32)
        group["std"] = np.asarray(std, np.float32)
        if image_ids is not None:
            group["image_ids"] = np.asarray(image_ids, np.int64)

    def write_attributes(
        self,
        *,
        affine: np.ndarray | None = None,
        volume_shape: tuple[int, ...] | None = None,
        **attributes: Any,
    ) -> None:
        """Write the root attributes; a store without a volume has shape 0 and a NaN affine."""
        self._file.attrs.update(
            format=FORMAT,
            format_version=FORMAT_VERSION,
            created_by=f"chasm {_chasm_version()}",
            affine=np.full((4, 4), np.nan) if affine is None else np.asarray(affine, float),
            volume_shape=np.asarray(volume_shape or (0, 0, 0), np.int64),
            **attributes,
        )

    def _fingerprint(self) -> str:
        """Digest of betas, scale, trials and the voxels' places."""
        self._hash.update(repr((self._shape, str(self._dtype), self._scale)).encode())
        for name in [f"trials/{n}" for n in TRIAL_FIELDS] + [f"voxels/{n}" for n in VOXEL_FIELDS]:
            self._hash.update(np.ascontiguousarray(self._file[name][:]).data)
        return self._hash.hexdigest()[:32]


def _read_rows(handle: int, offset: int, indices: np.ndarray, rows: np.ndarray) -> None:
    """Fill `rows` (n, width) with the rows of a file that begin at `offset`, by index."""
    width = rows.shape[1] * rows.itemsize
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    edges = [0, *breaks.tolist(), len(indices)]
    for first, last in pairwise(edges if len(indices) else []):
        view = rows[first:last].data.cast("B")
        place = offset + int(indices[first]) * width
        while view:
            n_read = os.preadv(handle, [view], place)
            if not n_read:
                raise EOFError(f"the file ends before row {indices[last - 1]}")
            view, place = view[n_read:], place + n_read


def _chasm_version() -> str:
    try:
        return version("chasm-fmri")
    except PackageNotFoundError:
        return "from a source tree"
