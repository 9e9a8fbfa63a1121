"""`Encoder`: images in, predicted responses of every voxel out."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from chasm.data.batches import Batch
from chasm.errors import ConfigError, DataError
from chasm.features.backbones import Backbone
from chasm.inference.backbone import make_backbone
from chasm.inference.export import is_export, read_export
from chasm.inference.pictures import Picture, pictures_of
from chasm.inference.trained import TrainedModel, checkpoint_of, read_run
from chasm.training.base import EncodingModule
from chasm.training.stage2 import Stage2Module

TOKENS: tuple[Literal["cls", "patches"], ...] = ("cls", "patches")


@dataclass(frozen=True)
class Prediction:
    """Predicted responses to some images.

    Attributes
    ----------
    names
        Of the images: file names, or places in what was given.
    voxels
        (images, voxels) float32, session-z-scored percent signal change. A model of parcels
        gives every voxel its parcel's value, and NaN to voxels without a parcel.
    voxel_table
        One row per voxel: i, j, k, x, y, z, ncsnr and the name of its region in every atlas
        (``roi:<atlas>``); no columns where nothing is known of the voxels.
    parcels
        (images, parcels) float32, where asked for: what a model of parcels, or Stage 1 inside
        a Stage 2, predicts.
    draws
        (n, images, voxels) float32, where asked for.
    """

    names: list[str]
    voxels: np.ndarray
    voxel_table: pd.DataFrame
    parcels: np.ndarray | None = None
    draws: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)


class Encoder:
    """A trained model with its backbone; made by `Encoder.from_checkpoint`.

    Parameters
    ----------
    trained
        The model.
    backbone
        The backbone it was trained on.
    device
        Where both run.
    """

    def __init__(self, trained: TrainedModel, backbone: Backbone, device: torch.device) -> None:
        self.trained = trained
        self.device = device
        self.backbone = backbone.to(device)
        self.module: EncodingModule = trained.module.to(device).eval()
        self.voxel_table = trained.space.table()

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: str = "auto",
        *,
        subject: int | str | None = None,
        backbone_weights: str | None = None,
    ) -> Encoder:
        """Load a model with everything it needs.

        Parameters
        ----------
        path
            Folder of a finished run, one of its checkpoints, or an exported folder.
        device
            ``auto`` (cuda where there is one), ``cpu``, ``cuda``, ``cuda:1``.
        subject
            Refuse a model of another subject than this one.
        backbone_weights
            File of the backbone's weights, if it is no longer where it was.

        Raises
        ------
        DataError
            There is no such model, or it is damaged.
        ConfigError
            It is of another subject, or its backbone cannot be had as it was.
        """
        place = _device(device)
        trained = read_trained(path)
        trained.require_subject(subject)
        return cls(trained, make_backbone(trained, backbone_weights), place)

    def predict(
        self,
        images: Any,
        batch_size: int = 32,
        draws: int = 0,
        parcels: bool = False,
        seed: int = 0,
    ) -> Prediction:
        """Predict the responses to images.

        Parameters
        ----------
        images
            Paths (of files or of folders), NumPy arrays, PIL images, tensors, or a sequence of
            these, of any size; see `chasm.inference.pictures.pictures_of`.
        batch_size
            Images at once; changes the result by rounding only.
        draws
            Samples per image from the latent of a Stage 2; they depend on the seed and on the
            image's pixels, not on what stands beside it.
        parcels
            Give parcels, too.
        seed
            Of the draws.

        Raises
        ------
        DataError
            An image cannot be read, or has no one reading as 8-bit RGB.
        ConfigError
            Draws of a model without a latent, or a number that makes no sense.
        """
        blocks = list(self.stream(pictures_of(images), batch_size, draws, parcels, seed))
        return Prediction(
            [name for block in blocks for name in block.names],
            np.concatenate([block.voxels for block in blocks]),
            self.voxel_table,
            np.concatenate([block.parcels for block in blocks]) if parcels else None,
            np.concatenate([block.draws for block in blocks], axis=1) if draws else None,
        )

    def stream(
        self,
        pictures: Sequence[Picture],
        batch_size: int = 32,
        draws: int = 0,
        parcels: bool = False,
        seed: int = 0,
        refused: dict[str, str] | None = None,
    ) -> Iterator[Prediction]:
        """Predict batch by batch, so that memory does not grow with the number of images.

        Parameters
        ----------
        pictures, batch_size, draws, parcels, seed
            As in `predict`.
        refused
            Takes the name of each image that cannot be used, and why, instead of an error.
        """
        if batch_size < 1 or draws < 0:
            raise ConfigError(
                "predict", f"batch_size {batch_size}, draws {draws}", "Use 1 or more, 0 or more."
            )
        starts = range(0, len(pictures), batch_size)
        found = (_read(pictures[start : start + batch_size], refused) for start in starts)
        return (
            self._predict(names, pixels, draws, parcels, seed) for names, pixels in found if names
        )

    @torch.inference_mode()
    def _predict(
        self, names: list[str], pixels: list[np.ndarray], draws: int, parcels: bool, seed: int
    ) -> Prediction:
        batch = self._tokens(names, pixels)
        own = self.module(batch)
        return Prediction(
            names,
            _numbers(self._voxels(own)),
            self.voxel_table,
            _numbers(self._parcels(batch, own)) if parcels else None,
            _numbers(self._draws(batch, pixels, draws, seed)) if draws else None,
        )

    def _tokens(self, names: list[str], pixels: list[np.ndarray]) -> Batch:
        """Tokens as the cache holds them: the model was trained on float16."""
        tokens = self.backbone(self.backbone.preprocess(pixels).to(self.device))
        halves = {name: getattr(tokens, name).half() for name in TOKENS}
        for values in halves.values():
            finite = values.isfinite().flatten(1).all(1)
            if not bool(finite.all()):
                raise DataError(
                    f"image {names[int((~finite).nonzero()[0])]}",
                    "its tokens do not fit float16, on which the model was trained",
                    "Leave it out",
                )
        return cast(Batch, {name: values.float() for name, values in halves.items()})

    def _voxels(self, own: Tensor) -> Tensor:
        """(..., units) -> (..., voxels)."""
        if self.module.unit == "voxel":
            return own
        assert self.module.parcellation is not None
        return self.module.parcellation.expand(own, fill=torch.nan)

    def _parcels(self, batch: Batch, own: Tensor) -> Tensor:
        return self.module.parcels(batch) if isinstance(self.module, Stage2Module) else own

    def _draws(self, batch: Batch, pixels: list[np.ndarray], n: int, seed: int) -> Tensor:
        """(n, images, voxels), each image with a generator of its own."""
        parts = []
        for row, image in enumerate(pixels):
            part = {name: batch[name][row : row + 1] for name in TOKENS}
            generator = torch.Generator().manual_seed(_seed_of(image, seed))
            parts.append(self.module.draws(cast(Batch, part), n, generator))
        return self._voxels(torch.cat(parts, dim=1))


def read_trained(path: str | Path) -> TrainedModel:
    """Read a model from a run's folder, one of its checkpoints, or an exported folder.

    Raises
    ------
    DataError
        There is none, or it is damaged.
    """
    path = Path(path)
    with warnings.catch_warnings():
        # Lightning's advice on saving hyper-parameters is for those who write modules.
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        if is_export(path):
            return read_export(path)
        checkpoint = checkpoint_of(path)
        if checkpoint is not None:
            return read_run(checkpoint)
    official = path.suffix in (".pth", ".pt")
    raise DataError(
        path,
        "is no trained model" if path.exists() else "no such file or folder",
        "Turn a checkpoint of the published code into one by `chasm convert-official`"
        if official
        else "Name the folder of a finished run, one of its checkpoints, or an exported folder",
    )


def _read(
    pictures: Sequence[Picture], refused: dict[str, str] | None
) -> tuple[list[str], list[np.ndarray]]:
    names, pixels = [], []
    for picture in pictures:
        try:
            pixels.append(picture.read())
            names.append(picture.name)
        except DataError as error:
            if refused is None:
                raise
            refused[picture.name] = error.problem
    return names, pixels


def _numbers(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()


def _seed_of(image: np.ndarray, seed: int) -> int:
    """Mix an image's pixels and a seed into 32 bits, all that torch's generator takes in."""
    mixed = hashlib.sha256(f"{seed} {image.shape} ".encode() + image.tobytes()).digest()
    return int.from_bytes(mixed[:4], "little")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        line = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            "device", f"{name!r} cannot be used ({line})", "Use auto or cpu"
        ) from error
    return device
