"""Runs: a folder that holds all of one training, found again by what made it.

A run's folder is ``runs/<dataset>/<subject>/<recipe>-<digest>``; the digest covers the
resolved recipe and the fingerprints of the data. The same command therefore finds its run:
finished, it is current; interrupted, it goes on from the last whole epoch.
"""

from __future__ import annotations

import json
import logging
import signal
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
from filelock import FileLock, Timeout
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from chasm.data.datamodule import NSDDataModule, subject_name
from chasm.errors import ConfigError, DataError, TrainingError
from chasm.io import atomic_path, digest, sha256_of_file, write_json, write_text
from chasm.progress import console
from chasm.training.base import EncodingModule
from chasm.training.callbacks import FiniteValidation, SeededSteps, progress_callback
from chasm.training.checkpoints import load_module, read_checkpoint
from chasm.training.provenance import provenance
from chasm.training.recipes import Recipe

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

RESULT_VERSION = 2
"""Part of a run's digest: raised when a change of the code changes what training gives."""


class RunInterruptedError(TrainingError):
    """Training was stopped from outside before its end."""

    def __init__(self, run: Path, epoch: int, by: signal.Signals) -> None:
        super().__init__(
            run,
            f"training stopped in epoch {epoch + 1} ({by.name})",
            "Give the same command again to go on from the last whole epoch.",
        )
        self.exit_status = 128 + by


def run_folder(recipe: Recipe, data: NSDDataModule) -> Path:
    """Folder of the run that this recipe makes on these data."""
    settings = recipe.settings()
    settings.pop("runs", None)
    for part, keys in _WITHOUT_EFFECT.items():
        for key in keys:
            settings[part].pop(key, None)
    settings["result_version"] = RESULT_VERSION
    settings["store"] = data.store.fingerprint
    settings["tokens"] = data.tokens.fingerprint
    if recipe.stage1 is not None:
        settings["stage1"] = sha256_of_file(stage1_checkpoint(recipe))
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
    if source.suffix in RECIPES:
        source = fit(recipe.stage1_recipe())
    if source.is_dir():
        if not is_finished(source):
            raise DataError(source, "is no finished run", "Train it to its end with `chasm fit`.")
        source = source / "checkpoints" / "best.ckpt"
    return source


def fit(recipe: Recipe, *, fresh: bool = False) -> Path:
    """Train what the recipe says and return the run's folder.

    A finished run is left as it is, an interrupted one goes on; `fresh` starts again.

    Raises
    ------
    RunInterruptedError
        Training was stopped by a signal; what whole epochs it had is kept.
    TrainingError
        Training diverged.
    DataError, ConfigError
        The data cannot be used, or another process trains the same run.
    """
    _check_before(recipe)
    data = recipe.make_data()
    run = run_folder(recipe, data)
    if not fresh and is_finished(run):
        revision = read_provenance(run).get("git_revision")
        log.info("run is current: %s (trained at revision %s)", run, revision)
        return run
    run.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run / ".lock", timeout=0):
            return _fit_locked(recipe, data, run, fresh)
    except Timeout as error:
        raise ConfigError(
            run, "another process is training this run", "Wait for it, or change the seed."
        ) from error


def _fit_locked(recipe: Recipe, data: NSDDataModule, run: Path, fresh: bool) -> Path:
    last = run / "checkpoints" / "last.ckpt"
    if fresh:
        for old in [*run.glob("checkpoints/*.ckpt"), *run.glob("logs/*/metrics.csv")]:
            old.unlink()
    data.setup("fit")
    L.seed_everything(recipe.seed, workers=True, verbose=False)
    model = recipe.make_model()
    if recipe.stage1 is not None:
        model.take_stage1(load_module(stage1_checkpoint(recipe)))
    resume = last if last.is_file() else None
    if resume is not None:
        read_checkpoint(resume)
        log.info("going on from %s", resume)
    write_text(run / "config.yaml", recipe.resolved())
    facts = provenance(recipe, data)
    write_json(run / "provenance.json", facts | {"status": "running"})
    attempt = len(list((run / "logs").glob("attempt-*")))
    trainer = recipe.make_trainer(
        default_root_dir=str(run),
        logger=[
            CSVLogger(run, name="logs", version=f"attempt-{attempt}"),
            TensorBoardLogger(run, name="tensorboard", version="", default_hp_metric=False),
        ],
        callbacks=_callbacks(recipe, run),
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
        merge_metrics(run)
    facts["trained"] = _trained(trainer, model)
    facts["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(run / "provenance.json", facts | {"status": "finished"})
    return run


def _check_before(recipe: Recipe) -> None:
    """Find what cannot work before anything is trained: the monitor and the Stage 1."""
    model, monitor = recipe.make_model(), recipe.selection.monitor
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


def _trained(trainer: L.Trainer, model: L.LightningModule) -> dict[str, Any]:
    selected = trainer.checkpoint_callback
    assert isinstance(selected, ModelCheckpoint)
    score = selected.best_model_score
    return {
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "selected_by": selected.monitor,
        "selected_score": None if score is None else float(score),
        "n_parameters": sum(p.numel() for p in model.parameters()),
    }


def _callbacks(recipe: Recipe, run: Path) -> list[L.Callback]:
    choice = recipe.selection
    callbacks: list[L.Callback] = [
        ModelCheckpoint(
            dirpath=run / "checkpoints",
            filename="best",
            monitor=choice.monitor,
            mode=choice.mode,
            save_last=True,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        ),
        FiniteValidation(choice.monitor),
        SeededSteps(recipe.seed),
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


def merge_metrics(run: Path) -> None:
    """Join the logs of all attempts of a run into ``metrics.csv``, the later one wins."""
    tables = []
    for path in sorted(
        run.glob("logs/attempt-*/metrics.csv"), key=lambda p: int(p.parent.name.split("-")[1])
    ):
        try:
            tables.append(pd.read_csv(path))
        except pd.errors.EmptyDataError:
            continue
    if not tables:
        return
    joined = tables[0]
    for table in tables[1:]:
        joined = pd.concat([joined[joined["epoch"] < table["epoch"].min()], table])
    merged = joined.groupby("epoch", as_index=False).last()
    with atomic_path(run / "metrics.csv") as temporary:
        merged.to_csv(temporary, index=False)


def is_finished(run: Path) -> bool:
    """Whether training ended as its recipe says."""
    path = run / "provenance.json"
    if not path.is_file() or not (run / "checkpoints" / "best.ckpt").is_file():
        return False
    return read_provenance(run).get("status") == "finished"


def read_provenance(run: Path) -> dict[str, Any]:
    """Read a run's provenance.json."""
    path = run / "provenance.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise DataError(
            path, f"is not a run's provenance ({error})", "Train again with --fresh."
        ) from error


def newest_run(runs: Path, dataset: str, subject: int | str, name: str) -> Path | None:
    """Find the most recently finished run of a recipe on a subject."""
    folders = (runs / dataset / subject_name(subject)).glob(f"{name}-*")
    finished = [f for f in folders if is_finished(f)]
    return max(finished, key=lambda f: (f / "provenance.json").stat().st_mtime, default=None)


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
