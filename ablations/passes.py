"""The test images through a model under interventions, each stream computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ablations.values import FloatArray
from chasm.data.datamodule import NSDDataModule
from chasm.errors import ConfigError
from chasm.interventions import (
    INPUTS,
    Intervention,
    Reference,
    collect,
    fit_optimal,
    fit_patches_from_cls,
    intervene,
    record,
)
from chasm.interventions.fitting import evaluating
from chasm.progress import track
from chasm.training.base import EncodingModule

N_OPTIMAL = 1024
"""Train images, at most, that constants are fitted to: their streams are all in memory."""

MAP_BYTES = 4 * 2**30
"""Largest map from CLS to patches that ``residualise`` is fitted with."""

MEASURED = ("mean", "noise", "optimal", "route_swap")
"""Operations that need statistics of their sites over train images."""


class Passes:
    """A model and its test images.

    The streams of every test image are computed once, on the way in; what is done to them or
    after them starts there. What is done to the tokens, or to a model without separate streams,
    takes a whole pass.

    Parameters
    ----------
    model
        Any encoder.
    data
        Set up for fitting and testing.
    order
        Puts (images, units) of the model into the order of the file.
    device
        Where to compute.
    """

    def __init__(
        self,
        model: EncodingModule,
        data: NSDDataModule,
        order: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:
        self.model, self.data, self.order = model.to(device).eval(), data, order
        self.device = device
        self.reference = Reference()
        parts: dict[str, list[Tensor]] = {}
        given: Any = self.batches("test") if model.separable else ()
        with torch.inference_mode():
            for batch in track(given, f"streams of {model.row_name}", len(given)):
                for site, value in model.streams(batch).items():
                    parts.setdefault(site, []).append(value.cpu())
        self._streams = {site: torch.cat(values) for site, values in parts.items()}
        self._clean: dict[str, Tensor] = {}

    def prepare(self, interventions: Sequence[Intervention]) -> None:
        """Learn from the train images what these interventions need, and is not known yet."""
        wanted = {one.site for one in interventions if one.operation in MEASURED}
        if any(one.operation == "route_swap" for one in interventions):
            wanted |= set(INPUTS)
        wanted -= set(self.reference.mean)
        if wanted:
            found = collect(self.model, self.batches("train"), sorted(wanted))
            self.reference.mean |= found.mean
            self.reference.variance |= found.variance
            self.reference.sources |= found.sources
        needs_map = any(one.operation == "residualise" for one in interventions)
        if needs_map and self.reference.patches_from_cls is None:
            self._check_map()
            self.reference.patches_from_cls = fit_patches_from_cls(self.batches("train"))

    def _check_map(self) -> None:
        sizes = self.model.sizes
        assert sizes is not None
        n_weights = sizes.n_cls * sizes.cls_width * sizes.n_patches * sizes.patch_width
        if 4 * n_weights > MAP_BYTES:
            raise ConfigError(
                "residualise",
                f"the map from {sizes.n_cls} CLS tokens to all patches takes "
                f"{4 * n_weights / 2**30:.1f} GiB",
                f"Use a backbone recipe with fewer CLS layers (at most {MAP_BYTES / 2**30:g} GiB).",
            )

    def predict(
        self, interventions: Sequence[Intervention] = (), donor: np.ndarray | None = None
    ) -> FloatArray:
        """Predict the test images.

        Parameters
        ----------
        interventions
            What is done.
        donor
            (images,), the image whose values ``resample`` and ``value`` put in.

        Returns
        -------
        ndarray
            (images, units) float32.
        """
        self.prepare(interventions)
        reference = self._with_optimal(interventions)
        clean = self.clean([one.site for one in interventions if one.operation == "clean"])
        taken = [one.site for one in interventions if one.operation in ("resample", "value")]
        if any(site in INPUTS for site in taken):
            assert donor is not None
        values = self.clean([site for site in taken if site not in INPUTS])
        at_inputs = any(one.site in INPUTS for one in interventions)
        from_tokens = at_inputs or not self.model.separable
        given = self.batches("test") if from_tokens else self._stream_batches()
        run = self.model if from_tokens else self.model.from_streams
        predicted, start = [], 0
        with torch.inference_mode():
            for batch in given:
                n = len(next(iter(batch.values())))
                rows = np.arange(start, start + n)
                others = {} if donor is None else self._donors(taken, values, donor[rows])
                with intervene(
                    self.model,
                    interventions,
                    reference,
                    batch=batch if from_tokens else {"image_id": self._image_ids[rows]},
                    clean={site: value[rows].to(self.device) for site, value in clean.items()},
                    donors=others,
                ):
                    predicted.append(run(batch).float().cpu())
                start += n
        return self.order(torch.cat(predicted)).numpy()

    def clean(self, sites: Sequence[str]) -> dict[str, Tensor]:
        """Values of the test images without interventions, by site, (images, ...)."""
        wanted = [site for site in sites if site not in self._clean]
        parts: dict[str, list[Tensor]] = {site: [] for site in wanted}
        if wanted:
            with torch.inference_mode(), record(self.model, wanted) as found:
                for batch in self.batches("test"):
                    self.model(batch)
                    for site in wanted:
                        parts[site].append(found[site].cpu())
            self._clean |= {site: torch.cat(values) for site, values in parts.items()}
        return {site: self._clean[site] for site in sites}

    def batches(self, part: str, most: int | None = None) -> _Batches:
        """Give the images of a part, on the device; at most so many."""
        return _Batches(self.data, part, self.device, most)

    @property
    def n_images(self) -> int:
        """Number of test images."""
        return len(self.data.data_split.test)

    @property
    def _image_ids(self) -> Tensor:
        return torch.from_numpy(np.sort(self.data.data_split.test))

    def _stream_batches(self) -> Iterator[dict[str, Tensor]]:
        size = self.data.batch_size
        for start in range(0, self.n_images, size):
            yield {
                site: value[start : start + size].to(self.device)
                for site, value in self._streams.items()
            }

    def _donors(
        self, sites: Sequence[str], values: Mapping[str, Tensor], donor: np.ndarray
    ) -> dict[str, Tensor]:
        """Values of other test images at some sites."""
        found = {}
        for site in sites:
            if site in INPUTS:
                tokens = getattr(self.data.tokens, site.removeprefix("features."))
                rows = torch.from_numpy(np.asarray(tokens[self._image_ids.numpy()[donor]]))
                found[site] = rows.float().to(self.device)
            else:
                found[site] = values[site][donor].to(self.device)
        return found

    def _with_optimal(self, interventions: Sequence[Intervention]) -> Reference:
        """Fit the constants of all sites that get one, jointly."""
        sites = [one.site for one in interventions if one.operation == "optimal"]
        if not sites:
            return self.reference
        from_tokens = any(site in INPUTS for site in sites) or not self.model.separable
        given, targets = [], []
        for batch in self.batches("train", N_OPTIMAL):
            with torch.no_grad():
                given.append(batch if from_tokens else self.model.streams(batch))
            targets.append(self.model.units_of(batch["betas"]).to(self.device))
        run = self.model if from_tokens else self.model.from_streams
        with evaluating(self.model):
            found = fit_optimal(self.model, self.reference, given, targets, sites, run)
        return replace(self.reference, optimal=found)


class _Batches:
    """Images of a part of the split, as a loader gives them, on a device."""

    def __init__(
        self, data: NSDDataModule, part: Any, device: torch.device, most: int | None
    ) -> None:
        self.data, self.part, self.device = data, part, device
        self._loader = data.ordered_dataloader(part)
        self._n = len(self._loader)
        if most is not None:
            self._n = min(self._n, max(1, most // data.batch_size))

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[Any]:
        for _, batch in zip(range(self._n), self._loader, strict=False):
            moved: Any = {name: value.to(self.device) for name, value in batch.items()}
            yield self.data.on_after_batch_transfer(moved, 0)
