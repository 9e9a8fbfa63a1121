"""Maps: one value per voxel, as NIfTI in the subject's volume or as GIFTI on fsaverage.

=====================  ====================================================================
``r2``                 R² on the test images of a tested run, per voxel or, where parcels were
                       predicted, per parcel
``ceiling``            noise ceiling of the same units, in units of R²
``prediction:IMAGE``   predicted responses: of a file of `chasm predict` the image of this
                       name; of a run or an export, those to the image file IMAGE
``roi:ATLAS``          labels of an atlas
=====================  ====================================================================

Voxels without a value, those without a parcel for example, are NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from chasm.data.surface import HEMISPHERES, to_fsaverage
from chasm.errors import ConfigError, DataError
from chasm.evaluation.predictions import PredictionFile
from chasm.inference.encoder import Encoder, read_trained
from chasm.inference.response_file import ResponseFile
from chasm.inference.space import VoxelSpace
from chasm.inference.trained import TrainedModel
from chasm.io import atomic_path
from chasm.metrics import r2
from chasm.noise_ceiling import noise_ceiling

KINDS = "r2, ceiling, prediction:IMAGE or roi:ATLAS"
NIFTI, GIFTI = (".nii.gz", ".nii"), ".func.gii"
_STRUCTURES = {"lh": "CortexLeft", "rh": "CortexRight"}


@dataclass(frozen=True)
class BrainMap:
    """One value per voxel.

    Attributes
    ----------
    values
        (voxels,) float32, NaN without a value.
    space
        The voxels.
    title
        What it shows; begins with SIMULATED where the data are.
    subject
        E.g. ``subj01``.
    labels
        Whether the values are labels.
    """

    values: np.ndarray
    space: VoxelSpace
    title: str
    subject: str
    labels: bool = False


def make_map(
    source: str | Path, what: str, *, row: str | None = None, device: str = "auto"
) -> BrainMap:
    """Make the map of a run, an exported model or a file of predicted responses.

    Parameters
    ----------
    source
        Where the values come from.
    what
        Which; see the module.
    row
        For ``r2``: row of the score table; by default the model's.
    device
        For ``prediction:IMAGE`` of a model.

    Raises
    ------
    ConfigError, DataError
        `what` is unknown, the source does not have it, or it is damaged.
    """
    kind, _, name = what.partition(":")
    known = {"r2": False, "ceiling": False, "prediction": True, "roi": True}
    if known.get(kind) is not bool(name):
        raise ConfigError("map", f"{what!r} is no kind of map", f"Use {KINDS}.")
    source = Path(source)
    if source.suffix in (".h5", ".hdf5"):
        return _of_file(ResponseFile.open(source), kind, name)
    if kind == "prediction":
        return _of_image(source, name, device)
    trained = read_trained(source)
    if kind == "roi":
        return _of_atlas(trained.space, name, trained.title, trained.subject)
    return _of_scores(trained, kind, row)


def _of_file(file: ResponseFile, kind: str, name: str) -> BrainMap:
    title, subject = str(file.attributes["model"]), str(file.attributes["subject"])
    if kind == "roi":
        return _of_atlas(file.space, name, title, subject)
    if kind != "prediction":
        raise ConfigError(
            file.path, f"has no {kind}: it holds predictions only", "Name a tested run."
        )
    return BrainMap(file.voxels_of(name), file.space, f"{title} · {name}", subject)


def _of_image(source: Path, name: str, device: str) -> BrainMap:
    encoder = Encoder.from_checkpoint(source, device)
    found = encoder.predict(Path(name))
    if len(found) != 1:
        raise ConfigError("map", f"{name} holds {len(found)} images", "Name one image.")
    trained = encoder.trained
    title = f"{trained.title} · {Path(name).name}"
    return BrainMap(found.voxels[0], trained.space, title, trained.subject)


def _of_atlas(space: VoxelSpace, atlas: str, title: str, subject: str) -> BrainMap:
    if atlas not in space.rois:
        known = ", ".join(space.rois) or "none"
        raise ConfigError("map", f"no ROI atlas {atlas!r}; there are: {known}", "Name one of them.")
    labels = space.rois[atlas].labels.astype(np.float32)
    return BrainMap(labels, space, f"{title} · {atlas}", subject, labels=True)


def _of_scores(trained: TrainedModel, kind: str, row: str | None) -> BrainMap:
    if trained.run is None:
        raise ConfigError(trained.path, f"an exported model has no {kind}", "Name its tested run.")
    file = PredictionFile.read(trained.run / "predictions.h5")
    if file.info.fingerprints.get("checkpoint") != trained.facts["fingerprints"]["checkpoint"]:
        raise DataError(
            trained.run / "predictions.h5", "is of another checkpoint", "Run `chasm test` again"
        )
    if kind == "ceiling":
        units, label = noise_ceiling(file.units.ncsnr, file.repeats), "noise ceiling"
    else:
        row = row or _own_row(file)
        if row not in file.rows:
            raise ConfigError("map", f"no row {row!r}", f"Use one of: {', '.join(file.rows)}.")
        scores = r2(_tensor(file.rows[row].values), _tensor(file.target), _tensor(file.train_mean))
        units, label = scores.numpy(), f"R² of {row}"
    values = torch.from_numpy(np.asarray(units, dtype=np.float32))
    if file.info.unit == "parcel":
        assert trained.module.parcellation is not None
        values = trained.module.parcellation.expand(values, fill=torch.nan)
    return BrainMap(values.numpy(), trained.space, f"{trained.title} · {label}", trained.subject)


def _own_row(file: PredictionFile) -> str:
    return next(name for name, row in file.rows.items() if row.kind == "model")


def _tensor(values: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float64))


# Files.


def write_map(brain_map: BrainMap, out: str | Path, transforms: Path | None = None) -> list[Path]:
    """Write a map in the format that the name of the file says.

    Parameters
    ----------
    brain_map
        The map.
    out
        ``*.nii.gz`` or ``*.nii``: the subject's volume. ``NAME.func.gii``: fsaverage, as
        ``lh.NAME.func.gii`` and ``rh.NAME.func.gii`` beside it.
    transforms
        For GIFTI: the subject's folder of NSD transform files.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    ConfigError
        The name says no format, or transforms are missing.
    DataError
        The voxels have no place in a volume, or the transforms do not fit.
    """
    out = Path(out)
    if out.name.endswith(NIFTI):
        return [_write(out, _nifti(brain_map))]
    if not out.name.endswith(GIFTI):
        raise ConfigError(out, "says no format", f"Name it *.nii.gz, *.nii or *{GIFTI}.")
    if transforms is None:
        raise ConfigError(
            out, "fsaverage needs NSD's transform files", "Give --nsd TREE or --transforms FOLDER."
        )
    volume = brain_map.space.to_volume(brain_map.values)
    surfaces = to_fsaverage(volume, transforms, labels=brain_map.labels)
    images = {
        out.with_name(f"{hemi}.{out.name}"): _gifti(surfaces[hemi], hemi, brain_map.title)
        for hemi in HEMISPHERES
    }
    return [_write(path, image) for path, image in images.items()]


def _write(path: Path, image: Any) -> Path:
    with atomic_path(path) as temporary:
        nib.save(image, temporary)
    return path


def _nifti(brain_map: BrainMap) -> Any:
    image: Any = nib.Nifti1Image(
        brain_map.space.to_volume(brain_map.values), brain_map.space.affine
    )
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = brain_map.title.encode("ascii", "replace")[:79]
    return image


def _gifti(values: np.ndarray, hemi: str, title: str) -> Any:
    meta = nib.gifti.GiftiMetaData({"Name": title})
    array = nib.gifti.GiftiDataArray(
        values.astype(np.float32), intent="NIFTI_INTENT_NONE", datatype="NIFTI_TYPE_FLOAT32",
        meta=meta,
    )  # fmt: skip
    structure = nib.gifti.GiftiMetaData({"AnatomicalStructurePrimary": _STRUCTURES[hemi]})
    return nib.gifti.GiftiImage(darrays=[array], meta=structure)
