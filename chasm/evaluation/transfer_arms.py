"""Arms of a transfer to another subject, and the predictions of those that are solved, not trained.

The solved arms see the responses to N images and choose every penalty by cross-validation over
them; nothing of the test images but their tokens reaches them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chasm.errors import ConfigError
from chasm.models.baselines import BANDS, LinearEncoder, fit_mixture
from chasm.models.kernels import FeatureKernels, linear_kernels
from chasm.training.sources import fit_head

FloatArray = NDArray[np.floating[Any]]

TOKEN_SPACES = ("cls", "patches")
"""Spaces of the frozen vision backbone."""

ArmKind = Literal["reference", "baseline", "adapter"]


class Arm(NamedTuple):
    """What is fitted to the images of the other subject."""

    label: str
    kind: ArmKind
    trained: bool
    meaning: str


ARMS = {
    "mean_pattern": Arm(
        "mean pattern", "reference", False, "the mean response to the N images, for every image"
    ),
    "ridge": Arm(
        "ridge from scratch", "baseline", False,
        "ridge on CLS and patch tokens; the source subjects are not used",
    ),
    "banded_ridge": Arm(
        "banded ridge from scratch", "baseline", False,
        "ridge on the same tokens with the shares of CLS and patches chosen by cross-validation "
        "inside N, as the ridge head chooses those of its spaces",
    ),
    "ridge_head": Arm(
        "ridge head", "adapter", False,
        "frozen source; ridge on what its two heads read and on its predictions for the source "
        "subjects, with their shares chosen by cross-validation inside N",
    ),
    "head": Arm("trained head", "adapter", True, "frozen source; new heads, trained"),
    "lora": Arm(
        "LoRA", "adapter", True, "new heads, and low-rank changes of the source's layers, trained"
    ),
    "full": Arm("full fine-tuning", "adapter", True, "new heads and the whole source, trained"),
}  # fmt: skip
"""Arms by the name that the command line and recipes give them."""

REFERENCE = "ridge"
"""Arm that the others are compared with, at the same number of images."""


def check_arms(names: Sequence[str], where: str = "--arms") -> tuple[str, ...]:
    """Give the arms in their own order, each once, the reference always among them.

    Raises
    ------
    ConfigError
        One of them is unknown.
    """
    for name in names:
        if name not in ARMS:
            raise ConfigError(where, f"there is no arm {name!r}", f"Use some of {', '.join(ARMS)}.")
    return tuple(arm for arm in ARMS if arm in {*names, REFERENCE})


@dataclass(frozen=True)
class FeatureTable:
    """Features of the frozen source for some images.

    Attributes
    ----------
    image_ids
        (images,), sorted.
    spaces
        Space to (images, features).
    """

    image_ids: NDArray[np.int64]
    spaces: Mapping[str, FloatArray]

    def rows_of(self, image_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of some of the images."""
        return np.searchsorted(self.image_ids, image_ids)


class SolvedArms:
    """The solved arms on one set of images.

    Parameters
    ----------
    tokens
        The backbone's, ``{"cls": (images, layers, width), "patches": (images, patches, width)}``.
    features
        Of the source, for the ridge head; None where there is no such arm.
    train_ids
        (n,), the images that the arms are given, sorted.
    responses
        (n, units), their responses.
    test_ids
        (test images,), what is predicted.
    seed
        Of the folds.
    """

    def __init__(
        self,
        tokens: Mapping[str, NDArray[Any]],
        features: FeatureTable | None,
        train_ids: NDArray[np.int64],
        responses: FloatArray,
        test_ids: NDArray[np.int64],
        seed: int,
    ) -> None:
        self.tokens, self.features = tokens, features
        self.train_ids, self.test_ids = train_ids, test_ids
        self.responses, self.seed = responses, seed

    def predict(self, arm: str) -> tuple[FloatArray, int]:
        """Give an arm's prediction, (test images, units), and the number of its weights."""
        n_units = self.responses.shape[1]
        if arm == "mean_pattern":
            mean = self.responses.mean(axis=0, dtype=np.float64)
            return np.broadcast_to(mean, (len(self.test_ids), n_units)), n_units
        kernels = self._feature_kernels if arm == "ridge_head" else self._token_kernels
        if arm == "ridge_head":
            ridge = fit_head(kernels, self.responses, self.seed)
        elif arm == "banded_ridge":
            ridge = fit_mixture(kernels, self.responses, BANDS, self.seed)
        else:
            ridge = LinearEncoder(TOKEN_SPACES, seed=self.seed).fit(kernels, self.responses)
        return ridge.predict(kernels), ridge.n_parameters_

    @cached_property
    def _token_kernels(self) -> dict[str, FeatureKernels]:
        return {
            space: linear_kernels(
                self.tokens[space], self.train_ids, self.test_ids, description=f"kernel of {space}"
            )
            for space in TOKEN_SPACES
        }

    @cached_property
    def _feature_kernels(self) -> dict[str, FeatureKernels]:
        table = self.features
        assert table is not None
        rows, test = table.rows_of(self.train_ids), table.rows_of(self.test_ids)
        return {
            space: linear_kernels(values, rows, test, description=f"kernel of {space}")
            for space, values in table.spaces.items()
        }
