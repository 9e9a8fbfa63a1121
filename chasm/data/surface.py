"""From a subject's functional volume to fsaverage, by the transform files of NSD.

In ``ppdata/subjXX/transforms`` of NSD, for each hemisphere:

- ``{lh,rh}.func1pt8-to-layerB{1,2,3}.mgz``: for every vertex of the subject's own surface its
  place in the func1pt8mm volume at 25, 50 and 75 % of cortical depth, (vertices, 3) voxel
  coordinates that start at 1; 9999 where the vertex has no place;
- ``{lh,rh}.white-to-fsaverage.mgz``: for every fsaverage vertex (163842) the vertex of the
  subject's surface, counted from 1.

A vertex has a value at a depth when the voxel nearest to it has one, and the mean of the depths
that have one. Cubic splines look beyond the nearest voxel: at the border of the mask, voxels
without a value stand in with that of the nearest voxel that has one. So neither NaN nor zeros
flow into the map, no vertex outside the mask gets a value, and a map without unknown voxels is
that of NSD's own code (cubic, ``nearest`` border, mean over depths).
Source: the NSD data manual and nsdcode (`nsd_mapdata`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from chasm.errors import DataError

HEMISPHERES = ("lh", "rh")
DEPTHS = (1, 2, 3)
NO_PLACE = 9999
FETCH = "Fetch the subject's nsddata/ppdata/subjXX/transforms again"


def transforms_folder(tree: str | Path, subject: int) -> Path:
    """Return the folder of a subject's transform files in an NSD tree."""
    return Path(tree) / f"nsddata/ppdata/subj{subject:02d}/transforms"


def to_fsaverage(
    volume: np.ndarray, transforms: str | Path, *, labels: bool = False
) -> dict[str, np.ndarray]:
    """Sample a volume on both hemispheres of fsaverage.

    Parameters
    ----------
    volume
        (X, Y, Z), in the subject's func1pt8mm space; NaN where there is no value.
    transforms
        Folder of the subject's transform files.
    labels
        The values are labels: sampled at the nearest voxel; where the depths disagree the
        majority wins, and the middle depth where all three differ.

    Returns
    -------
    dict
        ``lh`` and ``rh``, each (fsaverage vertices,) float32, NaN without a value.

    Raises
    ------
    DataError
        If a transform file is missing or damaged, does not go with the others, or no vertex
        lies on a voxel with a value.
    """
    volume = np.asarray(volume, dtype=np.float64)
    known = np.isfinite(volume)
    if volume.ndim != 3 or not known.any():
        raise DataError(
            "surface:volume", f"shape {volume.shape} without a value", "Give a map (X, Y, Z)"
        )
    filled = _filled(volume, known)
    folder = Path(transforms)
    found = {hemi: _hemisphere(filled, known, folder, hemi, labels) for hemi in HEMISPHERES}
    if not any(np.isfinite(values).any() for values in found.values()):
        raise DataError(
            folder, "no vertex lies on a voxel with a value", "Use the transforms of this subject"
        )
    return found


def _hemisphere(
    filled: np.ndarray, known: np.ndarray, folder: Path, hemi: str, labels: bool
) -> np.ndarray:
    paths = [folder / f"{hemi}.func1pt8-to-layerB{depth}.mgz" for depth in DEPTHS]
    places = [_places(path) for path in paths]
    if len({len(p) for p in places}) > 1:
        counts = ", ".join(str(len(p)) for p in places)
        raise DataError(paths[0], f"the three depths have {counts} vertices", FETCH)
    sampled = np.stack([_sample(filled, known, place, labels) for place in places])
    native = _majority(sampled) if labels else _mean_of_known(sampled)
    path = folder / f"{hemi}.white-to-fsaverage.mgz"
    vertex = _read(path).reshape(-1)
    if not len(vertex) or vertex.min() < 1 or vertex.max() > len(native):
        raise DataError(
            path, f"points outside the {len(native)} vertices of {paths[0].name}", FETCH
        )
    return native[vertex.astype(np.int64) - 1].astype(np.float32)


def _places(path: Path) -> np.ndarray:
    """0-based voxel coordinates of every vertex, (vertices, 3), NaN without a place."""
    values = _read(path)
    if values.size != 3 * len(values):
        raise DataError(path, f"shape {values.shape} found, (vertices, 3) expected", FETCH)
    values = values.reshape(len(values), 3, order="F")
    return np.where((values == NO_PLACE).any(axis=1, keepdims=True), np.nan, values - 1)


def _read(path: Path) -> np.ndarray:
    import nibabel as nib

    if not path.is_file():
        raise DataError(path, "no such transform file", FETCH)
    try:
        image: Any = nib.load(path)
        return np.asarray(image.get_fdata())
    except (OSError, EOFError, ValueError, nib.filebasedimages.ImageFileError) as error:
        raise DataError(path, f"not a readable MGH file ({error})", FETCH) from error


def _filled(volume: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Give voxels without a value that of the nearest voxel with one."""
    from scipy.ndimage import distance_transform_edt

    if known.all():
        return volume
    nearest = distance_transform_edt(~known, return_distances=False, return_indices=True)
    return volume[tuple(nearest)]


def _sample(filled: np.ndarray, known: np.ndarray, places: np.ndarray, labels: bool) -> np.ndarray:
    """Value at each place, (vertices,); NaN outside the volume or where nothing is known."""
    from scipy.ndimage import map_coordinates

    last = np.array(filled.shape) - 1
    inside = ((places >= 0) & (places <= last)).all(axis=1)  # False for NaN
    result = np.full(len(places), np.nan)
    nearest = np.floor(places[inside] + 0.5).astype(np.int64)
    if labels:
        values = filled[tuple(nearest.T)]
    else:
        values = map_coordinates(filled, places[inside].T, order=3, mode="nearest")
    result[inside] = np.where(known[tuple(nearest.T)], values, np.nan)
    return result


def _mean_of_known(sampled: np.ndarray) -> np.ndarray:
    """Mean over the depths that have a value, (depths, vertices) -> (vertices,)."""
    there = np.isfinite(sampled)
    count = there.sum(axis=0)
    total = np.where(there, sampled, 0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _majority(sampled: np.ndarray) -> np.ndarray:
    """Label of most depths, (3, vertices) -> (vertices,)."""
    outer, middle, inner = sampled
    middle = np.where(np.isnan(middle), np.where(np.isnan(outer), inner, outer), middle)
    return np.where(outer == inner, outer, middle)
