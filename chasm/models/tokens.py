"""What happens to tokens before a model sees them: scaling, and noise in training."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from chasm.errors import ConfigError
from chasm.models.checks import check_sizes


class TokenScaler(nn.Module):
    """Standardise tokens by statistics that travel with the checkpoint; identity until set.

    Parameters
    ----------
    shape
        Trailing axes of the tokens that have their own statistics: (width,) or (layers, width).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Use these statistics of the train images; where `std` is 0 the channel is only centred.

        Raises
        ------
        ConfigError
            If the shapes are not those of the scaler or a value is not finite.
        """
        for name, value in (("mean", mean), ("std", std)):
            if value.shape != self.mean.shape or not value.isfinite().all():
                raise ConfigError(
                    f"token scaler:{name}",
                    f"shape {tuple(value.shape)} or values not finite, "
                    f"expected {tuple(self.mean.shape)}",
                    "Compute statistics over the train images' tokens.",
                )
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 0, std, torch.ones_like(std)))

    def forward(self, tokens: Tensor) -> Tensor:
        """Standardise (images, ..., *shape) tokens."""
        return (tokens.to(self.mean.dtype) - self.mean) / self.std


class TokenNoise(nn.Module):
    """Add Gaussian noise to tokens in training.

    Parameters
    ----------
    std
        Standard deviation, in units of the scaled tokens.
    """

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, tokens: Tensor, averaged: int = 1) -> Tensor:
        """Return tokens of the same shape; each is a mean of `averaged`, whose noise averages."""
        if not self.training or self.std == 0:
            return tokens
        return tokens + self.std / math.sqrt(averaged) * torch.randn_like(tokens)


class TokenModel(nn.Module):
    """Base of the models that read CLS and patch tokens: scaling, and noise in training.

    Parameters
    ----------
    cls_width, n_cls
        Width and number of CLS tokens per image (one per backbone layer).
    patch_width, n_patches
        Width and number of patch tokens per image.
    token_noise
        Standard deviation of Gaussian noise on the scaled tokens in training.

    Raises
    ------
    ConfigError
        If a size is below 1.
    """

    def __init__(
        self, cls_width: int, n_cls: int, patch_width: int, n_patches: int, token_noise: float
    ) -> None:
        super().__init__()
        check_sizes(cls_width=cls_width, n_cls=n_cls, patch_width=patch_width, n_patches=n_patches)
        self.n_patches = n_patches
        self.cls_scaler = TokenScaler(n_cls, cls_width)
        self.patch_scaler = TokenScaler(patch_width)
        self.noise = TokenNoise(token_noise)

    def scaled(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Standardise (images, n_cls, width) and (images, patches, width); noise in training."""
        return self.noise(self.cls_scaler(cls)), self.noise(self.patch_scaler(patches))

    def scaled_mean(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Standardise CLS tokens and the mean patch; noise in training as if on every patch.

        The mean over patches of `scaled`: scaling is affine, and independent noise of standard
        deviation s on n patches has a mean of standard deviation s / sqrt(n).

        Parameters
        ----------
        cls
            (images, n_cls, width).
        patches
            (images, n_patches, width), or their mean, (images, 1, width).

        Returns
        -------
        tuple of Tensor
            (images, n_cls, width) and (images, width).
        """
        mean = self.patch_scaler(patches.to(self.patch_scaler.mean.dtype).mean(1))
        return self.noise(self.cls_scaler(cls)), self.noise(mean, self.n_patches)
