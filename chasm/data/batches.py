"""What models are given: batches of tokens and betas, fetched whole from memory maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from chasm.data.store import SubjectStore
from chasm.errors import ConfigError
from chasm.features.cache import TokenCache


class Batch(TypedDict):
    """What every model is given.

    Attributes
    ----------
    cls
        CLS tokens, (images, CLS layers, width).
    patches
        Patch tokens, (images, patches, width).
    betas
        Responses, (images, voxels), session-z-scored; the mean over repeats where the
        batch holds images, one presentation where it holds trials.
    image_id
        0-based row of the stimulus file, (images,).
    trial
        0-based row of the store; the image's first presentation where repeats are
        averaged, (images,).
    parcels
        What a frozen Stage 1 predicts, (images, parcels), where that is known; see `KnownImages`.
    linear
        What the closed form predicts, (images, units), where that is known.
    """

    cls: Tensor
    patches: Tensor
    betas: Tensor
    image_id: Tensor
    trial: Tensor
    parcels: NotRequired[Tensor]
    linear: NotRequired[Tensor]


class KnownImages:
    """What a fit computes of images once because it is the same in every epoch.

    Parts of a batch by their name; ``patches`` among them takes the place of the tokens in the
    cache. Empty until `learn`.
    """

    def __init__(self) -> None:
        self.image_ids, self.parts = np.empty(0, np.int64), dict[str, Tensor]()

    def learn(self, image_ids: np.ndarray, parts: dict[str, Tensor]) -> None:
        """Keep (images, ...) parts of these images, whose ids ascend, instead of what was known."""
        self.image_ids, self.parts = image_ids, parts

    def forget(self) -> None:
        """Be empty again."""
        self.learn(np.empty(0, np.int64), {})

    def of(self, image_ids: np.ndarray) -> dict[str, Tensor]:
        """Give the parts of these images, (images, ...) each."""
        rows = torch.from_numpy(np.searchsorted(self.image_ids, image_ids))
        return {name: values[rows] for name, values in self.parts.items()}


class EncodingDataset(Dataset[Batch]):
    """Images (or single trials) with their tokens and z-scored betas, fetched batch-wise.

    Parameters
    ----------
    store, tokens
        Where betas and tokens come from; both are memory-mapped.
    image_ids
        Images to use, (images,).
    mean, std
        Session statistics, (sessions, voxels).
    samples
        ``image_means``: one item per image, its repeats averaged; ``trials``: one item per
        presentation.
    known
        What need not be read or computed again.
    """

    def __init__(
        self,
        store: SubjectStore,
        tokens: TokenCache,
        image_ids: np.ndarray,
        mean: np.ndarray,
        std: np.ndarray,
        samples: Literal["image_means", "trials"],
        known: KnownImages | None = None,
    ) -> None:
        self.store, self.tokens = store, tokens
        self.known = KnownImages() if known is None else known
        self.mean, self.std = mean, std
        trial_images = store.trials["image_id"].to_numpy()
        trials = np.flatnonzero(np.isin(trial_images, image_ids))
        if samples == "trials":
            self.trials = [np.array([t]) for t in trials]
            self.image_ids = trial_images[trials]
        else:
            order = trials[np.argsort(trial_images[trials], kind="stable")]
            self.image_ids, first = np.unique(trial_images[order], return_index=True)
            self.trials = np.split(order, first[1:])

    def __len__(self) -> int:
        return len(self.trials)

    def betas(self, items: Sequence[int] | np.ndarray) -> np.ndarray:
        """Z-scored responses of some items, repeats averaged: (items, voxels) float32."""
        groups = [self.trials[i] for i in items]
        counts = np.array([len(g) for g in groups])
        rows = self.store.zscore(np.concatenate(groups), self.mean, self.std)
        if (counts == 1).all():
            return rows
        # Repeat by repeat: np.add.reduceat along the rows takes 20 times as long.
        starts = np.cumsum(counts) - counts
        sums = rows[starts]
        for repeat in range(1, counts.max()):
            again = counts > repeat
            sums[again] += rows[starts[again] + repeat]
        sums /= counts[:, None].astype(np.float32)
        return sums

    def repeat_betas(self) -> np.ndarray:
        """Every presentation: (items, most repeats, voxels) float32, NaN where there is none."""
        most = max(len(g) for g in self.trials)
        result = np.full((len(self), most, self.store.n_voxels), np.nan, np.float32)
        for row, group in enumerate(self.trials):
            result[row, : len(group)] = self.store.zscore(group, self.mean, self.std)
        return result

    @property
    def repeats(self) -> np.ndarray:
        """Number of presentations behind each item, (items,)."""
        return np.array([len(g) for g in self.trials])

    def __getitems__(self, items: list[int]) -> Batch:
        images = self.image_ids[items]
        known = self.known.of(images)
        if "patches" not in known:
            known["patches"] = torch.from_numpy(np.asarray(self.tokens.patches[images]))
        return Batch(
            cls=torch.from_numpy(np.asarray(self.tokens.cls[images])),
            betas=torch.from_numpy(self.betas(items)),
            image_id=torch.from_numpy(images),
            trial=torch.tensor([int(self.trials[i][0]) for i in items]),
            **known,  # type: ignore[typeddict-item]
        )

    def __getitem__(self, item: int) -> Batch:
        return self.__getitems__([item])


class EpochShuffle(Sampler[int]):
    """A shuffle that depends only on the seed and the epoch, so a resumed run repeats it."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this at the start of every epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        yield from order.tolist()

    def __len__(self) -> int:
        return self.length


class SharedBatches(Sampler[list[int]]):
    """Shares of one process of every batch, for a `DataLoader`'s ``batch_sampler``.

    The batches are those of a single process, each cut into one run of items per process; no item
    is repeated or left out. A last batch with fewer items than processes is joined to the one
    before it.

    Parameters
    ----------
    sampler
        Order of the items; a range for the order of the dataset.
    batch_size
        Items per batch, of all processes together.
    n_processes, rank
        How many processes share, and which one this is.

    Raises
    ------
    ConfigError
        There are more processes than items, or than items of a batch.
    """

    def __init__(
        self, sampler: EpochShuffle | range, batch_size: int, n_processes: int = 1, rank: int = 0
    ) -> None:
        n = len(sampler)
        for where, least in (("data", n), ("data.batch_size", batch_size)):
            if least < n_processes:
                raise ConfigError(
                    where,
                    f"{least} images cannot be shared by {n_processes} processes",
                    "Use fewer devices.",
                )
        self.sampler = sampler
        self.n_processes, self.rank = n_processes, rank
        self.edges = [*range(0, n, batch_size), n]
        if len(self.edges) > 2 and self.edges[-1] - self.edges[-2] < n_processes:
            del self.edges[-2]

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        for first, last in pairwise(self.edges):
            yield np.array_split(order[first:last], self.n_processes)[self.rank].tolist()

    def __len__(self) -> int:
        return len(self.edges) - 1


def whole_batch(batch: Any) -> Any:
    """Collate nothing: the dataset already fetched a whole batch."""
    return batch
