"""What every model of voxels has in common: tokens and parcel values in, voxels out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from chasm.errors import ConfigError
from chasm.models.tokens import TokenModel
from chasm.parcellation import Parcellation


class Stage2Output(NamedTuple):
    """What Stage 2 gives for a batch of images; a part that a model has not is None."""

    voxels: Tensor
    """(images, voxels), the prediction, z-scored percent signal change."""
    mean: Tensor | None = None
    """(images, d_latent), mean of the latent."""
    log_variance: Tensor | None = None
    """(images, d_latent), log variance of the latent, clamped as `chasm.models.latent` says."""
    holistic: Tensor | None = None
    """(images, voxels), the holistic decoder's prediction, before fusion and amplitude."""
    residual: Tensor | None = None
    """(images, voxels), parcel value plus difference, before fusion and amplitude."""
    amplitude: Tensor | None = None
    """(images, 1), factor on the fused prediction."""


class VoxelDecoder(TokenModel):
    """Base of the models that predict voxels from tokens and parcel values.

    One that can draw has an attribute ``latent`` that is not None.

    Parameters
    ----------
    cls_width, n_cls, patch_width, n_patches, token_noise
        See `TokenModel`.
    parcellation
        Which parcel each voxel belongs to.

    Raises
    ------
    ConfigError
        If a size is below 1.
    """

    title = "stage 2"
    """Name of the row in tables."""

    reads_patches = True
    """Whether single patches matter: where False, their mean, (images, 1, width), does as well."""

    def __init__(
        self,
        cls_width: int,
        n_cls: int,
        patch_width: int,
        n_patches: int,
        parcellation: Parcellation,
        token_noise: float = 0.1,
    ) -> None:
        super().__init__(cls_width, n_cls, patch_width, n_patches, token_noise)
        self.n_parcels, self.n_voxels = parcellation.n_parcels, parcellation.n_voxels

    def forward(
        self,
        cls: Tensor,
        patches: Tensor,
        parcels: Tensor,
        generator: torch.Generator | None = None,
    ) -> Stage2Output:
        """Predict a batch.

        Parameters
        ----------
        cls
            (images, n_cls, cls_width), any floating dtype.
        patches
            (images, n_patches, patch_width), any floating dtype; see `reads_patches`.
        parcels
            (images, parcels), what Stage 1 predicts.
        generator
            Of a latent's samples in training; torch's own where None. In eval mode the latent
            is its mean.
        """
        return self.from_streams(self.streams(cls, patches), parcels, generator)

    def streams(self, cls: Tensor, patches: Tensor) -> dict[str, Tensor]:
        """Compute what depends on one kind of token alone, by site; nothing where none is read.

        Parameters
        ----------
        cls, patches
            As in `forward`.
        """
        return {}

    def from_streams(
        self,
        streams: Mapping[str, Tensor],
        parcels: Tensor,
        generator: torch.Generator | None = None,
    ) -> Stage2Output:
        """Predict a batch from what `streams` gave; see `forward`."""
        raise NotImplementedError

    def draws(
        self,
        cls: Tensor,
        patches: Tensor,
        parcels: Tensor,
        n: int,
        generator: torch.Generator | None = None,
        chunk: int = 32,
    ) -> Tensor:
        """Predict with `n` samples of the latent per image; without gradients.

        Parameters
        ----------
        cls, patches, parcels
            As in `forward`.
        n
            Samples per image.
        generator
            Of the samples; torch's own where None. A seeded one on the CPU gives the same
            latents on every device, whatever the chunk.
        chunk
            Samples decoded at once, which bounds the memory.

        Returns
        -------
        Tensor
            (n, images, voxels).

        Raises
        ------
        ConfigError
            If the model has no latent, or `n` or `chunk` is below 1.
        """
        raise ConfigError(
            "model:d_latent",
            "this Stage 2 has no latent to draw from",
            "Use a MambaVAE with d_latent of 1 or above.",
        )
