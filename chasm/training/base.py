"""What the LightningModules of both stages share: sizes, closed form, metrics, optimiser.

Sizes come from the data when a fit begins, and from the checkpoint when one is loaded;
a recipe never holds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from chasm.data.batches import Batch
from chasm.data.datamodule import DataSizes, NSDDataModule, TokenStatistics
from chasm.errors import ConfigError
from chasm.metrics import EncodingMetrics
from chasm.models.linear_path import LinearPath, best_share
from chasm.models.sites import Site
from chasm.models.tokens import TokenScaler
from chasm.parcellation import Aggregation, Parcellation
from chasm.processes import gather, is_first, n_processes, take_from_first
from chasm.training.closed_form import fit_linear_path
from chasm.training.compilation import compile_networks
from chasm.training.facts import facts_of
from chasm.training.optimisation import make_optimizer

Unit = Literal["parcel", "voxel"]


class EncodingModule(L.LightningModule):
    """Tokens -> units (parcels or voxels): a network, and optionally its closed-form partner.

    Parameters
    ----------
    target
        What a parcel's value is: the plain ``mean`` of its voxels, or the mean of its
        ``top_p`` fraction of largest voxels of that sample (paper).
    top_p
        The fraction.
    token_scaling
        ``standard``: every token channel is standardised by its statistics over the train
        images, kept in the checkpoint; ``none``: as the backbone gives them (paper).
    linear
        ``banded_ridge``: the prediction is a weighted mean of the network's and of banded
        ridge on the same tokens, solved on the train images when the fit begins. The network
        is trained alone, to the responses; the weight is the least-squares one on the
        validation images, at every validation. ``none``: the network alone (paper).
    linear_rank
        Principal components of each token space that the closed form reads; null: all features.
    learning_rate
        Peak of the schedule (AdamW).
    weight_decay
        AdamW's, on matrices only; biases, norms and state-space constants have none.
    warmup
        Fraction of all steps over which the rate rises linearly.
    schedule
        ``cosine`` to zero, or ``constant`` after the warm-up.
    compile
        Whether torch.compile is put on the network when a fit begins. It needs a C++ compiler,
        on CUDA also Triton; the first steps then take a minute or more.
    """

    monitors = (
        "val/loss",
        "val/mse",
        "val/pattern_correlation",
        "val/voxelwise_correlation_mean",
        "val/voxelwise_correlation_median",
    )
    """Validation values that can select a checkpoint."""

    rate_factors: dict[str, float] = {}  # noqa: RUF012 (replaced, never changed)
    """Factor on the learning rate by the beginning of a parameter's name."""

    needs_stage1 = False
    """Whether it builds on a trained Stage 1."""

    needs_source = False
    """Whether it starts from a Stage 1 of other subjects."""

    linear_name = "linear"
    """Beginning of the names of the closed form's sites."""

    share: Tensor

    def __init__(
        self,
        target: Aggregation = "mean",
        top_p: float = 0.7,
        token_scaling: Literal["standard", "none"] = "standard",
        linear: Literal["none", "banded_ridge"] = "none",
        linear_rank: int | None = None,
        learning_rate: float = 3e-4,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        schedule: Literal["cosine", "constant"] = "cosine",
        compile: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < top_p <= 1:
            raise ConfigError("model.top_p", f"{top_p} is no fraction", "Use 0 < top_p <= 1.")
        self.target, self.top_p = target, top_p
        self.token_scaling = token_scaling
        self.linear_kind, self.linear_rank = linear, linear_rank
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup, self.schedule = warmup, schedule
        self.compiled = compile
        self.linear: LinearPath | None = None
        self.cls_site, self.patches_site = Site("features.cls"), Site("features.patches")
        self.parcellation: Parcellation | None = None
        self.sizes: DataSizes | None = None
        self.recipe_settings: dict[str, Any] | None = None
        self.trained_on: dict[str, Any] | None = None
        self._seen: list[tuple[Tensor, ...]] = []

    # What a stage says of itself.

    @property
    def unit(self) -> Unit:
        """What is predicted."""
        raise NotImplementedError

    @property
    def row_name(self) -> str:
        """Name of this model's row in tables."""
        raise NotImplementedError

    def units_of(self, betas: Tensor, how: Aggregation | None = None) -> Tensor:
        """Responses to be predicted: (images, voxels) betas -> (images, units)."""
        raise NotImplementedError

    def network(self, batch: Batch) -> Tensor:
        """Predict (images, units) by the trained network, without the closed form."""
        return self.network_from_streams(self.network_streams(batch))

    def network_streams(self, batch: Batch) -> dict[str, Tensor]:
        """Compute what the network needs of the tokens and depends on one stream alone, by site."""
        raise NotImplementedError

    def network_from_streams(self, streams: Mapping[str, Tensor]) -> Tensor:
        """Predict (images, units) by the network from what `network_streams` gave."""
        raise NotImplementedError

    @property
    def separable(self) -> bool:
        """Whether the global and the local stream are separate until they are fused."""
        raise NotImplementedError

    def make_network(self, sizes: DataSizes, parcellation: Parcellation) -> None:
        """Make the network for these sizes."""
        raise NotImplementedError

    def scalers(self) -> list[tuple[TokenScaler, TokenScaler]]:
        """Scalers of CLS and patch tokens that take the statistics of the train images."""
        raise NotImplementedError

    # Building.

    def build(self, sizes: DataSizes, parcellation: Parcellation) -> None:
        """Make all parts for these sizes; called once, by a fit or by loading a checkpoint."""
        self.sizes, self.parcellation = sizes, parcellation
        self.make_network(sizes, parcellation)
        if self.linear_kind == "banded_ridge":
            self.linear = self.make_linear_path(self.linear_rank, self.linear_name)
            self.register_buffer("share", torch.tensor(0.5))
        self.val_metrics = EncodingMetrics(self.n_units, prefix="val/")

    @property
    def n_units(self) -> int:
        """Parcels or voxels that are predicted."""
        assert self.sizes is not None
        return self.sizes.n_voxels if self.unit == "voxel" else self.sizes.n_parcels

    def make_linear_path(self, rank: int | None, name: str = "linear") -> LinearPath:
        """Make a closed form of these sizes, not solved."""
        assert self.sizes is not None
        cls = self.sizes.n_cls * self.sizes.cls_width
        patches = self.sizes.n_patches * self.sizes.patch_width
        return LinearPath(cls, patches, self.n_units, rank, name)

    @property
    def built(self) -> bool:
        """Whether `build` was called."""
        return self.sizes is not None

    def scale_tokens(self, statistics: TokenStatistics) -> None:
        """Standardise tokens by these train-image statistics from now on."""
        values = {k: torch.from_numpy(v) for k, v in asdict(statistics).items()}
        for cls_scaler, patch_scaler in self.scalers():
            cls_scaler.set_statistics(values["cls_mean"], values["cls_std"])
            patch_scaler.set_statistics(values["patches_mean"], values["patches_std"])

    def configure_model(self) -> None:
        """Build from the data module, unless a checkpoint did or is about to."""
        # Lightning calls this hook without a trainer when it loads a checkpoint.
        if self.built or self._trainer is None:
            return
        data: NSDDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        self.build(data.sizes, data.parcellation)
        self.trained_on = facts_of(data)
        if self.token_scaling == "standard":
            self.scale_tokens(data.token_statistics())

    def on_fit_start(self) -> None:
        """Solve the closed form, unless a checkpoint brought it; compile if the recipe says so."""
        self.solve_closed_form(self.trainer.datamodule)  # type: ignore[attr-defined]
        if self.compiled:
            compile_networks(self.trained_networks(), self.device)

    def trained_networks(self) -> list[nn.Module | None]:
        """List what a training step calls and gradients change."""
        raise NotImplementedError

    def solve_closed_form(self, data: NSDDataModule) -> None:
        """Solve what has a closed form on the train images, unless it is solved.

        Of several processes the first one does, and gives the others its weights.
        """
        if self.linear is None or bool(self.linear.fitted):
            return
        if is_first():
            fit_linear_path(self.linear, data, self._targets_on_cpu, data.seed)
        take_from_first([*self.linear.parameters(), *self.linear.buffers()])

    def _targets_on_cpu(self, betas: Tensor) -> Tensor:
        return self.units_of(betas.to(self.device)).cpu()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the sizes and the parcels, so that a checkpoint stands alone."""
        assert self.sizes is not None
        assert self.parcellation is not None
        checkpoint["sizes"] = asdict(self.sizes)
        checkpoint["parcel_labels"] = self.parcellation.labels.cpu()
        checkpoint["trained_on"] = self.trained_on

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build with the sizes of the checkpoint before its weights are loaded."""
        sizes = DataSizes(**checkpoint["sizes"])
        self.trained_on = checkpoint.get("trained_on")
        if not self.built:
            self.build(sizes, Parcellation(checkpoint["parcel_labels"]))
        elif sizes != self.sizes:
            raise ConfigError(
                "checkpoint",
                f"it was made for {sizes}, the data have {self.sizes}",
                "Use the subject, mask, parcels and backbone it was trained with.",
            )

    def take_stage1(self, stage1: EncodingModule) -> None:
        """Use a trained Stage 1, before `build`.

        Raises
        ------
        ConfigError
            This model builds on none.
        """
        raise ConfigError("stage1", f"{self.row_name} builds on no Stage 1", "Leave the key out.")

    def take_source(self, sources: Sequence[EncodingModule]) -> None:
        """Start from Stage 1 models of other subjects, of one backbone, before `build`.

        Raises
        ------
        ConfigError
            This model starts from none.
        """
        raise ConfigError("source", f"{self.row_name} starts from nothing", "Leave the key out.")

    # Predicting.

    def blend(self, own: Tensor, batch: Batch) -> Tensor:
        """Mix the network's (images, units) with those of the closed form, where there is one."""
        if self.linear is None:
            return own
        linear = self.linear_of(batch)
        return own.to(linear.dtype).lerp(linear, self.share)

    def linear_of(self, batch: Batch) -> Tensor:
        """Predict (images, units) by the closed form, unless the batch has it already."""
        assert self.linear is not None
        known = batch.get("linear")
        return self.linear(batch["cls"], batch["patches"]) if known is None else known

    def streams(self, batch: Batch) -> dict[str, Tensor]:
        """Compute what depends on one stream alone, by site; each tensor is (images, ...).

        Only the sites ``features.*`` are passed here; all others in `from_streams`, so that what
        this gives serves any number of interventions.
        """
        cls, patches = self.cls_site(batch["cls"]), self.patches_site(batch["patches"])
        found = self.network_streams({**batch, "cls": cls, "patches": patches})
        return found if self.linear is None else found | self.linear.streams(cls, patches)

    def from_streams(self, streams: Mapping[str, Tensor]) -> Tensor:
        """Predict (images, units) from what `streams` gave."""
        own = self.network_from_streams(streams)
        if self.linear is None:
            return own
        linear = self.linear.from_streams(streams)
        return own.to(linear.dtype).lerp(linear, self.share)

    def forward(self, batch: Batch) -> Tensor:
        """Predict (images, units)."""
        return self.from_streams(self.streams(batch))

    def rows(self, batch: Batch) -> dict[str, Tensor]:
        """Predictions by the name of their table row, the model's own one first."""
        own = self.network(batch)
        if self.linear is None:
            return {self.row_name: own}
        return {self.row_name: self.blend(own, batch), f"{self.row_name}, network alone": own}

    def gate_of(self, batch: Batch) -> Tensor | None:
        """Shares of global and local stream, (images, 1 | parcels, 2), or None without a gate."""
        return None

    def draws(self, batch: Batch, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw (n, images, units) from a generative model.

        Raises
        ------
        ConfigError
            The model has no latent variable.
        """
        raise ConfigError(
            "draws", f"{self.row_name} has no latent variable", "Take a Stage 2 with a VAE."
        )

    # Steps.

    def log_terms(self, terms: dict[str, Tensor], size: int) -> None:
        """Log training terms, averaged over the epoch; "total" is called loss."""
        values = {"train/" + ("loss" if k == "total" else k): v.detach() for k, v in terms.items()}
        self.log_means(values, size)

    def log_means(self, values: dict[str, Tensor], size: int) -> None:
        """Log means over this process's `size` images; an epoch has the mean over all images."""
        # Lightning takes the mean of the processes' sizes as an integer: the factor keeps it one.
        self.log_dict(
            values, on_step=False, on_epoch=True, batch_size=size * n_processes(), sync_dist=True
        )

    def watch(self, own: Tensor, batch: Batch) -> None:
        """Take a validation batch's prediction by the network into this epoch's scores.

        They are against plain means of the voxels, whatever the training target is.
        """
        target = self.units_of(batch["betas"], "mean")
        if self.linear is None:
            self.val_metrics.update(own, target)
            return
        linear = self.linear_of(batch)
        self._seen.append((target, own.to(linear.dtype), linear))

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the whole validation set."""
        self.log_dict(self.validation_scores(), prog_bar=True)

    def validation_scores(self) -> dict[str, Tensor]:
        """Choose the share of the closed form; give the scores of what was watched and forget it.

        Returns
        -------
        dict
            Scalars by the names they are logged under.
        """
        scores: dict[str, Tensor] = {}
        if self._seen:
            target, own, linear = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
            self._seen.clear()
            self.share.copy_(best_share(gather(target), gather(own), gather(linear)))
            self.val_metrics.update(own.lerp(linear, self.share), target)
            scores["val/share_linear"] = self.share.clone()
        scores |= self.val_metrics.compute()
        self.val_metrics.reset()
        return scores

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a per-step schedule."""
        return make_optimizer(
            self.named_parameters(),
            self.rate_factors,
            int(self.trainer.estimated_stepping_batches),
            self.learning_rate,
            self.weight_decay,
            self.warmup,
            self.schedule,
            str(self.trainer.precision),
        )


def title_of(network: nn.Module | None, default: str) -> str:
    """Name that a network gives itself in tables."""
    return str(getattr(network, "title", default))
