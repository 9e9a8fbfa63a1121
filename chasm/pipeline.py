"""From an NSD tree to a scored run: every step is skipped when its output is current."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from chasm.data.datamodule import NSDDataModule
from chasm.data.prepare import prepare_nsd
from chasm.data.simulation import SimulationConfig, simulate
from chasm.errors import ConfigError
from chasm.evaluation.testing import score_run
from chasm.features.backbones import create_backbone
from chasm.features.cache import TokenCache
from chasm.features.extract import check_pixels, extract
from chasm.training.joint import subject_runs
from chasm.training.launch import leave_to_first, speak_once
from chasm.training.recipes import Recipe
from chasm.training.runs import RECIPES, fit

log = logging.getLogger(__name__)

SIMULATED_DIR = Path("data/simulated")
"""Where a recipe looks for stores when it names no folder: never for those of a real tree."""


def device() -> str:
    """Return cuda where there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def extract_tokens(data: NSDDataModule, *, fresh: bool = False, batch_size: int = 32) -> TokenCache:
    """Fill the token cache for every image that a subject saw."""
    store = data.store
    images = store.open_images()
    found = None if fresh else TokenCache.find(data.tokens_root, images.fingerprint, data.backbone)
    if found is not None and not len(found.missing(store.images.ids)):
        found.verify(store.images.ids)
        check_pixels(found, images, store.images.ids)
        log.info("tokens are current: %s", found.folder)
        return found
    return extract(
        images,
        create_backbone(data.backbone),
        store.images.ids,
        data.tokens_root,
        batch_size=batch_size,
        device=device(),
        fresh=fresh,
    )


def prepare_recipe(
    args: Sequence[str],
    *,
    nsd: Path | None = None,
    simulated: SimulationConfig | None = None,
    version: str = "betas_fithrf_GLMdenoise_RR",
    mask: str = "nsdgeneral",
) -> Recipe:
    """Make the subject stores and the tokens that a recipe needs.

    They are of its own subject or, where several are trained together or an adapter's source
    is trained first, of all of them.

    Parameters
    ----------
    args, nsd, simulated, version, mask
        See `run_recipe`.

    Returns
    -------
    Recipe
        The recipe, with the folder that its data are in.
    """
    recipe = Recipe(args)
    speak_once(recipe)
    data = recipe.make_data()
    if nsd is not None and data.dataset_dir == SIMULATED_DIR:
        recipe = Recipe([*args, "--data.dataset_dir", str(Path("data") / nsd.resolve().name)])
        data = recipe.make_data()
    parts = modules_of(recipe)
    if simulated is not None:
        subjects = [_number(part.subject) for part in parts]
        nsd = simulate(simulated, data.dataset_dir / "nsd", subjects)
    if nsd is not None:
        log.info("step: prepare")
        for part in parts:
            prepare_nsd(nsd, _number(part.subject), part.store_path, version=version, mask=mask)
    log.info("step: extract")
    for part in parts:
        extract_tokens(part)
    return recipe


def modules_of(recipe: Recipe) -> list[NSDDataModule]:
    """Give the data module of every subject that a recipe needs, the source's first."""
    if recipe.trains_together:
        return list(recipe.make_subjects().parts.values())
    data = recipe.make_data()
    source = recipe.source
    if recipe.subjects is None or source is None or source.suffix not in RECIPES:
        return [data]
    return [*recipe.source_recipe().make_subjects().parts.values(), data]


def run_recipe(
    args: Sequence[str],
    *,
    nsd: Path | None = None,
    simulated: SimulationConfig | None = None,
    version: str = "betas_fithrf_GLMdenoise_RR",
    mask: str = "nsdgeneral",
    n_boot: int = 2000,
    fresh: bool = False,
) -> Path:
    """Prepare, extract, fit and test one recipe on one subject, or on several together.

    Parameters
    ----------
    args
        Recipe arguments (``-c FILE --data.subject 1 ...``).
    nsd
        An NSD tree to prepare the subject from; without it the store has to exist, unless
        `simulated` is given. Unless the recipe says otherwise, its stores go to
        ``data/<name of the tree>``.
    simulated
        Simulate a tree under ``<dataset_dir>/nsd`` first.
    version, mask
        Beta version, and the ROI atlas whose labelled voxels are used.
    n_boot
        Bootstrap resamples of the table.
    fresh
        Train and test again although the run is current.

    Returns
    -------
    Path
        The run's folder; that of the first subject where several are trained together, each of
        which has one.
    """
    recipe = prepare_recipe(args, nsd=nsd, simulated=simulated, version=version, mask=mask)
    log.info("step: fit")
    run = fit(recipe, fresh=fresh)
    leave_to_first(recipe)
    tested = subject_runs(run) or [run]
    for one in tested:
        log.info("step: test %s", one.name if len(tested) > 1 else "")
        score_run(one, n_boot=n_boot, fresh=fresh, by="chasm run")
    return tested[0]


def _number(subject: int | str) -> int:
    text = str(subject).removeprefix("subj")
    if not text.isdigit():
        raise ConfigError(
            "--data.subject", f"{subject!r} is no NSD subject", "Give a number from 1 to 8."
        )
    return int(text)
