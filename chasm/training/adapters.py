"""A new subject on a backbone that was trained on others: ridge head, trained head, LoRA, all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from chasm.data.batches import Batch
from chasm.data.datamodule import DataSizes, NSDDataModule
from chasm.errors import ConfigError
from chasm.losses import Stage1Loss
from chasm.models.adapters import (
    HEAD_SPACES,
    RidgeEncoder,
    add_lora,
    belongs,
    copy_backbone,
    freeze,
)
from chasm.models.stage1 import DualStreamEncoder
from chasm.parcellation import Parcellation
from chasm.training.base import EncodingModule
from chasm.training.checkpoints import build_module, describe_module
from chasm.training.closed_form import responses, solve
from chasm.training.modules import Stage1Module
from chasm.training.sources import check_sources, encoder_of, features_of, fit_head, stage1_of

Arm = Literal["ridge_head", "head", "lora", "full"]

ROW_NAMES: dict[Arm, str] = {
    "ridge_head": "ridge head",
    "head": "trained head",
    "lora": "LoRA",
    "full": "full fine-tuning",
}
"""Table row of every arm."""


class AdapterModule(Stage1Module):
    """A Stage 1 for a new subject that starts from one of other subjects.

    The recipe's top-level key ``source`` says where it comes from; its architecture and its
    scaling of the tokens are kept, and a checkpoint of this module stands alone.

    Parameters
    ----------
    arm
        ``ridge_head``: banded ridge on features of the frozen models, solved on the train images
        when the fit begins, nothing is trained; ``head``: heads are trained on the frozen
        backbone; ``lora``: heads, and low-rank matrices beside the backbone's linear layers;
        ``full``: everything.
    lora_rank, lora_alpha
        Rank of those matrices, and their scale: alpha / rank.
    backbone_rate
        Factor on the learning rate for the backbone in ``full``.
    loss
        Weighted sum of terms.
    **options
        See `EncodingModule`; `linear_rank` also holds for the spaces of a ridge head.
    """

    needs_source = True

    def __init__(
        self,
        arm: Arm = "head",
        lora_rank: int = 8,
        lora_alpha: float = 16.0,
        backbone_rate: float = 0.1,
        loss: Stage1Loss | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            encoder=DualStreamEncoder,  # until there is a source
            loss=loss,
            token_scaling="none",
            **options,
        )
        for name, value in (
            ("lora_rank", lora_rank), ("lora_alpha", lora_alpha), ("backbone_rate", backbone_rate)
        ):  # fmt: skip
            if value <= 0:
                raise ConfigError(f"model.{name}", f"found {value}", "Use a positive number.")
        self.arm = arm
        self.lora_rank, self.lora_alpha = lora_rank, lora_alpha
        self.backbone_rate = backbone_rate
        self._sources: list[Stage1Module] = []
        self.source_description: list[dict[str, Any]] = []
        self._source_facts: list[dict[str, Any] | None] = []

    @property
    def row_name(self) -> str:
        """Name of the arm."""
        return ROW_NAMES[self.arm]

    @property
    def n_trained(self) -> int:
        """Parameters that are trained or solved, a ridge head's among them."""
        solved = self.encoder.head.n_weights if isinstance(self.encoder, RidgeEncoder) else 0
        return super().n_trained + solved

    def take_source(self, sources: Sequence[EncodingModule]) -> None:
        """Start from Stage 1 models of other subjects, of one backbone, before `build`.

        Raises
        ------
        ConfigError
            One is no Stage 1, or an adapter itself.
        """
        self._sources = [stage1_of(source) for source in sources]
        self._source_facts = [source.trained_on for source in self._sources]
        self._factory = self._sources[0]._factory
        kept = self._sources if self.arm == "ridge_head" else self._sources[:1]
        self.source_description = [describe_module(source) for source in kept]

    def make_network(self, sizes: DataSizes, parcellation: Parcellation) -> None:
        """Make the encoder for these sizes, with the source's backbone.

        Raises
        ------
        ConfigError
            There is no source, or it does not go with these data.
        """
        if not self._sources:
            raise ConfigError(
                "source", "an adapter starts from a trained Stage 1",
                "Name its recipe, run or checkpoint.",
            )  # fmt: skip
        if self._trainer is not None:
            if self.arm == "ridge_head" and self.trainer.world_size > 1:
                raise ConfigError(
                    "trainer.devices", "a ridge head is solved, on one device",
                    "Use --trainer.devices 1.",
                )  # fmt: skip
            check_sources(self._sources, self.trainer.datamodule)  # type: ignore[attr-defined]
        encoders = [encoder_of(source) for source in self._sources]
        self._sources = []
        shape = (sizes.cls_width, sizes.n_cls, sizes.patch_width, sizes.n_patches, sizes.n_parcels)
        if self.arm == "ridge_head":
            self.encoder = RidgeEncoder(encoders, *shape, self.linear_rank)
            return
        self.encoder = self._factory(*shape)
        copy_backbone(encoders[0], self.encoder)
        heads = [name for name in self.encoder.head_names if not belongs(name, self.unused)]
        if self.arm == "lora":
            add_lora(self.encoder, self.lora_rank, self.lora_alpha)
            for name in heads:
                self.encoder.get_submodule(name).requires_grad_(True)
        elif self.arm == "head":
            freeze(self.encoder, heads)
        else:
            parts = [name for name, _ in self.encoder.named_children() if name not in self.unused]
            freeze(self.encoder, parts)
            self.rate_factors = {f"encoder.{name}": 1.0 for name in heads}
            self.rate_factors["encoder."] = self.backbone_rate
        self.train(self.training)

    def train(self, mode: bool = True) -> AdapterModule:
        """Set training mode; below trained heads, the backbone stays in eval mode."""
        super().train(mode)
        if self.arm == "head" and self.encoder is not None:
            for name, part in self.encoder.named_modules():
                part.training = mode and belongs(name, self.encoder.head_names)
        return self

    def configure_model(self) -> None:
        """Build from the data module; remember what the source was trained on, too."""
        built = self.built
        super().configure_model()
        if self.trained_on is not None and not built:
            self.trained_on["source"] = self._source_facts

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what describes the source, too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["source"] = self.source_description

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build on the source before the weights are loaded."""
        if not self.built and not self._sources:
            self.take_source([build_module(source) for source in checkpoint["source"]])
        super().on_load_checkpoint(checkpoint)

    # Steps.

    def solve_closed_form(self, data: NSDDataModule) -> None:
        """Solve a ridge head, too, on all images that a fit without validation may use."""
        super().solve_closed_form(data)
        encoder = self.encoder
        if not isinstance(encoder, RidgeEncoder) or bool(encoder.head.fitted):
            return
        given = data.dataset("given")
        features = features_of(encoder.source, data, given.image_ids, HEAD_SPACES, self.device)
        targets = responses(given, self._targets_on_cpu)
        fit = partial(fit_head, seed=data.seed)
        solve(encoder.head, features, np.arange(len(given)), targets, fit)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:  # type: ignore[override]
        """Compute the loss of the network; a ridge head has nothing to train."""
        return None if self.arm == "ridge_head" else super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        """End the fit of a ridge head."""
        if self.arm == "ridge_head":
            self.trainer.should_stop = True

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig | None:  # type: ignore[override]
        """AdamW with a per-step schedule; none for a ridge head."""
        return None if self.arm == "ridge_head" else super().configure_optimizers()
