"""Stage 2's LightningModule: a Stage 1 inside, loss, metrics and optimiser; no architecture."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from chasm.data.batches import Batch
from chasm.data.datamodule import DataSizes, NSDDataModule
from chasm.errors import ConfigError
from chasm.losses import Stage2Loss
from chasm.models.decoder import Stage2Output, VoxelDecoder
from chasm.models.sites import Site
from chasm.models.stage2 import MambaVAE
from chasm.models.tokens import TokenScaler
from chasm.parcellation import Aggregation, Parcellation
from chasm.processes import weigh
from chasm.training.base import EncodingModule, Unit, title_of
from chasm.training.checkpoints import build_module, describe_module
from chasm.training.facts import facts_of
from chasm.training.image_cache import learn_images
from chasm.training.modules import Stage1Module

log = logging.getLogger(__name__)

Stage2Factory = Callable[[int, int, int, int, Parcellation], VoxelDecoder]
"""(cls_width, n_cls, patch_width, n_patches, parcellation) -> decoder."""


class Stage2Module(EncodingModule):
    """Stage 2: tokens and the parcels that a trained Stage 1 predicts -> voxels.

    The recipe's top-level key ``stage1`` says where Stage 1 comes from; a checkpoint of this
    module contains it.

    Parameters
    ----------
    decoder
        Architecture; a recipe names the class and its options, the sizes are filled in.
    loss
        Weighted sum of terms.
    stage1_training
        ``frozen`` (paper), or ``joint``: Stage 1's network is trained on, too; the share of its
        closed form stays what it was.
    stage1_rate
        Factor on the learning rate for a jointly trained Stage 1.
    parcel_weight
        Weight of Stage 1's own loss in joint training.
    cache_stage1
        Whether a fit computes once, when it begins, what is the same in every epoch: a frozen
        Stage 1's parcels and the mean patch of all images, and the closed form of validation
        images (see `chasm.training.image_cache`). Steps then read no patch tokens. It has no
        effect in joint training or on a decoder that reads single patches.
    **options
        See `EncodingModule`.
    """

    def __init__(
        self,
        decoder: Stage2Factory = MambaVAE,
        loss: Stage2Loss | None = None,
        stage1_training: Literal["frozen", "joint"] = "frozen",
        stage1_rate: float = 0.1,
        parcel_weight: float = 1.0,
        cache_stage1: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.save_hyperparameters()
        if self.target != "mean":
            raise ConfigError(
                "model.target", f"found {self.target!r}", "Voxels have one value: use mean."
            )
        if stage1_rate <= 0:
            raise ConfigError("model.stage1_rate", f"found {stage1_rate}", "Use a positive number.")
        self._factory = decoder
        self.loss = Stage2Loss() if loss is None else loss
        self.joint = stage1_training == "joint"
        self.parcel_weight = parcel_weight
        self.cache_stage1 = cache_stage1
        self.rate_factors = {"stage1.": stage1_rate}
        self.stage1: Stage1Module | None = None
        self.decoder: VoxelDecoder | None = None
        self.parcels_site = Site("parcels")

    unit: Unit = "voxel"
    needs_stage1 = True
    linear_name = "stage2.linear"

    @property
    def row_name(self) -> str:
        """The decoder's title."""
        return title_of(self.decoder, "stage 2")

    def take_stage1(self, stage1: EncodingModule) -> None:
        """Use this trained Stage 1, which has its weights; before `build`.

        Raises
        ------
        ConfigError
            It does not predict parcels.
        """
        if not isinstance(stage1, Stage1Module):
            raise ConfigError(
                "stage1", f"{stage1.row_name} is no Stage 1", "Name a model of parcels."
            )
        self.stage1 = stage1
        if not self.joint:
            stage1.requires_grad_(False)
        stage1.train(self.training and self.joint)

    def train(self, mode: bool = True) -> Stage2Module:
        """Set training mode; a frozen Stage 1 stays in eval mode."""
        super().train(mode)
        if self.stage1 is not None and not self.joint:
            self.stage1.eval()
        return self

    def make_network(self, sizes: DataSizes, parcellation: Parcellation) -> None:
        """Make the decoder for these sizes.

        Raises
        ------
        ConfigError
            There is no Stage 1, or it was trained on other tokens, voxels or parcels.
        """
        stage1 = self.parcel_model
        if self._trainer is not None:
            check_same_data(stage1, self.trainer.datamodule)  # type: ignore[attr-defined]
        if stage1.sizes != sizes:
            raise ConfigError(
                "stage1",
                f"it was made for {stage1.sizes}, the data have {sizes}",
                "Use the subject, mask, parcels and backbone it was trained with.",
            )
        assert stage1.parcellation is not None
        if not torch.equal(stage1.parcellation.labels.cpu(), parcellation.labels.cpu()):
            raise ConfigError(
                "stage1", "its parcels are other voxels than data.parcels gives", "Use the same."
            )
        self.decoder = self._factory(
            sizes.cls_width, sizes.n_cls, sizes.patch_width, sizes.n_patches, parcellation
        )

    def trained_networks(self) -> list[nn.Module | None]:
        """Give the decoder, and Stage 1's encoder in joint training."""
        return [self.decoder, self.parcel_model.encoder] if self.joint else [self.decoder]

    @property
    def parcel_model(self) -> Stage1Module:
        """The Stage 1 inside; a ConfigError where there is none yet."""
        if self.stage1 is None:
            raise ConfigError(
                "stage1",
                "Stage 2 builds on a trained Stage 1",
                "Name its recipe, run or checkpoint.",
            )
        return self.stage1

    def scalers(self) -> list[tuple[TokenScaler, TokenScaler]]:
        """Give the decoder's; Stage 1 keeps the statistics it was trained with."""
        assert self.decoder is not None
        return [(self.decoder.cls_scaler, self.decoder.patch_scaler)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what describes Stage 1, too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["stage1"] = describe_module(self.parcel_model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build Stage 1, then the rest, before the weights of both are loaded."""
        if self.stage1 is None:
            self.take_stage1(build_module(checkpoint["stage1"]))
        super().on_load_checkpoint(checkpoint)

    def on_fit_start(self) -> None:
        """Solve the closed form, keep a frozen Stage 1 in eval mode, run it once for all epochs."""
        super().on_fit_start()
        self.train(self.training)
        assert self.decoder is not None
        if not self.cache_stage1 or self.joint or self.decoder.reads_patches:
            return
        data: NSDDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        with self.trainer.precision_plugin.forward_context():
            learn_images(data, "train", self.fixed_parts, self.device)
            learn_images(data, "validation", self.fixed_parts_and_linear, self.device)

    def on_fit_end(self) -> None:
        """Free what was known of the images."""
        for known in self.trainer.datamodule.known.values():  # type: ignore[attr-defined]
            known.forget()

    def fixed_parts(self, batch: Batch) -> dict[str, Tensor]:
        """Give the mean patch, (images, 1, width), and what a frozen Stage 1 predicts."""
        return {"patches": batch["patches"].mean(1, keepdim=True), "parcels": self.parcels(batch)}

    def fixed_parts_and_linear(self, batch: Batch) -> dict[str, Tensor]:
        """Give the closed form's prediction, too, where there is one."""
        parts = self.fixed_parts(batch)
        return parts if self.linear is None else parts | {"linear": self.linear_of(batch)}

    # Predicting.

    def units_of(self, betas: Tensor, how: Aggregation | None = None) -> Tensor:
        """Give the voxels themselves, (images, voxels)."""
        return betas

    def parcels(self, batch: Batch) -> Tensor:
        """Stage 1's prediction, (images, parcels), unless the batch has it already."""
        known = batch.get("parcels")
        if known is not None:
            return known
        with torch.set_grad_enabled(self.joint and torch.is_grad_enabled()):
            found: Tensor = self.parcel_model(batch)
        return found

    def decode(self, batch: Batch, parcels: Tensor) -> Stage2Output:
        """Give the network's prediction with its parts, from tokens and parcels."""
        assert self.decoder is not None
        output: Stage2Output = self.decoder(batch["cls"], batch["patches"], parcels)
        return output

    @property
    def separable(self) -> bool:
        """As Stage 1 says."""
        return self.parcel_model.separable

    def network_streams(self, batch: Batch) -> dict[str, Tensor]:
        """Give Stage 1's streams and the decoder's."""
        assert self.decoder is not None
        visual = self.decoder.streams(batch["cls"], batch["patches"])
        return self.parcel_model.streams(batch) | visual

    def network_from_streams(self, streams: Mapping[str, Tensor]) -> Tensor:
        """Predict (images, voxels) from both stages' streams."""
        assert self.decoder is not None
        parcels = self.parcels_site(self.parcel_model.from_streams(streams))
        output: Stage2Output = self.decoder.from_streams(streams, parcels)
        return output.voxels

    def rows(self, batch: Batch) -> dict[str, Tensor]:
        """Predictions by row name; last, Stage 1's parcels given to all their voxels."""
        assert self.parcellation is not None
        parcels = self.parcels(batch)
        own = self.decode(batch, parcels).voxels
        rows = {self.row_name: self.blend(own, batch)}
        if self.linear is not None:
            rows[f"{self.row_name}, network alone"] = own
        rows["stage 1, expanded"] = self.parcellation.expand(parcels)
        return rows

    def gate_of(self, batch: Batch) -> Tensor | None:
        """Stage 1's gate."""
        return self.parcel_model.gate_of(batch)

    def draws(self, batch: Batch, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw (n, images, voxels) with the latent's variance.

        Raises
        ------
        ConfigError
            The decoder has no latent.
        """
        assert self.decoder is not None
        drawn = self.decoder.draws(
            batch["cls"], batch["patches"], self.parcels(batch), n, generator=generator
        )
        return self.blend(drawn, batch)

    # Steps.

    def terms(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Give the network's (images, voxels) and the terms of the loss."""
        if not self.joint:
            output = self.decode(batch, self.parcels(batch))
            found = self.loss(output.voxels, batch["betas"], output.mean, output.log_variance)
            return output.voxels, found
        of_parcels, parcel_terms = self.parcel_model.terms(batch)
        parcels = self.parcel_model.blend(of_parcels.parcels, batch)
        output = self.decode(batch, parcels)
        found = self.loss(output.voxels, batch["betas"], output.mean, output.log_variance)
        found["parcels"] = parcel_terms["total"]
        found["total"] = found["total"] + self.parcel_weight * parcel_terms["total"]
        return output.voxels, found

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of the network on voxels."""
        _, terms = self.terms(batch)
        self.log_terms(terms, len(batch["betas"]))
        return weigh(terms["total"], len(batch["betas"]))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Take the batch into the validation scores."""
        voxels, terms = self.terms(batch)
        self.log_means({"val/loss": terms["total"]}, len(batch["betas"]))
        self.watch(voxels, batch)


def check_same_data(stage1: EncodingModule, data: NSDDataModule) -> None:
    """Refuse a Stage 1 of another subject or tokens, or one that saw images held out here.

    Raises
    ------
    ConfigError
        The subject, store or tokens differ, its train images are among this split's validation
        or test images, or its validation images are among the test images.
    """
    facts, here = stage1.trained_on, facts_of(data)
    if facts is None:
        log.warning("stage1: it does not say what it was trained on; its split is not checked")
        return
    for key in ("subject", "store", "tokens"):
        if facts[key] != here[key]:
            found, wanted = str(facts[key])[:12], str(here[key])[:12]
            problem = f"it was trained on the {key} {found}, this recipe has {wanted}"
            raise ConfigError("stage1", problem, "Train it on the same data.")
    test = torch.from_numpy(data.data_split.test.astype("int64"))
    for seen, held, names in (
        (facts["train"], test, "train images are test images"),
        (facts["validation"], test, "validation images are test images"),
        (facts["train"], here["validation"], "train images are validation images"),
    ):
        n = int(torch.isin(seen, held).sum())
        if n:
            raise ConfigError(
                "stage1", f"{n} of its {names} of this recipe", "Train it with the same split."
            )
