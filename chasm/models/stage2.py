"""Stage 2: predicted parcels and visual tokens to every voxel, with or without a latent."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from chasm.errors import ConfigError
from chasm.models.checks import check_choice, check_sizes
from chasm.models.cuda_packages import Block
from chasm.models.decoder import Stage2Output, VoxelDecoder
from chasm.models.latent import Latent, sample
from chasm.models.mamba import Direction, ResidualMamba, mamba_blocks
from chasm.models.sites import Site
from chasm.models.voxel_heads import Amplitude, ResidualDecoder, holistic_head
from chasm.parcellation import Parcellation

Head = Literal["dense", "low_rank", "query", "none"]


class VisualToken(nn.Module):
    """One token for the image: CLS tokens and the pooled mean patch, side by side, projected.

    Parameters
    ----------
    cls_width, n_cls, patch_width
        Sizes of the tokens; several CLS tokens are concatenated in the backbone's order.
    d_patch
        Width of the pooled mean patch (Linear, LayerNorm, GELU).
    d_model
        Width of the token.
    """

    def __init__(
        self, cls_width: int, n_cls: int, patch_width: int, d_patch: int, d_model: int
    ) -> None:
        super().__init__()
        self.pool = nn.Sequential(nn.Linear(patch_width, d_patch), nn.LayerNorm(d_patch), nn.GELU())
        self.projection = nn.Linear(n_cls * cls_width + d_patch, d_model)
        self.cls_site = Site("stage2.cls", "global")
        self.patches_site = Site("stage2.patches", "local")
        self.site = Site("stage2.visual")

    def streams(self, cls: Tensor, patch: Tensor) -> dict[str, Tensor]:
        """Give both parts of the token before they are joined, by site.

        Parameters
        ----------
        cls, patch
            (images, n_cls, width), and the mean patch, (images, width), scaled.
        """
        pooled = self.pool(patch)
        return {self.cls_site.name: cls.flatten(1), self.patches_site.name: pooled}

    def forward(self, streams: Mapping[str, Tensor]) -> Tensor:
        """Join what `streams` gave to (images, d_model)."""
        cls = self.cls_site(streams[self.cls_site.name])
        pooled = self.patches_site(streams[self.patches_site.name])
        token: Tensor = self.site(self.projection(torch.cat([cls, pooled], dim=-1)))
        return token


class HolisticDecoder(nn.Module):
    """All voxels at once: learned queries after the tokens, Mamba blocks, a head on the queries.

    Parameters
    ----------
    n_queries, d_model
        Query tokens and their width.
    blocks
        Residual Mamba blocks over tokens and queries, used in order.
    head
        Map of (images, queries, d_model) to (images, voxels).
    """

    def __init__(
        self, n_queries: int, d_model: int, blocks: list[ResidualMamba], head: nn.Module
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(n_queries, d_model))
        nn.init.trunc_normal_(self.queries, std=0.02)
        self.blocks = nn.Sequential(*blocks)
        self.head = head

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (images, tokens, d_model) to (images, voxels)."""
        queries = self.queries.to(tokens.dtype).expand(len(tokens), -1, -1)
        mixed = self.blocks(torch.cat([tokens, queries], dim=1))
        voxels: Tensor = self.head(mixed[:, -len(self.queries) :])
        return voxels


class MambaVAE(VoxelDecoder):
    """Refine parcels to voxels by two decoders around a latent (CHASMBrain, Stage 2).

    A visual token and one token per parcel (its predicted value, projected, plus a learned
    position) pass through a LayerNorm and residual Mamba blocks. Their mean gives a Gaussian
    latent, whose sample (in eval mode: its mean) is projected and added to every token. A
    holistic decoder predicts all voxels from learned queries, a residual decoder corrects the
    value of each voxel's parcel; the prediction is

        amplitude * (share * holistic + (1 - share) * residual),   share = sigmoid(fusion).

    The defaults are the paper's; a recipe gives what its code sets (dropout, clamp).

    Parameters
    ----------
    cls_width, n_cls, patch_width, n_patches, parcellation, token_noise
        See `VoxelDecoder`.
    d_model
        Width of the tokens.
    encoder_blocks, decoder_blocks
        Residual Mamba blocks before the latent and in the holistic decoder.
    d_state, d_conv, expand
        Of the Mamba layers.
    d_patch
        Width of the pooled mean patch.
    d_latent
        Width of the latent; 0 for none (the paper's "dual" row).
    d_variational, d_residual, d_amplitude
        Hidden width of the latent, the residual decoder and the amplitude.
    head
        Of the holistic decoder: "dense" (paper), "low_rank", "query", see
        `chasm.models.voxel_heads.holistic_head`; "none" for no holistic decoder.
    n_queries
        Query tokens of the holistic decoder.
    d_hidden, rank
        Hidden units of the dense and of the low-rank head.
    residual
        Whether there is a residual decoder.
    mix_parcels
        Whether its voxels have weights over all parcels instead of the value of their own (not
        in the paper).
    amplitude
        Whether the prediction has a factor per image.
    amplitude_bound
        Initial bound of that factor.
    dropout
        Of the residual branches of the blocks, the head and the residual decoder.
    direction
        Of the blocks before the latent: "forward" (paper), or "alternate": every second block
        runs from the last parcel to the visual token.
    block_norm
        Whether blocks have a LayerNorm before the Mamba layer (not in the paper).
    residual_clamp
        Largest magnitude of a block's residual branch, or None.
    full_precision
        Whether Mamba layers run in float32 under autocast.
    scan
        Back end of the scan.
    block, headdim
        Layer of the blocks, "mamba" or "mamba2", and channels per head of the latter (None: by
        `chasm.models.mamba2.default_headdim`).

    Raises
    ------
    ConfigError
        If a size is below 1, an option is unknown, or there is no decoder at all.
    """

    def __init__(
        self,
        cls_width: int,
        n_cls: int,
        patch_width: int,
        n_patches: int,
        parcellation: Parcellation,
        d_model: int = 384,
        encoder_blocks: int = 6,
        decoder_blocks: int = 2,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        d_patch: int = 256,
        d_latent: int = 128,
        d_variational: int = 192,
        head: Head = "dense",
        n_queries: int = 128,
        d_hidden: int = 4096,
        rank: int = 256,
        residual: bool = True,
        d_residual: int = 192,
        mix_parcels: bool = False,
        amplitude: bool = True,
        amplitude_bound: float = 2.5,
        d_amplitude: int = 256,
        dropout: float = 0.0,
        token_noise: float = 0.1,
        direction: Direction = "forward",
        block_norm: bool = False,
        residual_clamp: float | None = None,
        full_precision: bool = True,
        scan: str = "auto",
        block: Block = "mamba",
        headdim: int | None = None,
    ) -> None:
        super().__init__(cls_width, n_cls, patch_width, n_patches, parcellation, token_noise)
        check_sizes(d_model=d_model, d_patch=d_patch, n_queries=n_queries, rank=rank)
        check_sizes(d_variational=d_variational, d_hidden=d_hidden, d_residual=d_residual)
        check_sizes(d_amplitude=d_amplitude)
        check_choice("head", head, ("dense", "low_rank", "query", "none"))
        for name, count in {"encoder_blocks": encoder_blocks, "decoder_blocks": decoder_blocks,
                            "d_latent": d_latent}.items():  # fmt: skip
            if count < 0:
                raise ConfigError(f"model:{name}", f"found {count}", "Use 0 or above.")
        if head == "none" and not residual:
            raise ConfigError(
                "model:residual",
                'found false next to head "none", which leaves no decoder',
                "Keep one of the two.",
            )
        blocks = partial(
            mamba_blocks,
            d_model=d_model,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            dropout=dropout,
            norm=block_norm,
            clamp=residual_clamp,
            full_precision=full_precision,
            scan=scan,
            block=block,
            headdim=headdim,
        )
        self.visual = VisualToken(cls_width, n_cls, patch_width, d_patch, d_model)
        self.value = nn.Linear(1, d_model)
        self.position = nn.Parameter(torch.empty(self.n_parcels, d_model))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.norm = nn.LayerNorm(d_model)
        self.blocks = nn.Sequential(*blocks(encoder_blocks, direction=direction))
        self.latent = Latent(d_model, d_variational, d_latent) if d_latent else None
        if self.latent is None:
            self.title = "stage 2 (without VAE)"
        if block == "mamba2":
            self.title = f"{self.title} (Mamba-2)"
        self.holistic: HolisticDecoder | None = None
        if head != "none":
            voxels = holistic_head(head, n_queries, d_model, self.n_voxels, d_hidden, rank, dropout)
            self.holistic = HolisticDecoder(n_queries, d_model, blocks(decoder_blocks), voxels)
        self.residual: ResidualDecoder | None = None
        if residual:
            self.residual = ResidualDecoder(parcellation, d_model, d_residual, dropout, mix_parcels)
        if self.holistic is not None and residual:
            self.fusion = nn.Parameter(torch.tensor(0.5))
        self.amplitude: Amplitude | None = None
        if amplitude:
            self.amplitude = Amplitude(d_model, d_amplitude, amplitude_bound)
        # A model has a site only where it has the part.
        if self.latent is not None:
            self.latent_site = Site("stage2.latent")
        if self.holistic is not None:
            self.holistic_site = Site("stage2.holistic")
        if self.residual is not None:
            self.residual_site = Site("stage2.residual")

    reads_patches = False

    def streams(self, cls: Tensor, patches: Tensor) -> dict[str, Tensor]:
        """Give the parts of the visual token; see `VoxelDecoder.streams`."""
        return self.visual.streams(*self.scaled_mean(cls, patches))

    def from_streams(
        self,
        streams: Mapping[str, Tensor],
        parcels: Tensor,
        generator: torch.Generator | None = None,
    ) -> Stage2Output:
        """Predict a batch from what `streams` gave; see `VoxelDecoder.forward`."""
        tokens = self.encode(streams, parcels)
        if self.latent is None:
            return self.decode(tokens, parcels)
        mean, log_variance = self.latent(tokens.mean(1))
        z = sample(mean, log_variance, generator) if self.training else mean
        output = self.decode(self.inject(tokens, z), parcels)
        return output._replace(mean=mean, log_variance=log_variance)

    @torch.no_grad()
    def draws(
        self,
        cls: Tensor,
        patches: Tensor,
        parcels: Tensor,
        n: int,
        generator: torch.Generator | None = None,
        chunk: int = 32,
    ) -> Tensor:
        """Encode once, decode `n` samples of the latent; see `VoxelDecoder.draws`."""
        if self.latent is None:
            return super().draws(cls, patches, parcels, n, generator, chunk)
        for name, count in {"n": n, "chunk": chunk}.items():
            if count < 1:
                raise ConfigError(f"draws:{name}", f"found {count}", "Use 1 or above.")
        tokens = self.encode(self.streams(cls, patches), parcels)
        mean, log_variance = self.latent(tokens.mean(1))
        z = sample(mean, log_variance, generator, n).flatten(0, 1)
        image = torch.arange(len(tokens), device=tokens.device).repeat(n)
        decoded = [
            self.decode(self.inject(tokens[rows], part), parcels[rows]).voxels
            for rows, part in zip(image.split(chunk), z.split(chunk), strict=True)
        ]
        return torch.cat(decoded).unflatten(0, (n, -1))

    def encode(self, streams: Mapping[str, Tensor], parcels: Tensor) -> Tensor:
        """Give the tokens before the latent: (images, 1 + parcels, d_model), visual one first."""
        visual = self.visual(streams)
        values = self.value(parcels.unsqueeze(-1)) + self.position
        tokens: Tensor = self.blocks(self.norm(torch.cat([visual.unsqueeze(1), values], dim=1)))
        return tokens

    def inject(self, tokens: Tensor, z: Tensor) -> Tensor:
        """Add the projected latent (images, d_latent) to every token."""
        assert self.latent is not None
        return tokens + self.latent.projection(self.latent_site(z)).unsqueeze(1)

    def decode(self, tokens: Tensor, parcels: Tensor) -> Stage2Output:
        """Predict voxels from tokens (images, 1 + parcels, d_model) and parcel values."""
        visual = tokens[:, 0]
        holistic = residual = amplitude = None
        if self.holistic is not None:
            voxels = holistic = self.holistic_site(self.holistic(tokens))
        if self.residual is not None:
            voxels = residual = self.residual_site(self.residual(visual, tokens[:, 1:], parcels))
        if holistic is not None and residual is not None:
            share = self.fusion.sigmoid()
            voxels = share * holistic + (1 - share) * residual
        if self.amplitude is not None:
            amplitude = self.amplitude(visual)
            voxels = amplitude * voxels
        return Stage2Output(voxels, None, None, holistic, residual, amplitude)

    def head_parameters(self) -> int:
        """Count the parameters of the holistic head, 0 without one."""
        head = None if self.holistic is None else self.holistic.head
        return 0 if head is None else sum(parameter.numel() for parameter in head.parameters())


class MLPDecoder(VoxelDecoder):
    """Upsample parcels to voxels by an MLP that sees nothing else (CHASMBrain's "MLP" row).

    Linear, LayerNorm, GELU, dropout, Linear. The paper gives 68 million parameters and no
    structure; 4096 hidden units give 66.6 million at its sizes.

    Parameters
    ----------
    cls_width, n_cls, patch_width, n_patches, parcellation
        See `VoxelDecoder`; tokens are not used.
    d_hidden
        Width of the hidden layer.
    dropout
        On the hidden layer.

    Raises
    ------
    ConfigError
        If a size is below 1.
    """

    title = "stage 2 (MLP)"
    reads_patches = False

    def __init__(
        self,
        cls_width: int,
        n_cls: int,
        patch_width: int,
        n_patches: int,
        parcellation: Parcellation,
        d_hidden: int = 4096,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(cls_width, n_cls, patch_width, n_patches, parcellation)
        check_sizes(d_hidden=d_hidden)
        self.layers = nn.Sequential(
            nn.Linear(self.n_parcels, d_hidden),
            nn.LayerNorm(d_hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(d_hidden, self.n_voxels),
        )

    def from_streams(
        self,
        streams: Mapping[str, Tensor],
        parcels: Tensor,
        generator: torch.Generator | None = None,
    ) -> Stage2Output:
        """Predict a batch from parcels alone; see `VoxelDecoder.forward`."""
        return Stage2Output(self.layers(parcels))
