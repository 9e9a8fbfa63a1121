"""What every model of parcels has in common: tokens in, parcels out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from chasm.errors import ConfigError
from chasm.models.tokens import TokenNoise, TokenScaler


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


class ParcelEncoder(nn.Module):
    """Base of the models that predict parcels from CLS and patch tokens.

    Parameters
    ----------
    cls_width, n_cls
        Width and number of CLS tokens per image (one per backbone layer).
    patch_width, n_patches
        Width and number of patch tokens per image.
    n_parcels
        Parcels to predict.
    token_noise
        Standard deviation of Gaussian noise on the scaled tokens in training.

    Raises
    ------
    ConfigError
        If a size is below 1.
    """

    title = "stage 1"
    """Name of the row in tables."""

    def __init__(
        self,
        cls_width: int,
        n_cls: int,
        patch_width: int,
        n_patches: int,
        n_parcels: int,
        token_noise: float = 0.1,
    ) -> None:
        super().__init__()
        check_sizes(
            cls_width=cls_width,
            n_cls=n_cls,
            patch_width=patch_width,
            n_patches=n_patches,
            n_parcels=n_parcels,
        )
        self.n_parcels = n_parcels
        self.cls_scaler = TokenScaler(n_cls, cls_width)
        self.patch_scaler = TokenScaler(patch_width)
        self.noise = TokenNoise(token_noise)

    def scaled(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Standardise tokens, with noise in training; shapes as in `forward`."""
        return self.noise(self.cls_scaler(cls)), self.noise(self.patch_scaler(patches))

    def forward(self, cls: Tensor, patches: Tensor) -> Stage1Output:
        """Predict a batch.

        Parameters
        ----------
        cls
            (images, n_cls, cls_width), any floating dtype.
        patches
            (images, n_patches, patch_width), any floating dtype.
        """
        raise NotImplementedError

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


def check_sizes(**sizes: int) -> None:
    """Raise a ConfigError that names the first size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"model:{name}", f"found {size}", "Use a size of 1 or above.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ConfigError that names the option and its choices if `value` is none of them."""
    if value not in choices:
        listed = ", ".join(choices)
        raise ConfigError(f"model:{name}", f"found {value!r}", f"Use one of: {listed}.")
