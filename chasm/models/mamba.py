"""Mamba layers, and residual blocks around them or Mamba-2 layers.

Parameter names, shapes and initial values are those of ``mamba_ssm.Mamba`` (Gu and Dao 2023), so
that state dicts go both ways. On CUDA its fused kernel is used when the package is installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chasm.errors import ConfigError
from chasm.models.checks import check_choice
from chasm.models.convolution import at_least_float32, causal_convolution
from chasm.models.cuda_packages import Block, mamba1_layer
from chasm.models.mamba2 import Mamba2, default_headdim
from chasm.models.scan import resolve_backend, selective_scan

Direction = Literal["forward", "alternate"]
"""Of a stack of blocks, see `mamba_blocks`."""


class Mamba(nn.Module):
    """One Mamba layer: expand, short causal convolution, selective scan, gate, project back.

    Parameters
    ----------
    d_model
        Width of the tokens.
    d_state
        States per channel.
    d_conv
        Taps of the causal convolution.
    expand
        Channels per token width.
    dt_rank
        Rank of the step-size projection; None for ceil(d_model / 16).
    dt_min, dt_max
        Range of the initial step sizes, log-uniform.
    scan
        Back end, see `chasm.models.scan.selective_scan`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        scan: str = "auto",
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner = expand * d_model
        self.dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.scan = scan
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        self._initialise(dt_min, dt_max)

    @torch.no_grad()
    def _initialise(self, dt_min: float, dt_max: float) -> None:
        """Set A to -(1..states) and the step sizes log-uniform in [dt_min, dt_max]."""
        self.A_log.copy_(torch.arange(1, self.d_state + 1, dtype=torch.float32).log())
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        step = torch.empty(self.d_inner).uniform_(math.log(dt_min), math.log(dt_max)).exp()
        self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus

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
        xz = self.in_proj(x)
        A = -torch.exp(at_least_float32(self.A_log))
        fused = fused_kernel(x.device, self.scan)
        if fused is not None:
            return self._fused(fused, xz, A)
        u, z = xz.chunk(2, dim=-1)
        u = causal_convolution(u, self.conv1d.weight, self.conv1d.bias)
        delta, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = selective_scan(
            u.mT,
            F.linear(delta, self.dt_proj.weight).mT,
            A,
            B.mT,
            C.mT,
            at_least_float32(self.D),
            z=z.mT,
            delta_bias=at_least_float32(self.dt_proj.bias),
            delta_softplus=True,
            backend=self.scan,
        )
        return self.out_proj(y.mT)

    def _fused(self, kernel: Callable[..., Tensor], xz: Tensor, A: Tensor) -> Tensor:
        return kernel(
            xz.mT.contiguous(),
            self.conv1d.weight,
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.out_proj.weight,
            self.out_proj.bias,
            A,
            None,
            None,
            self.D.float(),
            delta_bias=self.dt_proj.bias.float(),
            delta_softplus=True,
        )


def fused_kernel(device: torch.device, scan: str = "auto") -> Callable[..., Any] | None:
    """Give mamba_ssm's fused layer, where it is installed, chosen and `device` is CUDA.

    Without causal-conv1d there is no fused layer; the scan alone then uses mamba_ssm's kernel.

    Raises
    ------
    ConfigError
        If the back end `scan` is unknown or cannot run on `device`.
    """
    return mamba1_layer() if resolve_backend(device, scan) == "mamba_ssm" else None


class ResidualMamba(nn.Module):
    """A Mamba layer around a residual connection: x + dropout(clamp(mamba(norm(x)))).

    CHASMBrain has no norm inside the block and clamps the branch to +-10; both are options.

    Parameters
    ----------
    d_model, d_state, d_conv, expand, scan
        See `Mamba` and `Mamba2`.
    dropout
        Of the branch.
    norm
        Whether a LayerNorm precedes the layer.
    clamp
        Largest magnitude of the branch, or None.
    reverse
        Whether the layer runs from the last token to the first.
    full_precision
        Whether the layer runs in float32 under autocast.
    block
        "mamba" or "mamba2", the layer.
    headdim
        Channels per head of Mamba-2; None for `default_headdim`.

    Raises
    ------
    ConfigError
        If `block` is unknown, or `headdim` does not divide the channels or is not for the block.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dropout: float = 0.0,
        norm: bool = False,
        clamp: float | None = None,
        reverse: bool = False,
        full_precision: bool = True,
        scan: str = "auto",
        block: Block = "mamba",
        headdim: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("block", block, ("mamba", "mamba2"))
        if block == "mamba" and headdim is not None:
            raise ConfigError(
                "model:headdim", "is an option of Mamba-2", "Leave it out, or set block to mamba2."
            )
        self.norm = nn.LayerNorm(d_model) if norm else nn.Identity()
        self.mamba: Mamba | Mamba2
        if block == "mamba":
            self.mamba = Mamba(d_model, d_state, d_conv, expand, scan=scan)
        else:
            headdim = default_headdim(expand * d_model) if headdim is None else headdim
            self.mamba = Mamba2(d_model, d_state, d_conv, expand, headdim, scan=scan)
        self.dropout = nn.Dropout(dropout)
        self.clamp = clamp
        self.reverse = reverse
        self.full_precision = full_precision

    def forward(self, x: Tensor) -> Tensor:
        """Add what the layer finds to the tokens.

        Parameters
        ----------
        x
            (batch, tokens, d_model).

        Returns
        -------
        Tensor
            (batch, tokens, d_model).
        """
        branch = self.norm(x)
        if self.reverse:
            branch = branch.flip(1)
        if self.full_precision:
            with torch.autocast(x.device.type, enabled=False):
                branch = self.mamba(branch.float())
        else:
            branch = self.mamba(branch)
        if self.reverse:
            branch = branch.flip(1)
        if self.clamp is not None:
            branch = branch.clamp(-self.clamp, self.clamp)
        return x + self.dropout(branch)


def mamba_blocks(
    count: int, d_model: int, *, direction: Direction = "forward", **options: Any
) -> list[ResidualMamba]:
    """Make residual Mamba blocks, to be used in order.

    Parameters
    ----------
    count
        Number of blocks.
    d_model
        Width of the tokens.
    direction
        "forward", or "alternate": every second block runs from the last token to the first.
    **options
        Of every `ResidualMamba`.

    Raises
    ------
    ConfigError
        If `direction` or an option of the blocks is not valid.
    """
    check_choice("direction", direction, ("forward", "alternate"))
    backward = direction == "alternate"
    return [
        ResidualMamba(d_model, reverse=backward and number % 2 == 1, **options)
        for number in range(count)
    ]
