"""LightningModules: loss, metrics and optimiser; no architecture.

Sizes come from the data when a fit begins, and from the checkpoint when one is loaded;
a recipe never holds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from chasm.data.batches import Batch
from chasm.data.datamodule import DataSizes, NSDDataModule, TokenStatistics
from chasm.errors import ConfigError
from chasm.losses import Stage1Loss
from chasm.metrics import EncodingMetrics
from chasm.models.stage1 import DualStreamEncoder, Stage1Output
from chasm.parcellation import Parcellation

Stage1Factory = Callable[[int, int, int, int, int], DualStreamEncoder]
"""(cls_width, n_cls, patch_width, n_patches, n_parcels) -> encoder."""


class Stage1Module(L.LightningModule):
    """Stage 1: tokens -> parcels.

    Parameters
    ----------
    encoder
        Architecture; a recipe names the class and its options, the sizes are filled in.
    loss
        Weighted sum of terms.
    target
        What a parcel's value is: the plain ``mean`` of its voxels, or the mean of its
        ``top_p`` fraction of largest voxels of that sample (paper).
    top_p
        The fraction.
    token_scaling
        ``standard``: every token channel is standardised by its statistics over the train
        images, kept in the checkpoint; ``none``: as the backbone gives them (paper).
    learning_rate
        Peak of the schedule (AdamW).
    weight_decay
        AdamW's, on matrices only; biases, norms and state-space constants have none.
    warmup
        Fraction of all steps over which the rate rises linearly.
    schedule
        ``cosine`` to zero, or ``constant`` after the warm-up.
    """

    monitors = (
        "val/loss",
        "val/mse",
        "val/pattern_correlation",
        "val/voxelwise_correlation_mean",
        "val/voxelwise_correlation_median",
    )
    """Validation values that can select a checkpoint."""

    def __init__(
        self,
        encoder: Stage1Factory = DualStreamEncoder,
        loss: Stage1Loss | None = None,
        target: Literal["mean", "top_p"] = "mean",
        top_p: float = 0.7,
        token_scaling: Literal["standard", "none"] = "standard",
        learning_rate: float = 3e-4,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        schedule: Literal["cosine", "constant"] = "cosine",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if not 0 < top_p <= 1:
            raise ConfigError("model.top_p", f"{top_p} is no fraction", "Use 0 < top_p <= 1.")
        self._factory = encoder
        self.loss = Stage1Loss() if loss is None else loss
        self.target, self.top_p = target, top_p
        self.token_scaling = token_scaling
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup, self.schedule = warmup, schedule
        self.encoder: DualStreamEncoder | None = None
        self.parcellation: Parcellation | None = None
        self.sizes: DataSizes | None = None

    # Building.

    def build(self, sizes: DataSizes, parcellation: Parcellation) -> None:
        """Make the encoder for these sizes; called once, by a fit or by loading a checkpoint."""
        self.sizes, self.parcellation = sizes, parcellation
        self.encoder = self._factory(
            sizes.cls_width, sizes.n_cls, sizes.patch_width, sizes.n_patches, sizes.n_parcels
        )
        self.val_metrics = EncodingMetrics(sizes.n_parcels, prefix="val/")

    def scale_tokens(self, statistics: TokenStatistics) -> None:
        """Standardise tokens by these train-image statistics from now on."""
        values = {k: torch.from_numpy(v) for k, v in asdict(statistics).items()}
        encoder = self._built()
        encoder.cls_scaler.set_statistics(values["cls_mean"], values["cls_std"])
        encoder.patch_scaler.set_statistics(values["patches_mean"], values["patches_std"])

    def configure_model(self) -> None:
        """Build from the data module, unless a checkpoint did or is about to."""
        # Lightning calls this hook without a trainer when it loads a checkpoint.
        if self.encoder is not None or self._trainer is None:
            return
        data: NSDDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        self.build(data.sizes, data.parcellation)
        if self.token_scaling == "standard":
            self.scale_tokens(data.token_statistics())

    def _built(self) -> DualStreamEncoder:
        if self.encoder is None:
            raise RuntimeError(
                "build() was not called: fit with a data module or load a checkpoint"
            )
        return self.encoder

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the sizes and the parcels, so that a checkpoint stands alone."""
        assert self.sizes is not None
        assert self.parcellation is not None
        checkpoint["sizes"] = asdict(self.sizes)
        checkpoint["parcel_labels"] = self.parcellation.labels.cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build with the sizes of the checkpoint before its weights are loaded."""
        sizes = DataSizes(**checkpoint["sizes"])
        if self.encoder is None:
            self.build(sizes, Parcellation(checkpoint["parcel_labels"]))
        elif sizes != self.sizes:
            raise ConfigError(
                "checkpoint",
                f"it was made for {sizes}, the data have {self.sizes}",
                "Use the subject, mask, parcels and backbone it was trained with.",
            )

    # Steps.

    def forward(self, batch: Batch) -> Stage1Output:
        """Predict the parcels of a batch."""
        return self._built()(batch["cls"], batch["patches"])

    def parcels_of(self, betas: Tensor, how: Literal["mean", "top_p"] | None = None) -> Tensor:
        """Parcel values of betas: (images, voxels) -> (images, parcels)."""
        assert self.parcellation is not None
        return self.parcellation.aggregate(betas, how=how or self.target, p=self.top_p)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss on this module's own targets."""
        output, terms = self._terms(batch)
        terms["gate_global"] = output.gate[..., 0].mean()
        shown = {"loss" if name == "total" else name: v.detach() for name, v in terms.items()}
        values = {f"train/{name}": value for name, value in shown.items()}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=len(batch["betas"]))
        return terms["total"]

    def _terms(self, batch: Batch) -> tuple[Stage1Output, dict[str, Tensor]]:
        output = self(batch)
        target = self.parcels_of(batch["betas"])
        response = self._built().embed_parcels(target) if self.loss.weights["contrastive"] else None
        visual = output.visual_embedding
        return output, self.loss(output.parcels, target, visual, response, batch["image_id"])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score against plain parcel means, whatever the training target is."""
        output, terms = self._terms(batch)
        self.log("val/loss", terms["total"], batch_size=len(batch["betas"]), sync_dist=True)
        self.val_metrics.update(output.parcels, self.parcels_of(batch["betas"], "mean"))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole validation set."""
        self.log_dict(self.val_metrics.compute(), prog_bar=True)
        self.val_metrics.reset()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a per-step schedule."""
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for n, p in trained if decays(n, p)], "weight_decay": self.weight_decay},
            {"params": [p for n, p in trained if not decays(n, p)], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        total = max(1, int(self.trainer.estimated_stepping_batches))
        rate = LearningRate(total, self.warmup, self.schedule)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, not to state-space constants and positions."""
    return parameter.ndim >= 2 and name.rsplit(".", 1)[-1] not in ("A_log", "position")


class LearningRate:
    """Factor of the learning rate at a step: linear warm-up, then cosine or constant."""

    def __init__(self, total: int, warmup: float, schedule: str) -> None:
        self.total, self.schedule = total, schedule
        self.rise = max(1, round(total * warmup))

    def __call__(self, step: int) -> float:
        """Return the factor at a step."""
        if step < self.rise:
            return (step + 1) / self.rise
        if self.schedule == "constant":
            return 1.0
        done = (step - self.rise) / max(1, self.total - self.rise)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
