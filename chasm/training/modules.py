"""Stage 1's LightningModule: loss, metrics and optimiser; no architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from chasm.data.batches import Batch
from chasm.data.datamodule import DataSizes
from chasm.losses import Stage1Loss
from chasm.models.adapters import NOT_IN_PREDICTION, belongs
from chasm.models.encoder import ParcelEncoder, Stage1Output
from chasm.models.stage1 import DualStreamEncoder
from chasm.models.tokens import TokenScaler
from chasm.parcellation import Aggregation, Parcellation
from chasm.processes import weigh
from chasm.training.base import EncodingModule, Unit, title_of

Stage1Factory = Callable[[int, int, int, int, int], ParcelEncoder]
"""(cls_width, n_cls, patch_width, n_patches, n_parcels) -> encoder."""


class Stage1Module(EncodingModule):
    """Stage 1, or another model of parcels: tokens -> parcels.

    Parameters
    ----------
    encoder
        Architecture; a recipe names the class and its options, the sizes are filled in.
    loss
        Weighted sum of terms.
    **options
        See `EncodingModule`.
    """

    def __init__(
        self,
        encoder: Stage1Factory = DualStreamEncoder,
        loss: Stage1Loss | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.save_hyperparameters()
        self._factory = encoder
        self.loss = Stage1Loss() if loss is None else loss
        self.encoder: ParcelEncoder | None = None

    @property
    def unit(self) -> Unit:
        """A voxel where every voxel is its own parcel, else a parcel."""
        parcels = self.parcellation
        single = parcels is not None and parcels.n_parcels == parcels.n_voxels
        return "voxel" if single else "parcel"

    @property
    def row_name(self) -> str:
        """The encoder's title."""
        return title_of(self.encoder, "stage 1")

    @property
    def unused(self) -> tuple[str, ...]:
        """Parts of the encoder that the loss does not reach."""
        return () if self.loss.weights["contrastive"] else (NOT_IN_PREDICTION,)

    def trained_parameters(self) -> list[nn.Parameter]:
        """Parameters that gradients change, or that a closed form solves."""
        unused = tuple(f"encoder.{part}" for part in self.unused)
        solved = "linear" if self.linear is not None else "-"
        return [
            parameter
            for name, parameter in self.named_parameters()
            if belongs(name, (solved,)) or (parameter.requires_grad and not belongs(name, unused))
        ]

    @property
    def n_trained(self) -> int:
        """Number of `trained_parameters`."""
        return sum(parameter.numel() for parameter in self.trained_parameters())

    def make_network(self, sizes: DataSizes, parcellation: Parcellation) -> None:
        """Make the encoder for these sizes."""
        self.encoder = self._factory(
            sizes.cls_width, sizes.n_cls, sizes.patch_width, sizes.n_patches, sizes.n_parcels
        )

    def trained_networks(self) -> list[nn.Module | None]:
        """Give the encoder."""
        return [self.encoder]

    def scalers(self) -> list[tuple[TokenScaler, TokenScaler]]:
        """Give the encoder's."""
        encoder = self._built()
        return [(encoder.cls_scaler, encoder.patch_scaler)]

    def _built(self) -> ParcelEncoder:
        if self.encoder is None:
            raise RuntimeError(
                "build() was not called: fit with a data module or load a checkpoint"
            )
        return self.encoder

    def encode(self, batch: Batch) -> Stage1Output:
        """Give the network's prediction with its parts."""
        output: Stage1Output = self._built()(batch["cls"], batch["patches"])
        return output

    @property
    def separable(self) -> bool:
        """As the encoder says."""
        return self._built().separable

    def network_streams(self, batch: Batch) -> dict[str, Tensor]:
        """Give the encoder's streams."""
        return self._built().streams(batch["cls"], batch["patches"])

    def network_from_streams(self, streams: Mapping[str, Tensor]) -> Tensor:
        """Predict (images, parcels) from the encoder's streams."""
        return self._built().from_streams(streams).parcels

    def gate_of(self, batch: Batch) -> Tensor | None:
        """Shares of global and local stream, (images, 1 | parcels, 2), or None without a gate."""
        return self.encode(batch).gate

    def units_of(self, betas: Tensor, how: Aggregation | None = None) -> Tensor:
        """Parcel values of betas: (images, voxels) -> (images, parcels)."""
        assert self.parcellation is not None
        return self.parcellation.aggregate(betas, how=how or self.target, p=self.top_p)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of the network on this module's own targets."""
        output, terms = self.terms(batch)
        shown = dict(terms)
        if output.gate is not None:
            shown["gate_global"] = output.gate[..., 0].mean()
        self.log_terms(shown, len(batch["betas"]))
        return weigh(terms["total"], len(batch["betas"]))

    def terms(self, batch: Batch) -> tuple[Stage1Output, dict[str, Tensor]]:
        """Give the network's output and the terms of its loss."""
        output = self.encode(batch)
        target = self.units_of(batch["betas"])
        visual, response = output.visual_embedding, None
        if visual is not None and self.loss.weights["contrastive"]:
            response = self._built().embed_parcels(target)
        return output, self.loss(output.parcels, target, visual, response, batch["image_id"])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Take the batch into the validation scores."""
        output, terms = self.terms(batch)
        self.log_means({"val/loss": terms["total"]}, len(batch["betas"]))
        self.watch(output.parcels, batch)
