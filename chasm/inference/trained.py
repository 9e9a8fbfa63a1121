"""A trained model with everything that is needed to use it, as read from a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from chasm.data.datamodule import subject_name
from chasm.data.store import SubjectStore
from chasm.errors import ConfigError, DataError, StoreError
from chasm.features.backbones import BackboneSpec
from chasm.features.cache import TokenCache
from chasm.inference.space import VoxelSpace
from chasm.io import sha256_of_file
from chasm.training.base import EncodingModule
from chasm.training.checkpoints import load_module
from chasm.training.run_files import is_finished, read_provenance

log = logging.getLogger(__name__)

UNKNOWN = "unknown"


@dataclass(frozen=True)
class TrainedModel:
    """A model, the backbone it was trained on, its voxels, and where it comes from.

    Attributes
    ----------
    module
        In evaluation mode, on the CPU.
    backbone
        What to build.
    backbone_key
        `chasm.features.backbones.Backbone.key` of the tokens it was trained on: model, hash of
        the weights, layers, transform; None when that is not known.
    space
        Its voxels.
    facts
        Plain types: model, recipe, unit, subject, dataset, simulated, beta_version, weights,
        split, statistics, samples, target, fingerprints, versions and so on.
    path
        The file or folder it was read from.
    run
        Folder of the run, None for one that was exported.
    """

    module: EncodingModule
    backbone: BackboneSpec
    backbone_key: Mapping[str, Any] | None
    space: VoxelSpace
    facts: Mapping[str, Any]
    path: Path
    run: Path | None = None

    @property
    def subject(self) -> str:
        """Whose responses it predicts."""
        return str(self.facts["subject"])

    @property
    def title(self) -> str:
        """Model, subject and data set in a few words; SIMULATED in front when they are."""
        label = "SIMULATED · " if self.facts.get("simulated") else ""
        return f"{label}{self.facts['model']} · {self.subject} ({self.facts['dataset']})"

    def require_subject(self, subject: int | str | None) -> None:
        """Raise a `ConfigError` when the model is of another subject than asked for."""
        if subject is not None and subject_name(subject) != self.subject:
            raise ConfigError(
                self.path,
                f"was trained on {self.subject}, {subject_name(subject)} was asked for",
                "Name a model of that subject; responses of one do not stand for another's.",
            )


def checkpoint_of(path: Path) -> Path | None:
    """Checkpoint that a run's folder or a ``.ckpt`` stands for; None if `path` is neither.

    Raises
    ------
    DataError
        The folder is a run that is not finished.
    """
    if path.suffix == ".ckpt" and path.is_file():
        return path
    if not (path / "config.yaml").is_file():
        return None
    if not is_finished(path):
        raise DataError(
            path, "is a run that is not finished",
            "Train it to its end with `chasm fit`, or name one of its checkpoints",
        )  # fmt: skip
    return path / "checkpoints" / "best.ckpt"


def read_run(checkpoint: Path) -> TrainedModel:
    """Read a checkpoint that lies in its run's folder, with the run's backbone and voxels.

    The voxels come from the run's store; when that is no longer there, or no longer the one the
    run was trained on, a warning says so and the table of voxels is empty.

    Raises
    ------
    DataError
        The checkpoint is damaged or no checkpoint of chasm, or lies outside its run.
    """
    module = load_module(checkpoint)
    run = checkpoint.resolve().parent.parent
    if not (run / "config.yaml").is_file():
        raise DataError(
            checkpoint, "lies outside its run, which says which backbone it needs",
            "Name the run's folder; to hand a model on, use `chasm export`",
        )  # fmt: skip
    settings = _settings(run / "config.yaml")
    place = partial(_place, _working_folder(run, settings))
    told = read_provenance(run)
    assert module.sizes is not None
    facts = {
        "model": module.row_name, "unit": module.unit, "target": module.target,
        **{key: told.get(key) for key in (
            "recipe", "subject", "dataset", "simulated", "source", "beta_version", "split",
            "seed", "trained", "finished", "git_revision", "versions",
        )},
        "statistics": settings["data"].get("statistics"),
        "samples": settings["data"].get("samples"),
        "weights": told["tokens"]["weights"],
        "fingerprints": {
            "checkpoint": sha256_of_file(checkpoint),
            "store": told["store"]["fingerprint"], "tokens": told["tokens"]["fingerprint"],
        },
    }  # fmt: skip
    return TrainedModel(
        module=module,
        backbone=_spec(run / "config.yaml", settings, place),
        backbone_key=_backbone_key(told["tokens"], place),
        space=_space(told["store"], place, module.sizes.n_voxels),
        facts=facts,
        path=checkpoint,
        run=run,
    )


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        return found | {"data": dict(found["data"])}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        line = (str(error).splitlines() or [""])[0]
        raise DataError(path, f"is no run's config ({line})", "Train again with --fresh") from error


def _working_folder(run: Path, settings: Mapping[str, Any]) -> Path:
    """Folder that a run's relative paths are relative to: above <runs>/<dataset>/<subject>/."""
    runs = Path(str(settings.get("runs", "runs")))
    above = 2 if runs.is_absolute() else 2 + len(runs.parts)
    above += (run.parent / "provenance.json").is_file()  # a subject's, in the run of several
    return run.parents[min(above, len(run.parents) - 1)]


def _place(base: Path, path: str) -> Path:
    """Find what a run calls by this path, from where it was trained or, if not there, from here."""
    there = base / path
    return there if there.exists() else Path(path)


def _spec(path: Path, settings: Mapping[str, Any], place: Callable[[str], Path]) -> BackboneSpec:
    try:
        spec = spec_of(settings["data"]["backbone"])
        is_file = bool(Path(spec.weights).suffix)
        return replace(spec, weights=str(place(spec.weights))) if is_file else spec
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path}:data.backbone", f"is no backbone ({error})", "Train again"
        ) from error


def spec_of(fields: Mapping[str, Any]) -> BackboneSpec:
    """Make a spec from plain types; TypeError when they are none."""
    layers = {k: tuple(fields[k]) for k in ("cls_layers", "patch_layers") if k in fields}
    return BackboneSpec(**{**fields, **layers})


def _backbone_key(
    tokens: Mapping[str, Any], place: Callable[[str], Path]
) -> Mapping[str, Any] | None:
    """Key of the backbone behind a run's tokens, from its provenance or from the cache itself."""
    if "backbone_key" in tokens:
        return tokens["backbone_key"]
    try:
        cache = TokenCache.open(place(tokens["path"]))
    except DataError:
        return None
    if cache.fingerprint != tokens["fingerprint"]:
        return None
    return cache.manifest["backbone"]


def _space(store: Mapping[str, Any], place: Callable[[str], Path], n_voxels: int) -> VoxelSpace:
    try:
        found = SubjectStore.open(place(store["path"]))
        if found.fingerprint != store["fingerprint"]:
            raise StoreError(
                found.path, "has changed since the run was trained", "Bring back the old one"
            )
        return VoxelSpace.of_store(found)
    except StoreError as error:
        log.warning("the table of voxels is empty, and no maps can be drawn: %s", error)
        return VoxelSpace(n_voxels)
