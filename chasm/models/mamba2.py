"""Mamba-2 layers (Dao and Gu 2024).

Parameter names, shapes and initial values are those of ``mamba_ssm.Mamba2``, so that state dicts
go both ways; heads with one decay each replace Mamba's decay per channel and state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chasm.errors import ConfigError
from chasm.models.checks import check_sizes
from chasm.models.convolution import at_least_float32, causal_convolution
from chasm.models.ssd import UNLIMITED, ssd

LEAST_HEADS = 8
"""Heads that `default_headdim` leaves at least."""


class GatedRMSNorm(nn.Module):
    """Root-mean-square norm of groups of channels, times a weight, with a gate silu(z).

    Parameters
    ----------
    width
        Channels.
    group_size
        Channels that are normed together.
    norm_before_gate
        Whether the gate multiplies what is normed, or what is to be normed.
    eps
        Added to the mean square.
    """

    def __init__(
        self, width: int, group_size: int, norm_before_gate: bool = False, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.group_size, self.norm_before_gate, self.eps = group_size, norm_before_gate, eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Norm and gate (..., width) by (..., width), in float32 when they are narrower."""
        y, gate = at_least_float32(x), F.silu(at_least_float32(z))
        if not self.norm_before_gate:
            y = y * gate
        y = F.rms_norm(y.unflatten(-1, (-1, self.group_size)), (self.group_size,), eps=self.eps)
        y = y.flatten(-2) * self.weight
        return (y * gate if self.norm_before_gate else y).to(x.dtype)


class Mamba2(nn.Module):
    """One Mamba-2 layer: expand, short causal convolution, scan by heads, gated norm, project.

    Parameters
    ----------
    d_model
        Width of the tokens.
    d_state
        States per channel.
    d_conv
        Taps of the causal convolution over inputs and both maps of the state.
    expand
        Channels per token width.
    headdim
        Channels per head; divides expand * d_model.
    ngroups
        Groups of heads with common input and output maps; divides the heads.
    A_init_range
        Range of the initial decay rates, uniform.
    D_has_hdim
        Whether the skip connection has a weight per channel instead of one per head.
    rmsnorm
        Whether channels are normed with the gate before the projection; else only gated.
    norm_before_gate
        See `GatedRMSNorm`.
    dt_min, dt_max, dt_init_floor
        Range of the initial step sizes, log-uniform, and the least of them.
    dt_limit
        Range that step sizes are clamped to.
    bias, conv_bias
        Whether projections and convolution have one.
    chunk_size
        Steps per chunk, see `chasm.models.ssd.ssd`.
    scan
        Back end, see `chasm.models.ssd.ssd`.

    Raises
    ------
    ConfigError
        If a size is below 1, or `headdim` or `ngroups` does not divide.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = UNLIMITED,
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        scan: str = "auto",
    ) -> None:
        super().__init__()
        check_sizes(d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand)
        check_sizes(headdim=headdim, ngroups=ngroups, chunk_size=chunk_size)
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner = expand * d_model
        self.headdim, self.ngroups = headdim, ngroups
        self.nheads = _quotient("headdim", headdim, self.d_inner, "expand * d_model")
        _quotient("ngroups", ngroups, self.nheads, "the number of heads")
        self.dt_limit, self.chunk_size, self.scan = dt_limit, chunk_size, scan
        maps = 2 * ngroups * d_state
        self.widths = (self.d_inner, self.d_inner + maps, self.nheads)  # z; x, B and C; dt
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=bias)
        convolved = self.d_inner + maps
        self.conv1d = nn.Conv1d(
            convolved, convolved, d_conv, groups=convolved, padding=d_conv - 1, bias=conv_bias
        )
        self.dt_bias = nn.Parameter(torch.empty(self.nheads))
        self.A_log = nn.Parameter(torch.empty(self.nheads).uniform_(*A_init_range).log())
        self.D = nn.Parameter(torch.ones(self.d_inner if D_has_hdim else self.nheads))
        self.norm = (
            GatedRMSNorm(self.d_inner, self.d_inner // ngroups, norm_before_gate)
            if rmsnorm
            else None
        )
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)
        self._initialise(dt_min, dt_max, dt_init_floor)

    @torch.no_grad()
    def _initialise(self, dt_min: float, dt_max: float, dt_init_floor: float) -> None:
        """Set the step sizes log-uniform in [dt_min, dt_max]."""
        step = torch.empty(self.nheads).uniform_(math.log(dt_min), math.log(dt_max)).exp()
        step = step.clamp(min=dt_init_floor)
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens along their order, each seeing only itself and those before it.

        Parameters
        ----------
        x
            (batch, tokens, d_model).

        Returns
        -------
        Tensor
            (batch, tokens, d_model).
        """
        z, xBC, dt = self.in_proj(x).split(self.widths, dim=-1)
        xBC = causal_convolution(xBC, self.conv1d.weight, self.conv1d.bias)
        maps = self.ngroups * self.d_state
        u, B, C = xBC.split([self.d_inner, maps, maps], dim=-1)
        A_log, skip, bias = (at_least_float32(v) for v in (self.A_log, self.D, self.dt_bias))
        y = ssd(
            u.unflatten(-1, (self.nheads, self.headdim)),
            dt,
            -torch.exp(A_log),
            B.unflatten(-1, (self.ngroups, self.d_state)),
            C.unflatten(-1, (self.ngroups, self.d_state)),
            skip if len(skip) == self.nheads else skip.unflatten(0, (self.nheads, self.headdim)),
            dt_bias=bias,
            dt_limit=self.dt_limit,
            chunk_size=self.chunk_size,
            backend=self.scan,
        ).flatten(2)
        y = y * F.silu(z) if self.norm is None else self.norm(y, z)
        projected: Tensor = self.out_proj(y)
        return projected


def default_headdim(d_inner: int) -> int:
    """Give a head width that suits narrow layers, too.

    The largest power of two up to mamba_ssm's 64 that divides `d_inner` and leaves at least
    `LEAST_HEADS` heads, since a head has a single decay: 64 at 512 channels and above, 16 at 128;
    where none leaves as many, 1.
    """
    widths = (2**power for power in range(6, -1, -1))
    fits = (w for w in widths if d_inner % w == 0 and d_inner // w >= LEAST_HEADS)
    return next(fits, 1)


def _quotient(name: str, size: int, whole: int, what: str) -> int:
    if whole % size:
        raise ConfigError(
            f"model:{name}", f"{size} does not divide {what}, {whole}", "Use a divisor of it."
        )
    return whole // size
