"""Runs: a folder that holds all of one training, found again by what made it.

A run's folder is ``runs/<dataset>/<subject>/<recipe>-<digest>``; the digest covers the
resolved recipe and the fingerprints of the data. The same command therefore finds its run:
finished, it is current; interrupted, it goes on from the last whole epoch.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
from filelock import FileLock, Timeout
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from chasm.data.datamodule import NSDDataModule, subject_name
from chasm.data.subjects import SubjectsDataModule
from chasm.errors import ConfigError, DataError, TrainingError
from chasm.io import digest, sha256_of_file, write_json, write_text
from chasm.processes import wait_for_all
from chasm.progress import console
from chasm.training.base import EncodingModule
from chasm.training.callbacks import FiniteValidation, SeededSteps, StopTogether, progress_callback
from chasm.training.checkpoints import load_module, read_checkpoint
from chasm.training.joint import JointModule, subject_runs, write_subject_runs
from chasm.training.launch import is_main_process, speak_once
from chasm.training.modules import Stage1Module
from chasm.training.provenance import provenance
from chasm.training.recipes import Recipe
from chasm.training.run_files import is_finished, merge_metrics, read_provenance

log = logging.getLogger(__name__)

_WITHOUT_EFFECT = {
    "data": ("num_workers", "dataset_dir"),
    "trainer": (
        "logger", "enable_progress_bar", "enable_model_summary", "default_root_dir",
        "log_every_n_steps", "profiler", "enable_checkpointing",
    ),
}  # fmt: skip
"""Settings that change nothing in the result, left out of a run's digest."""


RECIPES = (".yaml", ".yml")
"""Suffixes by which a recipe is told from a checkpoint."""

RESULT_VERSION = 3
"""Part of a run's digest: raised when a change of the code changes what training gives."""

TrainingData = NSDDataModule | SubjectsDataModule
"""What a recipe trains on."""


class RunBusyError(ConfigError):
    """Another process trains the same run."""


class RunInterruptedError(TrainingError):
    """Training was stopped from outside before its end."""

    def __init__(self, run: Path, epoch: int, by: signal.Signals) -> None:
        super().__init__(
            run,
            f"training stopped in epoch {epoch + 1} ({by.name})",
            "Give the same command again to go on from the last whole epoch.",
        )
        self.exit_status = 128 + by


def training_data(recipe: Recipe) -> TrainingData:
    """Make the data module of what a recipe trains on: one subject, or several together."""
    return recipe.make_subjects() if recipe.trains_together else recipe.make_data()


def run_folder(recipe: Recipe, data: TrainingData) -> Path:
    """Folder of the run that this recipe makes on these data."""
    settings = recipe.settings()
    settings.pop("runs", None)
    for part, key in ((settings, "subjects"), (settings, "source"), (settings["data"], "few_shot")):
        if part[key] is None:  # as before there was this key
            part.pop(key)
    for part, keys in _WITHOUT_EFFECT.items():
        for key in keys:
            settings[part].pop(key, None)
    settings["result_version"] = RESULT_VERSION
    if isinstance(data, SubjectsDataModule):
        settings["data"].pop("subject")
        settings["store"] = [part.store.fingerprint for part in data.parts.values()]
        settings["tokens"] = [part.tokens.fingerprint for part in data.parts.values()]
    else:
        settings["store"] = data.store.fingerprint
        settings["tokens"] = data.tokens.fingerprint
    if recipe.stage1 is not None:
        settings["stage1"] = sha256_of_file(stage1_checkpoint(recipe))
    if recipe.source is not None:
        settings["source"] = [sha256_of_file(path) for path in source_checkpoints(recipe)]
        settings.pop("subjects", None)  # the source's, which its checkpoint tells
    subject = subject_name(data.subject)
    return (
        Path(recipe.runs) / data.dataset_dir.name / subject / f"{recipe.name}-{digest(settings, 8)}"
    )


def stage1_checkpoint(recipe: Recipe) -> Path:
    """Checkpoint of the Stage 1 that a recipe builds on; a recipe is trained if it was not yet.

    Raises
    ------
    DataError
        What the recipe names is neither a recipe, nor a finished run, nor a checkpoint.
    """
    source = recipe.stage1
    assert source is not None
    return _checkpoint(fit(recipe.stage1_recipe()) if source.suffix in RECIPES else source)


def source_checkpoints(recipe: Recipe) -> list[Path]:
    """Checkpoints of the Stage 1 that an adapter starts from; a recipe is trained if need be.

    Of subjects trained together there is one of each: one backbone, and every subject's head.

    Raises
    ------
    DataError
        What the recipe names is neither a recipe, nor a finished run, nor a checkpoint.
    """
    source = recipe.source
    assert source is not None
    if source.suffix in RECIPES:
        source = fit(recipe.source_recipe())
    return [_checkpoint(run) for run in subject_runs(source) or [source]]


def _checkpoint(source: Path) -> Path:
    if source.is_dir():
        if not is_finished(source):
            raise DataError(source, "is no finished run", "Train it to its end with `chasm fit`.")
        source = source / "checkpoints" / "best.ckpt"
    return source


def fit(recipe: Recipe, *, fresh: bool = False, callbacks: Sequence[L.Callback] = ()) -> Path:
    """Train what the recipe says and return the run's folder.

    A finished run is left as it is, an interrupted one goes on; `fresh` starts again. Where a
    recipe asks for several processes, every one of them calls this, and the first one writes.

    Parameters
    ----------
    recipe
        What to train.
    fresh
        Start again.
    callbacks
        Further ones; none of them may change the result, which the run's name does not tell.

    Raises
    ------
    RunInterruptedError
        Training was stopped by a signal; what whole epochs it had is kept.
    TrainingError
        Training diverged.
    DataError, ConfigError
        The data cannot be used, or another process trains the same run.
    """
    speak_once(recipe)
    _check_before(recipe)
    data = training_data(recipe)
    run = run_folder(recipe, data)
    if not fresh and is_finished(run):
        revision = read_provenance(run).get("git_revision")
        log.info("run is current: %s (trained at revision %s)", run, revision)
        return run
    if not is_main_process(recipe):
        return _follow(recipe, data, run, fresh, callbacks)
    run.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run / ".lock", timeout=0):
            return _fit_locked(recipe, data, run, fresh, callbacks)
    except Timeout as error:
        raise RunBusyError(
            run, "another process is training this run", "Wait for it, or change the seed."
        ) from error


def _follow(
    recipe: Recipe, data: TrainingData, run: Path, fresh: bool, callbacks: Sequence[L.Callback]
) -> Path:
    """Train as one of the further processes; what ends training, all meet and the first tells."""
    try:
        return _train(recipe, data, run, fresh, callbacks)
    except TrainingError:
        raise SystemExit(0) from None


def _fit_locked(
    recipe: Recipe, data: TrainingData, run: Path, fresh: bool, callbacks: Sequence[L.Callback]
) -> Path:
    if fresh:
        for old in [*run.glob("checkpoints/*.ckpt"), *run.glob("logs/*/metrics.csv")]:
            old.unlink()
    return _train(recipe, data, run, fresh, callbacks)


def _train(
    recipe: Recipe, data: TrainingData, run: Path, fresh: bool, callbacks: Sequence[L.Callback]
) -> Path:
    writes = is_main_process(recipe)
    last = run / "checkpoints" / "last.ckpt"
    data.setup("fit")
    model = _make_model(recipe)
    # After a Stage 1 was loaded, as Lightning does where it starts several processes.
    L.seed_everything(recipe.seed, workers=True, verbose=False)
    resume = last if last.is_file() and not fresh else None
    if resume is not None:
        read_checkpoint(resume)
        log.info("going on from %s", resume)
    facts = provenance(recipe, data) if writes else {}
    if writes:
        write_text(run / "config.yaml", recipe.resolved())
        write_json(run / "provenance.json", facts | {"status": "running"})
    attempt = len(list((run / "logs").glob("attempt-*")))
    trainer = recipe.make_trainer(
        default_root_dir=str(run),
        logger=[
            CSVLogger(run, name="logs", version=f"attempt-{attempt}"),
            TensorBoardLogger(run, name="tensorboard", version="", default_hp_metric=False),
        ],
        callbacks=[*_callbacks(recipe, run), *callbacks],
        enable_model_summary=False,
        enable_progress_bar=console.is_terminal,
    )
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
    except SystemExit as stop:  # Lightning's answer to SIGTERM and to Ctrl-C
        by = signal.SIGTERM if isinstance(stop, SIGTERMException) else signal.SIGINT
        raise RunInterruptedError(run, trainer.current_epoch, by) from stop
    finally:
        signal.signal(signal.SIGINT, interrupt)
        if writes:
            merge_metrics(run)
    if writes:
        facts["trained"] = _trained(trainer, model)
        facts["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
        if isinstance(data, SubjectsDataModule):
            write_subject_runs(run, recipe, data, facts)
        write_json(run / "provenance.json", facts | {"status": "finished"})
    wait_for_all()  # nobody asks whether the run is finished before it is
    return run


def _make_model(recipe: Recipe) -> L.LightningModule:
    if recipe.trains_together:
        assert recipe.subjects is not None
        return JointModule({name: _stage1_of(recipe) for name in recipe.subjects})
    model = recipe.make_model()
    if recipe.stage1 is not None:
        model.take_stage1(load_module(stage1_checkpoint(recipe)))
    if recipe.source is not None:
        model.take_source([load_module(path) for path in source_checkpoints(recipe)])
    return model


def _stage1_of(recipe: Recipe) -> Stage1Module:
    model = recipe.make_model()
    if not isinstance(model, Stage1Module):
        raise ConfigError(
            "subjects", f"{model.row_name} is no Stage 1", "Train models of parcels together."
        )
    return model


def _check_before(recipe: Recipe) -> None:
    """Find what cannot work before anything is trained: the monitor and the Stage 1."""
    model, monitor = recipe.make_model(), recipe.selection.monitor
    _check_source(recipe, model)
    if recipe.trains_together:
        _stage1_of(recipe)
    if monitor not in model.monitors:
        known = f"Use one of: {', '.join(model.monitors)}."
        raise ConfigError("selection.monitor", f"{monitor!r} is not logged", known)
    source = recipe.stage1
    if source is None and model.needs_stage1:
        problem = f"{model.row_name} builds on a trained Stage 1"
        raise ConfigError("stage1", problem, "Name its recipe, run or checkpoint.")
    if source is None:
        return
    if not model.needs_stage1:
        raise ConfigError("stage1", f"{model.row_name} builds on no Stage 1", "Leave the key out.")
    if source.suffix in RECIPES and recipe.stage1_recipe().make_model().needs_stage1:
        raise ConfigError("stage1", f"{source.name} is no Stage 1", "Name a model of parcels.")


def _check_source(recipe: Recipe, model: EncodingModule) -> None:
    source = recipe.source
    if source is None and model.needs_source:
        problem = f"{model.row_name} starts from a trained Stage 1"
        raise ConfigError("source", problem, "Name its recipe, run or checkpoint.")
    if source is not None and not model.needs_source:
        raise ConfigError("source", f"{model.row_name} starts from nothing", "Leave the key out.")
    check_subjects(recipe)


def check_subjects(recipe: Recipe) -> None:
    """Refuse a new subject that is among those that its source is to be trained on.

    A source that is trained already says itself what it was trained on.
    """
    own, source = subject_name(recipe.make_data().subject), recipe.source
    if source is not None and source.suffix in RECIPES and own in (recipe.subjects or []):
        raise ConfigError(
            "subjects", f"the new subject, {own}, is one of the source's", "Leave it out of them."
        )


def _trained(trainer: L.Trainer, model: L.LightningModule) -> dict[str, Any]:
    selected = trainer.checkpoint_callback
    assert isinstance(selected, ModelCheckpoint)
    requiring = sum(p.numel() for p in model.parameters() if p.requires_grad)
    score = selected.best_model_score
    return {
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "selected_by": selected.monitor,
        "selected_score": None if score is None else float(score),
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "n_trained": getattr(model, "n_trained", requiring),  # a Stage 2 has no such property
    }


def _callbacks(recipe: Recipe, run: Path) -> list[L.Callback]:
    choice = recipe.selection
    callbacks: list[L.Callback] = [
        ModelCheckpoint(
            dirpath=run / "checkpoints",
            filename="best",
            monitor=choice.monitor,
            mode=choice.mode,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        ),
        # One of its own, after the selecting one: `save_last` skips epochs that are not the best.
        ModelCheckpoint(
            dirpath=run / "checkpoints",
            filename="last",
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        ),
        FiniteValidation(choice.monitor),
        SeededSteps(recipe.seed),
        StopTogether(),
        LearningRateMonitor(logging_interval="epoch"),
        progress_callback(),
    ]
    if choice.patience is not None:
        callbacks.append(
            EarlyStopping(
                choice.monitor,
                mode=choice.mode,
                patience=choice.patience,
                check_on_train_epoch_end=True,
            )
        )
    return callbacks


def load(run: Path, checkpoint: str = "best") -> tuple[EncodingModule, NSDDataModule, Recipe]:
    """Load a run: its model with the selected weights, its data module, its recipe.

    Raises
    ------
    DataError
        The folder is no finished run.
    """
    config, weights = run / "config.yaml", run / "checkpoints" / f"{checkpoint}.ckpt"
    for path in (config, weights):
        if not path.is_file():
            raise DataError(
                path, "is missing: this folder is no finished run", "Train it with `chasm fit`."
            )
    recipe = Recipe(["-c", str(config)])
    return load_module(weights), recipe.make_data(), recipe
