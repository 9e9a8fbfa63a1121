"""A Gaussian latent between encoder and decoders."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LOG_VARIANCE_RANGE = (-30.0, 20.0)
"""Range to which the log variance is clamped: standard deviations of 3e-7 to 2e4."""


class Latent(nn.Module):
    """A Gaussian latent per image, from and back to the tokens' width.

    Parameters
    ----------
    d_model, d_hidden, d_latent
        Width of the tokens, of the hidden layer (Linear, GELU) and of the latent.
    """

    def __init__(self, d_model: int, d_hidden: int, d_latent: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(d_model, d_hidden), nn.GELU())
        self.mean = nn.Linear(d_hidden, d_latent)
        self.log_variance = nn.Linear(d_hidden, d_latent)
        self.projection = nn.Linear(d_latent, d_model)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Map (images, d_model) to mean and log variance, (images, d_latent) each, in float32.

        The log variance is clamped to `LOG_VARIANCE_RANGE`, so that neither its exponential in
        the Kullback-Leibler term nor a sample overflows.
        """
        with torch.autocast(pooled.device.type, enabled=False):
            hidden = self.hidden(pooled.float())
            return self.mean(hidden), self.log_variance(hidden).clamp(*LOG_VARIANCE_RANGE)


def sample(
    mean: Tensor,
    log_variance: Tensor,
    generator: torch.Generator | None = None,
    n: int | None = None,
) -> Tensor:
    """Draw from Gaussians, differentiably in their parameters.

    Parameters
    ----------
    mean, log_variance
        (images, d_latent).
    generator
        Of the standard normal numbers, drawn on its own device; torch's own where None.
    n
        Draws per image, or None for one without an axis of its own.

    Returns
    -------
    Tensor
        (images, d_latent), or (n, images, d_latent).
    """
    device = mean.device if generator is None else generator.device
    shape = mean.shape if n is None else (n, *mean.shape)
    noise = torch.randn(shape, generator=generator, device=device, dtype=mean.dtype)
    return mean + noise.to(mean.device) * (0.5 * log_variance).exp()
