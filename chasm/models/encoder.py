"""What every model of parcels has in common: tokens in, parcels out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from chasm.errors import ConfigError
from chasm.models.checks import check_sizes
from chasm.models.tokens import TokenModel


class Stage1Output(NamedTuple):
    """What a model of parcels gives for a batch of images; a part that it has not is None."""

    parcels: Tensor
    """(images, parcels), the prediction, z-scored percent signal change."""
    global_parcels: Tensor | None = None
    """(images, parcels), the global stream's prediction."""
    local_parcels: Tensor | None = None
    """(images, parcels), the local stream's prediction."""
    gate: Tensor | None = None
    """(images, 1 or parcels, 2), shares of the global and of the local stream; they sum to 1."""
    global_features: Tensor | None = None
    """(images, d_model), pooled tokens of the global stream."""
    local_features: Tensor | None = None
    """(images, d_model), pooled tokens of the local stream."""
    visual_embedding: Tensor | None = None
    """(images, d_embedding), for the contrastive loss; not normalised."""


class ParcelEncoder(TokenModel):
    """Base of the models that predict parcels from CLS and patch tokens.

    Parameters
    ----------
    cls_width, n_cls, patch_width, n_patches, token_noise
        See `TokenModel`.
    n_parcels
        Parcels to predict.

    Raises
    ------
    ConfigError
        If a size is below 1.
    """

    title = "stage 1"
    """Name of the row in tables."""

    separable = False
    """Whether the global and the local stream are separate until they are fused."""

    head_names: tuple[str, ...] = ()
    """Submodules that belong to a subject; all other parts are the backbone of any subject."""

    def __init__(
        self,
        cls_width: int,
        n_cls: int,
        patch_width: int,
        n_patches: int,
        n_parcels: int,
        token_noise: float = 0.1,
    ) -> None:
        super().__init__(cls_width, n_cls, patch_width, n_patches, token_noise)
        check_sizes(n_parcels=n_parcels)
        self.n_parcels = n_parcels

    def forward(self, cls: Tensor, patches: Tensor) -> Stage1Output:
        """Predict a batch.

        Parameters
        ----------
        cls
            (images, n_cls, cls_width), any floating dtype.
        patches
            (images, n_patches, patch_width), any floating dtype.
        """
        return self.from_streams(self.streams(cls, patches))

    def streams(self, cls: Tensor, patches: Tensor) -> dict[str, Tensor]:
        """Compute what depends on one stream alone, by site; here nothing: the tokens themselves.

        Parameters
        ----------
        cls, patches
            As in `forward`.
        """
        return {"features.cls": cls, "features.patches": patches}

    def from_streams(self, streams: Mapping[str, Tensor]) -> Stage1Output:
        """Predict a batch from what `streams` gave."""
        return self.read_out(self.backbone(streams))

    def backbone(self, streams: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute what the heads read from what `streams` gave, (images, ...) each."""
        raise NotImplementedError

    def read_out(self, backbone: Mapping[str, Tensor]) -> Stage1Output:
        """Predict a batch by this subject's heads from what `backbone` gave."""
        raise NotImplementedError

    def features_of(self, backbone: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give what the heads read as vectors, normalised without any subject's weights.

        Returns
        -------
        dict
            Feature spaces ``global`` and ``local``, (images, features) each.
        """
        raise NotImplementedError

    def features(self, cls: Tensor, patches: Tensor) -> dict[str, Tensor]:
        """Give `features_of` of tokens, see `forward`."""
        return self.features_of(self.backbone(self.streams(cls, patches)))

    def embed_parcels(self, parcels: Tensor) -> Tensor:
        """Embed true parcel vectors (images, parcels) as (images, d_embedding).

        Raises
        ------
        ConfigError
            The model has no contrastive heads.
        """
        raise ConfigError(
            "loss.contrastive_weight",
            f"{type(self).__name__} has no contrastive heads",
            "Set the weight to 0.",
        )


def normalised(tokens: Tensor) -> Tensor:
    """Standardise the last axis of (images, ..., width) and flatten to (images, features)."""
    return functional.layer_norm(tokens, tokens.shape[-1:]).flatten(1)
