"""The weight-free backbone: local energies as patch tokens, texture statistics as CLS token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from plenoptic.models import PortillaSimoncelli
from plenoptic.process import SteerablePyramidFreq
from torch import Tensor

from chasm.errors import ConfigError
from chasm.features.backbones import (
    PYRAMID,
    WEIGHT_FREE,
    Backbone,
    BackboneSpec,
    Tokens,
    resize_images,
    resolve_layers,
    versions_of,
)

PATCH = 16
"""Side of a patch in pixels, as in common vision transformers."""
DEFAULT_SIZE = 128
SMALLEST_SIZE = 112
MARGIN = 32
"""Reflected margin in pixels that keeps the pyramid's circular filters inside the image."""
SCALES, ORIENTATIONS = 5, 6
TEXTURE_SCALES, TEXTURE_ORIENTATIONS = 4, 4
HALF_CONTRAST = 0.02
"""Amplitude (image range 1) at which the contrast compression log(1 + a/h) bends."""
_AT_ONCE = 8

OPPONENT = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1.0, -1.0, 0.0], [0.5, 0.5, -1.0]])
"""Luminance, red-green and yellow-blue as mixtures of R, G and B."""


class PyramidBackbone(Backbone):
    """Steerable-pyramid energies per patch and Portilla-Simoncelli statistics of the image.

    Patch token (36 values per 16 x 16 pixels): root-mean-square amplitude of the complex
    steerable pyramid of luminance (5 scales x 6 orientations, scale slowest), then mean of the
    three opponent channels, then their standard deviations. Amplitudes and deviations ``a`` are
    compressed as ``log(1 + a / 0.02)``.

    CLS token (725 values): 710 texture statistics of luminance (4 scales, 4 orientations,
    7 x 7 correlations), then mean, spread, skewness and kurtosis of each opponent channel and
    their three correlations. Spreads are logarithms, higher moments go through asinh,
    correlations are kept as they are.

    A fixed dither of at most half a grey level precedes the CLS statistics; it defines those of
    images without contrast, where they would be 0/0.

    References
    ----------
    Simoncelli & Freeman 1995 (steerable pyramid); Portilla & Simoncelli 2000 (texture
    statistics); plenoptic (Duong et al. 2023) computes both.
    """

    opponent: Tensor
    dither: Tensor
    texture_spreads: Tensor
    texture_moments: Tensor

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        size = spec.image_size or DEFAULT_SIZE
        if size % PATCH or size < SMALLEST_SIZE:
            raise ConfigError(
                "backbone:image_size",
                f"{size} px does not suit the pyramid",
                f"Choose a multiple of {PATCH} that is at least {SMALLEST_SIZE}.",
            )
        self.image_size = size
        self.grid = (size // PATCH, size // PATCH)
        self.cls_layers = resolve_layers(spec.cls_layers, 1, "cls_layers")
        self.patch_layers = resolve_layers(spec.patch_layers, 1, "patch_layers")
        padded = size + 2 * MARGIN
        self.pyramid = SteerablePyramidFreq(
            (padded, padded), height=SCALES, order=ORIENTATIONS - 1, is_complex=True
        )
        self.texture = PortillaSimoncelli(
            (size, size), n_scales=TEXTURE_SCALES, n_orientations=TEXTURE_ORIENTATIONS
        )
        self.register_buffer("opponent", OPPONENT.clone(), persistent=False)
        dither = np.random.default_rng(0).uniform(-0.5, 0.5, (3, size, size)) / 255
        self.register_buffer("dither", torch.from_numpy(dither).float(), persistent=False)
        spreads, moments = _texture_kinds(self.texture)
        self.register_buffer("texture_spreads", spreads, persistent=False)
        self.register_buffer("texture_moments", moments, persistent=False)
        self.n_cls, self.n_patches = 1, self.grid[0] * self.grid[1]
        self.patch_width = SCALES * ORIENTATIONS + 6
        self.cls_width = len(spreads) + 15
        self.weights_label = WEIGHT_FREE
        self.key = {
            "model": PYRAMID,
            "weights": {"source": WEIGHT_FREE},
            "cls_layers": list(self.cls_layers),
            "patch_layers": list(self.patch_layers),
            "n_blocks": 1,
            "image_size": size,
            "default_image_size": DEFAULT_SIZE,
            "transform": {"resize": "bicubic", "range": [0, 1], "definition": 1},
            "versions": versions_of(PYRAMID),
        }

    def preprocess(self, images: Sequence[np.ndarray]) -> Tensor:
        """Resize uint8 images (height, width, 3) to (images, 3, size, size) in 0..1."""
        return resize_images(images, self.image_size)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tokens:
        """Return CLS (images, 1, 725) and patch tokens (images, patches, 36)."""
        # On the CPU a few images at a time, whose spectra stay in its cache.
        step = _AT_ONCE if images.device.type == "cpu" else len(images)
        parts = [self._tokens(part) for part in images.split(step)]
        return Tokens(*(torch.cat(tokens) for tokens in zip(*parts, strict=True)))

    def _tokens(self, images: Tensor) -> Tokens:
        patches = torch.cat([self._energies(images), self._colours(images)], dim=-1)
        dithered = images + self.dither
        cls = torch.cat([self._texture(dithered), self._colour_moments(dithered)], dim=-1)
        return Tokens(cls[:, None], patches)

    def _mix(self, images: Tensor) -> Tensor:
        """Opponent channels (images, 3, height, width) of RGB."""
        return torch.einsum("oc,bchw->bohw", self.opponent, images)

    def _energies(self, images: Tensor) -> Tensor:
        """Compressed amplitudes per patch, (images, patches, scales x orientations)."""
        luminance = images.mean(1, keepdim=True)
        padded = F.pad(luminance, [MARGIN] * 4, mode="reflect")
        bands = self.pyramid(padded, scales=list(range(SCALES)))
        energies = []
        for scale in range(SCALES):
            margin, cell = MARGIN >> scale, PATCH >> scale
            # Each level is a smaller inverse transform of the same spectrum: 4 times larger.
            inner = bands[scale][:, 0, :, margin:-margin, margin:-margin] / 4**scale
            energies.append(F.avg_pool2d(inner.real.square() + inner.imag.square(), cell))
        amplitude = torch.cat(energies, dim=1).sqrt()
        return _compress(amplitude).flatten(2).transpose(1, 2)

    def _colours(self, images: Tensor) -> Tensor:
        """Means and compressed deviations of the opponent channels, (images, patches, 6)."""
        channels = self._mix(images)
        mean = F.avg_pool2d(channels, PATCH)
        centred = channels - F.interpolate(mean, scale_factor=PATCH, mode="nearest")
        deviation = F.avg_pool2d(centred.square(), PATCH).sqrt()
        return torch.cat([mean, _compress(deviation)], dim=1).flatten(2).transpose(1, 2)

    def _texture(self, images: Tensor) -> Tensor:
        """Portilla-Simoncelli statistics of luminance on a stable range, (images, 710)."""
        statistics = self.texture(images.mean(1, keepdim=True))[:, 0]
        spread = statistics.clamp_min(1e-12).log()
        statistics = torch.where(self.texture_moments, statistics.asinh(), statistics)
        return torch.where(self.texture_spreads, spread, statistics)

    def _colour_moments(self, images: Tensor) -> Tensor:
        """Four moments of each opponent channel and their correlations, (images, 15)."""
        channels = self._mix(images).flatten(2)
        mean = channels.mean(2)
        deviation = channels.std(2, correction=0)
        z = (channels - mean[..., None]) / deviation[..., None]
        pairs = torch.stack([(z[:, a] * z[:, b]).mean(1) for a, b in ((0, 1), (0, 2), (1, 2))], 1)
        third, fourth = z.pow(3).mean(2).asinh(), z.pow(4).mean(2).asinh()
        return torch.cat([mean, deviation.log(), third, fourth, pairs], dim=1)


def _compress(amplitude: Tensor) -> Tensor:
    """Contrast compression: linear for faint, logarithmic for strong amplitudes."""
    return torch.log1p(amplitude / HALF_CONTRAST)


def _texture_kinds(texture: PortillaSimoncelli) -> tuple[Tensor, Tensor]:
    """Say which texture statistics are spreads and which are higher moments, two masks (710,)."""
    shape = texture.image_shape
    count = texture(torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0))).shape[-1]
    places = texture.convert_to_dict(torch.arange(count, dtype=torch.float64)[None, None])

    def mask(*names: str) -> Tensor:
        indices = torch.cat([places[name].flatten() for name in names])
        return torch.zeros(count, dtype=torch.bool).index_fill_(0, indices.long(), True)

    spreads = mask("std_reconstructed", "magnitude_std", "var_highpass_residual")
    moments = mask("skew_reconstructed", "kurtosis_reconstructed")
    first = int(places["pixel_statistics"].flatten()[0])  # mean, variance, skew, kurtosis, ...
    spreads[first + 1] = True
    moments[first + 2 : first + 4] = True
    return spreads, moments
