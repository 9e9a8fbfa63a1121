"""The published way of training CHASMBrain, written afresh as what ours is measured against.

The architecture is the paper's (`PublishedEncoder`, `MambaVAE`), with the scan that loops over
time and keeps every state. The way of training is the published code's: an item is a single
trial whose parcels' targets are found in a Python loop, items are collated one by one, noise is
added to the tokens in the data set, correlations are computed by SciPy on the CPU in every step,
Stage 1 runs twice in every step of Stage 2, and AdamW is PyTorch's plain one. Tokens and z-scored
betas are whole float32 arrays in memory, which is faster than the published files.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
import torch
from scipy.stats import pearsonr
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from chasm.data.batches import EncodingDataset
from chasm.data.datamodule import DataSizes
from chasm.models.published import PublishedEncoder
from chasm.models.stage2 import MambaVAE
from chasm.parcellation import Parcellation

Item = dict[str, Tensor]

TOP_P = 0.7
NOISE = 0.1
DROPOUT = 0.4
LEARNING_RATE = 3e-5
WEIGHT_DECAY = 0.01
CLIP = {1: 0.5, 2: 1.0}
"""Largest norm of the gradient, by stage."""


class SingleTrials(Dataset[Item]):
    """One item per trial: its tokens with noise, betas and parcels.

    Parameters
    ----------
    data
        Train images, by trials; tokens and betas are read into memory.
    parcel_size
        Voxels in a parcel, runs of mask order; the remainder has no parcel.
    noise
        Standard deviation of what is added to the tokens.
    """

    def __init__(self, data: EncodingDataset, parcel_size: int, noise: float = NOISE) -> None:
        images, self.row = np.unique(data.image_ids, return_inverse=True)
        self.cls = np.asarray(data.tokens.cls[images], np.float32)
        self.patches = np.asarray(data.tokens.patches[images], np.float32)
        self.betas = data.betas(range(len(data)))
        self.parcel_size, self.noise = parcel_size, noise

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, index: int) -> Item:
        cls = torch.from_numpy(self.cls[self.row[index]])
        patches = torch.from_numpy(self.patches[self.row[index]])
        return {
            "cls": cls + self.noise * torch.randn_like(cls),
            "patches": patches + self.noise * torch.randn_like(patches),
            "betas": torch.from_numpy(self.betas[index]),
            "parcels": torch.from_numpy(top_p_parcels(self.betas[index], self.parcel_size)),
        }


def top_p_parcels(betas: np.ndarray, size: int, p: float = TOP_P) -> np.ndarray:
    """Average the largest fraction of each parcel's voxels, parcel by parcel.

    Parameters
    ----------
    betas
        (voxels,) of one trial.
    size
        Voxels in a parcel.
    p
        The fraction.

    Returns
    -------
    ndarray
        (parcels,) float32.
    """
    parcels = np.zeros(len(betas) // size, np.float32)
    kept = max(1, int(size * p))
    for k in range(len(parcels)):
        voxels = betas[k * size : (k + 1) * size]
        parcels[k] = np.sort(voxels)[::-1][:kept].mean()
    return parcels


# Losses of the published code; images and units are rows and columns.


def stage1_loss(prediction: Tensor, target: Tensor, visual: Tensor, response: Tensor) -> Tensor:
    """Give .7 peak-focused error + .3 (1 - Pearson) + .2 amplitude + .2 InfoNCE."""
    distance = (target - target.mean(0, keepdim=True)).abs()
    weight = 1 + 0.5 * torch.relu(distance - 0.3)
    error = (weight * (prediction - target) ** 2).mean()
    logits = F.normalize(visual, dim=1) @ F.normalize(response, dim=1).T / 0.15
    pairs = torch.arange(len(logits), device=logits.device)
    contrast = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
    return 0.7 * error + _shape_terms(prediction, target) + 0.2 * contrast


def stage2_loss(prediction: Tensor, target: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Give error + .3 (1 - Pearson) + .2 amplitude + .001 divergence of the latent."""
    error = F.mse_loss(prediction, target)
    divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).mean()
    return error + _shape_terms(prediction, target) + 1e-3 * divergence


def _shape_terms(prediction: Tensor, target: Tensor) -> Tensor:
    a = prediction - prediction.mean(1, keepdim=True)
    b = target - target.mean(1, keepdim=True)
    pearson = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)
    amplitude = prediction.std(1, unbiased=False) - target.std(1, unbiased=False)
    return 0.3 * (1 - pearson.mean()) + 0.2 * (amplitude**2).mean()


def correlation(prediction: Tensor, target: Tensor) -> float:
    """Average Pearson's r over the rows, one call of SciPy for each."""
    rows = zip(prediction.detach().cpu().numpy(), target.cpu().numpy(), strict=True)
    return float(np.mean([pearsonr(a, b)[0] for a, b in rows]))


# Training.


class PublishedTraining:
    """What both stages share: the loader, plain AdamW, clipping, metrics on the CPU.

    Parameters
    ----------
    data
        Trials.
    network
        What is trained.
    stage
        1 or 2.
    batch_size
        Trials in a step.
    device
        Where the network runs.
    """

    def __init__(
        self, data: SingleTrials, network: nn.Module, stage: int, batch_size: int,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self.loader = DataLoader(data, batch_size, shuffle=True, drop_last=True)
        self.network = network.to(device).train()
        self.clip, self.device = CLIP[stage], device
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
        )

    def losses(self, batch: Item) -> tuple[Tensor, Tensor, Tensor]:
        """Give loss, prediction and target of a batch."""
        raise NotImplementedError

    def step(self, batch: Item) -> dict[str, float]:
        """Train on a batch of the loader; give its loss and correlation."""
        batch = {name: values.to(self.device) for name, values in batch.items()}
        self.optimizer.zero_grad()
        loss, prediction, target = self.losses(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        self.optimizer.step()
        return {"loss": loss.item(), "correlation": correlation(prediction, target)}

    def run(self) -> Iterator[dict[str, float]]:
        """Train for ever; every item is a step, fetching included."""
        for _ in count():
            for batch in self.loader:
                yield self.step(batch)


class PublishedStage1(PublishedTraining):
    """Stage 1 trained the published way; parameters as for `PublishedTraining`."""

    def __init__(
        self, data: SingleTrials, encoder: PublishedEncoder, batch_size: int, device: str = "cpu"
    ) -> None:
        super().__init__(data, encoder, 1, batch_size, device)

    def losses(self, batch: Item) -> tuple[Tensor, Tensor, Tensor]:
        """Give loss, parcels and their targets."""
        output = self.network(batch["cls"], batch["patches"])
        target = batch["parcels"]
        response = self.network.embed_parcels(target)
        loss = stage1_loss(output.parcels, target, output.visual_embedding, response)
        return loss, output.parcels, target


class PublishedStage2(PublishedTraining):
    """Stage 2 trained the published way, on a frozen `encoder` that runs twice in every step."""

    def __init__(
        self,
        data: SingleTrials,
        encoder: PublishedEncoder,
        decoder: MambaVAE,
        batch_size: int,
        device: str = "cpu",
    ) -> None:
        super().__init__(data, decoder, 2, batch_size, device)
        self.encoder = encoder.to(device).eval().requires_grad_(False)

    def losses(self, batch: Item) -> tuple[Tensor, Tensor, Tensor]:
        """Give loss, voxels and their betas."""
        tokens = batch["cls"], batch["patches"]
        with torch.no_grad():
            parcels = self.encoder(*tokens).parcels
            self.encoder(*tokens)  # once more, for features
        output = self.network(*tokens, parcels)
        loss = stage2_loss(output.voxels, batch["betas"], output.mean, output.log_variance)
        return loss, output.voxels, batch["betas"]


def make_encoder(sizes: DataSizes, **options: int | float | str) -> PublishedEncoder:
    """Make the published Stage 1 with the scan that keeps every state; noise is in the data."""
    settings = {"dropout": DROPOUT, "token_noise": 0.0, "scan": "reference"} | options
    return PublishedEncoder(
        sizes.cls_width, sizes.n_cls, sizes.patch_width, sizes.n_patches, sizes.n_parcels,
        **settings,
    )  # fmt: skip


def make_decoder(
    sizes: DataSizes, parcellation: Parcellation, **options: int | float | str
) -> MambaVAE:
    """Make the published Stage 2 with the scan that keeps every state; noise is in the data."""
    settings = {"dropout": DROPOUT, "token_noise": 0.0, "scan": "reference"} | options
    return MambaVAE(
        sizes.cls_width, sizes.n_cls, sizes.patch_width, sizes.n_patches, parcellation,
        residual_clamp=10.0, **settings,
    )  # fmt: skip
