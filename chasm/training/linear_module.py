"""Banded ridge alone as a module: a second class of model for whatever is done to the first."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from chasm.data.batches import Batch
from chasm.data.datamodule import NSDDataModule
from chasm.errors import ConfigError
from chasm.parcellation import Aggregation
from chasm.training.base import EncodingModule, Unit
from chasm.training.closed_form import fit_linear_path

RANK = 1024
"""Principal components of each token space that a closed form made here reads at most."""


class LinearModule(EncodingModule):
    """The closed form of another module, or one like it, without the network.

    Parameters
    ----------
    like
        Its units, target and, where it has them, closed-form weights are taken.
    """

    def __init__(self, like: EncodingModule) -> None:
        super().__init__(target=like.target, top_p=like.top_p)
        if like.sizes is None or like.parcellation is None:
            raise ConfigError("model", "it was not built", "Load it from a checkpoint.")
        self.sizes, self.parcellation = like.sizes, like.parcellation
        self._unit, self._units_of = like.unit, like.units_of
        self.trained_on = like.trained_on
        own = like.linear
        self.path = self.make_linear_path(RANK if own is None else own.rank)
        if own is not None:
            self.path.load_state_dict(own.state_dict())

    row_name = "banded ridge"
    separable = True

    @property
    def unit(self) -> Unit:
        """As the other module's."""
        return self._unit

    def units_of(self, betas: Tensor, how: Aggregation | None = None) -> Tensor:
        """Give the other module's units, (images, units)."""
        return self._units_of(betas, how)

    def solve(self, data: NSDDataModule) -> LinearModule:
        """Fit the weights to the train images, unless they are fitted."""
        if not bool(self.path.fitted):
            fit_linear_path(self.path, data, self._targets_on_cpu, data.seed)
        return self

    def network_streams(self, batch: Batch) -> dict[str, Tensor]:
        """Give the shares of the two kinds of tokens."""
        return self.path.streams(batch["cls"], batch["patches"])

    def network_from_streams(self, streams: Mapping[str, Tensor]) -> Tensor:
        """Predict (images, units) from them."""
        return self.path.from_streams(streams)
