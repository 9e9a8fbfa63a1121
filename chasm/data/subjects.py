"""Several subjects at once: a store each, one token cache where they saw the same dataset."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
import numpy as np
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from chasm.data.batches import Batch
from chasm.data.datamodule import NSDDataModule, TokenStatistics
from chasm.errors import ConfigError


class SubjectsDataModule(L.LightningDataModule):
    """Subjects that are trained on together, each with its own voxels, split and sessions.

    A training batch is a dict with a batch of every subject; an epoch lasts as long as the
    subject with the most images, the others begin again. Validation goes through one subject
    after the other.

    Parameters
    ----------
    parts
        Data module of every subject, by name; all of one backbone.

    Raises
    ------
    ConfigError
        There is no subject.
    """

    def __init__(self, parts: Mapping[str, NSDDataModule]) -> None:
        super().__init__()
        if not parts:
            raise ConfigError("subjects", "no subject is named", "Name one or more.")
        self.parts = dict(parts)
        self.dataset_dir = next(iter(parts.values())).dataset_dir

    @property
    def subject(self) -> str:
        """Names of all, as one word: ``subj01+subj02``."""
        return "+".join(self.parts)

    def setup(self, stage: str | None = None) -> None:
        """Check every subject's tokens, and that they are of one size."""
        for part in self.parts.values():
            part.setup(stage)
        first = next(iter(self.parts))
        for name, part in self.parts.items():
            for kind in ("cls", "patches"):
                own = getattr(part.tokens, kind).shape[1:]
                others = getattr(self.parts[first].tokens, kind).shape[1:]
                if own != others:
                    raise ConfigError(
                        f"subjects:{name}",
                        f"its {kind} tokens are {own}, those of {first} {others}",
                        "Extract the tokens of all subjects with one backbone.",
                    )

    def token_statistics(self) -> TokenStatistics:
        """Per-channel statistics of the train images of all subjects, each subject counting once.

        The mean of the subjects' means; the variance around it.
        """
        found = [part.token_statistics() for part in self.parts.values()]

        def pooled(kind: str) -> tuple[np.ndarray, np.ndarray]:
            means = np.stack([getattr(s, f"{kind}_mean") for s in found]).astype(np.float64)
            stds = np.stack([getattr(s, f"{kind}_std") for s in found]).astype(np.float64)
            mean = means.mean(0)
            variance = (stds**2 + (means - mean) ** 2).mean(0)
            return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)

        return TokenStatistics(*pooled("cls"), *pooled("patches"))

    def train_dataloader(self) -> CombinedLoader:
        """Give a batch of every subject per step."""
        loaders = {name: self._of(part).train_dataloader() for name, part in self.parts.items()}
        return CombinedLoader(loaders, "max_size_cycle")

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """Give the validation images of one subject after the other, in the order of `parts`."""
        return [self._of(part).val_dataloader() for part in self.parts.values()]

    def _of(self, part: NSDDataModule) -> NSDDataModule:
        """Let a subject's data module know the trainer and how many are beside it."""
        part.trainer, part.n_beside = self.trainer, len(self.parts)
        return part

    def on_after_batch_transfer(
        self, batch: Batch | dict[str, Batch], dataloader_idx: int
    ) -> Batch | dict[str, Batch]:
        """Tokens travel as float16 and are used as float32."""
        if "betas" in batch:
            part = next(iter(self.parts.values()))
            return part.on_after_batch_transfer(batch, dataloader_idx)  # type: ignore[arg-type]
        return {
            name: self.parts[name].on_after_batch_transfer(own, dataloader_idx)
            for name, own in batch.items()
        }
