"""Subject store + token cache -> batches (a LightningDataModule)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import lightning as L
import numpy as np
from torch.utils.data import DataLoader

from chasm.data.batches import (
    Batch,
    EncodingDataset,
    EpochShuffle,
    KnownImages,
    SharedBatches,
    whole_batch,
)
from chasm.data.splits import FewShot, Split, few_shot, make_split, training_statistics
from chasm.data.store import SubjectStore
from chasm.errors import ConfigError, DataError
from chasm.features.backbones import BackboneSpec
from chasm.features.cache import TokenCache
from chasm.parcellation import Parcellation, make_parcellation
from chasm.processes import n_cores

log = logging.getLogger(__name__)

MOST_WORKERS, AHEAD = 4, 4
"""Most processes that a loader starts by itself, and batches that each fetches ahead."""


@dataclass
class ParcelOptions:
    """How voxels are grouped into parcels.

    Parameters
    ----------
    kind
        ``sequential``: runs of mask order (paper); ``spatial``: contiguous in space;
        ``atlas``: spatial within the areas of `atlas`.
    size
        Voxels per parcel.
    atlas
        ROI atlas whose borders ``atlas`` respects.
    """

    kind: Literal["sequential", "spatial", "atlas"] = "sequential"
    size: int = 30
    atlas: str = "streams"


@dataclass(frozen=True)
class DataSizes:
    """Sizes that models take from the data, never from a recipe."""

    n_cls: int
    cls_width: int
    n_patches: int
    patch_width: int
    n_voxels: int
    n_parcels: int


@dataclass(frozen=True)
class TokenStatistics:
    """Mean and standard deviation of every token channel over the train images.

    Shapes: cls (CLS layers, width), patches (width,).
    """

    cls_mean: np.ndarray
    cls_std: np.ndarray
    patches_mean: np.ndarray
    patches_std: np.ndarray


class NSDDataModule(L.LightningDataModule):
    """One subject of the Natural Scenes Dataset, or of any dataset in a subject store.

    Parameters
    ----------
    subject
        Number (``1`` is ``subj01``) or name of the store.
    dataset_dir
        Folder with ``<subject>.h5`` (made by `chasm prepare`) and ``tokens/`` (`chasm extract`).
    backbone
        Frozen vision backbone whose tokens are used.
    split
        ``clean``: test = the images everybody saw three times, validation = the other shared
        ones; ``paper``: test = all shared images, validation = 5 % of the train images;
        ``seeded``: random by image, for data without a shared set; ``auto``: ``clean`` where
        images are shared, else ``seeded``.
    split_seed
        Seed of the random parts of a split; null takes the one the store was prepared with.
    statistics
        Session z-scores from ``train`` trials, or from ``all`` trials as in the paper.
    samples
        Train on ``image_means`` (repeats averaged) or on single ``trials``.
    parcels
        Grouping of voxels into parcels.
    batch_size
        Images per batch, of all processes that train together.
    num_workers
        Loader processes; 0 fetches in the main process, which is fast for memory maps. null: 0
        where the CPU trains, whose cores the step needs, else up to 4 that fetch ahead.
    seed
        Seed of the order of the train images.
    few_shot
        Train and validate on so few of the train images; null uses the whole split. Session
        statistics stay those of all train trials, so that responses mean the same at any number.
    """

    def __init__(
        self,
        subject: int | str = 1,
        dataset_dir: str = "data/simulated",
        backbone: BackboneSpec = BackboneSpec(),  # noqa: B008 (frozen)
        split: Literal["auto", "clean", "paper", "seeded"] = "auto",
        split_seed: int | None = None,
        statistics: Literal["train", "all"] = "train",
        samples: Literal["image_means", "trials"] = "image_means",
        parcels: ParcelOptions = ParcelOptions(),  # noqa: B008
        batch_size: int = 32,
        num_workers: int | None = None,
        seed: int = 0,
        few_shot: FewShot | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value is not None and value < least:
                raise ConfigError(f"data.{name}", f"found {value}", f"Use {least} or more.")
        self.subject = subject
        self.dataset_dir = Path(dataset_dir)
        self.backbone = backbone
        self.split_name = split
        self.split_seed = split_seed
        self.statistics = statistics
        self.samples = samples
        self.parcels = parcels
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.few_shot = few_shot
        self.n_beside = 1
        self.known = {"train": KnownImages(), "validation": KnownImages()}

    # What the files say, read when first asked for.

    @property
    def store_path(self) -> Path:
        """The subject store's file: ``<subject>.h5``, or ``subjXX.h5`` for a number."""
        exact = self.dataset_dir / f"{self.subject}.h5"
        return exact if exact.is_file() else self.dataset_dir / f"{subject_name(self.subject)}.h5"

    @property
    def tokens_root(self) -> Path:
        """Where this dataset's token caches are."""
        return self.dataset_dir / "tokens"

    @cached_property
    def store(self) -> SubjectStore:
        """The subject's store; a `StoreError` says what to run when there is none."""
        if not self.store_path.is_file():
            have = sorted(p.stem for p in self.dataset_dir.glob("*.h5"))
            raise DataError(
                self.store_path,
                f"there is no such subject store (here: {', '.join(have) or 'none'})",
                "Make it with `chasm prepare nsd` or `chasm prepare arrays`.",
            )
        return SubjectStore.open(self.store_path)

    @cached_property
    def data_split(self) -> Split:
        """Train, validation and test images."""
        if self.few_shot is None:
            return self.full_split
        presented = self.store.trials["image_id"].to_numpy()
        return few_shot(self.full_split, self.few_shot, presented)

    @cached_property
    def full_split(self) -> Split:
        """The split before any of its train images are left out."""
        name = self.split_name
        if name == "auto":
            name = "clean" if bool(self.store.images.shared.any()) else "seeded"
        return make_split(self.store, name, seed=self.split_seed)

    @cached_property
    def tokens(self) -> TokenCache:
        """The token cache of the backbone over this dataset's images."""
        fingerprint = self.store.image_fingerprint
        cache = TokenCache.find(self.tokens_root, fingerprint, self.backbone)
        if cache is None:
            raise DataError(
                self.tokens_root,
                f"no token cache of {self.backbone.model!r} ({self.backbone.weights}) for the "
                f"images of {self.store_path.name}",
                "Make it with `chasm extract` and the same recipe.",
            )
        return cache

    @cached_property
    def parcellation(self) -> Parcellation:
        """Voxel -> parcel."""
        options, store = self.parcels, self.store
        return make_parcellation(
            options.kind,
            n_voxels=store.n_voxels,
            size=options.size,
            coordinates=None if options.kind == "sequential" else store.coordinates(),
            atlas_labels=store.rois_of(options.atlas).labels if options.kind == "atlas" else None,
        )

    @property
    def sizes(self) -> DataSizes:
        """Sizes that models need."""
        tokens = self.tokens
        return DataSizes(
            n_cls=tokens.cls.shape[1],
            cls_width=tokens.cls.shape[2],
            n_patches=tokens.patches.shape[1],
            patch_width=tokens.patches.shape[2],
            n_voxels=self.store.n_voxels,
            n_parcels=self.parcellation.n_parcels,
        )

    @cached_property
    def normalisation(self) -> tuple[np.ndarray, np.ndarray]:
        """Session mean and standard deviation, each (sessions, voxels), as `statistics` says."""
        if self.statistics == "all":
            return self.store.normalisation("all")
        return training_statistics(self.store, self.full_split)

    def token_statistics(self, block_bytes: int = 2**25) -> TokenStatistics:
        """Per-channel statistics of the train images' tokens: float64 sums over small blocks."""
        ids = self.data_split.train
        row = np.prod(self.tokens.patches.shape[1:]) + np.prod(self.tokens.cls.shape[1:])
        block = max(1, block_bytes // int(8 * row))
        moments: dict[str, np.ndarray] = {}
        for start in range(0, len(ids), block):
            rows = ids[start : start + block]
            for name in ("cls", "patches"):
                values = np.asarray(getattr(self.tokens, name)[rows], np.float64)
                axes = (0,) if name == "cls" else (0, 1)
                n = values.shape[0] * (1 if name == "cls" else values.shape[1])
                sums = np.stack([np.full(values.shape[len(axes) :], n, float), values.sum(axes)])
                sums = np.concatenate([sums, np.square(values).sum(axes)[None]])
                moments[name] = moments.get(name, 0.0) + sums

        def finish(name: str) -> tuple[np.ndarray, np.ndarray]:
            n, total, squares = moments[name]
            mean = total / n
            std = np.sqrt(np.maximum(squares / n - mean**2, 0.0))
            std[std < 1e-6] = 1.0  # a channel that never varies stays at zero
            return mean.astype(np.float32), std.astype(np.float32)

        return TokenStatistics(*finish("cls"), *finish("patches"))

    # Lightning's part.

    def setup(self, stage: str | None = None) -> None:
        """Check that the tokens of the images in use are there and undamaged."""
        split = self.data_split
        needed = [split.train, split.validation] if stage in ("fit", "validate") else [split.test]
        if stage is None:
            needed = [split.train, split.validation, split.test]
        ids = np.concatenate(needed)
        missing = self.tokens.missing(ids)
        if len(missing):
            raise DataError(
                self.tokens.folder,
                f"tokens of {len(missing)} of {len(ids)} images are missing",
                "Finish them with `chasm extract` and the same recipe.",
            )
        self.tokens.verify(ids)

    def dataset(
        self,
        part: Literal["train", "validation", "test", "given"],
        samples: Literal["image_means", "trials"] = "image_means",
        known: KnownImages | None = None,
    ) -> EncodingDataset:
        """Images of one part of the split; repeats are averaged unless `samples` says otherwise.

        ``given`` is what a fit without validation set may use: the train images or, with few
        shots, all of those, validation included. What is `known` is not read.
        """
        mean, std = self.normalisation
        split = self.data_split
        if part == "given":
            few = self.few_shot is not None
            ids = np.concatenate([split.train, split.validation]) if few else split.train
        else:
            ids = getattr(split, part)
        return EncodingDataset(self.store, self.tokens, ids, mean, std, samples, known)

    def _loader(self, data: EncodingDataset, batches: SharedBatches) -> DataLoader[Batch]:
        workers = self.n_workers
        return DataLoader(
            data,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=whole_batch,
            pin_memory=self._on_cuda,
            persistent_workers=workers > 0,
            prefetch_factor=AHEAD if workers else None,
        )

    @property
    def n_workers(self) -> int:
        """Processes of each loader: `num_workers`, or as many as help.

        They read memory maps and touch no device, each on one thread. Those of all processes
        that train here, and of the `n_beside` subjects that are trained on together, leave each
        training process a core.
        """
        if self.num_workers is not None:
            return self.num_workers
        if not self._on_cuda:
            return 0
        training = 1 if self.trainer is None else self.trainer.num_devices
        return max(0, min(MOST_WORKERS, (n_cores() // training - 1) // self.n_beside))

    @property
    def _on_cuda(self) -> bool:
        """Whether batches go to a CUDA device."""
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _shared(self, sampler: EpochShuffle | range) -> SharedBatches:
        """Share batches with the trainer's other processes."""
        trainer = self.trainer
        n, rank = (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)
        return SharedBatches(sampler, self.batch_size, n, rank)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Give the train items, shuffled by (seed, epoch), or this process's share of them."""
        data = self.dataset("train", self.samples, self.known["train"])
        return self._loader(data, self._shared(EpochShuffle(len(data), self.seed)))

    def val_dataloader(self) -> DataLoader[Batch]:
        """Give the validation images, repeats averaged, or this process's share of them."""
        data = self.dataset("validation", known=self.known["validation"])
        return self._loader(data, self._shared(range(len(data))))

    def test_dataloader(self) -> DataLoader[Batch]:
        """Give the test images, repeats averaged; `fit` and `tune` never ask for them."""
        return self.ordered_dataloader("test")

    def ordered_dataloader(self, part: Literal["train", "validation", "test"]) -> DataLoader[Batch]:
        """Give all images of a part in the order of their ids, repeats averaged."""
        data = self.dataset(part)
        return self._loader(data, SharedBatches(range(len(data)), self.batch_size))

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Tokens travel as float16 and are used as float32."""
        batch["cls"] = batch["cls"].float()
        batch["patches"] = batch["patches"].float()
        return batch


def subject_name(subject: int | str) -> str:
    """Name of a store: ``1`` is ``subj01``; names and numbers above 99 stay as they are."""
    text = str(subject)
    return f"subj{int(text):02d}" if text.isdigit() and len(text) <= 2 else text
