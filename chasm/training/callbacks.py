"""Callbacks: reproducible steps, progress on a terminal or in a log."""

from __future__ import annotations

import logging
import signal
import time
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities.exceptions import SIGTERMException

from chasm.errors import TrainingError
from chasm.processes import any_of
from chasm.progress import console

log = logging.getLogger(__name__)


class SeededSteps(L.Callback):
    """Seed every training step by (seed, step, rank).

    Dropout and token noise then depend on where training is, not on how it got there: a run
    that was interrupted and resumed equals one that was not.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed torch for this step."""
        step = self.seed * 1_000_003 + trainer.global_step
        torch.manual_seed(step * 1009 + trainer.global_rank)


class StopTogether(L.Callback):
    """Let processes that train together end at the same step when any of them gets SIGTERM.

    Lightning's own handler speaks to the other processes whenever the signal comes, in the midst
    of what they are telling each other. This one waits for the beginning of a batch. A single
    process is left to Lightning.
    """

    def __init__(self) -> None:
        self.asked = False

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen."""
        self._listen(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen, where there was no sanity check."""
        self._listen(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End, if any process was asked to."""
        self._end_if_asked()

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """End, if any process was asked to."""
        self._end_if_asked()

    def _listen(self, trainer: L.Trainer) -> None:
        if trainer.world_size > 1:  # Lightning puts the earlier handler back
            signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def _end_if_asked(self) -> None:
        if any_of(self.asked):
            raise SIGTERMException


class FiniteValidation(L.Callback):
    """End training when the value that selects the checkpoint is not finite.

    Parameters
    ----------
    monitor
        Name of the logged value.

    Raises
    ------
    TrainingError
        At the end of the first validation where it is NaN or infinite.
    """

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the value of this validation."""
        value = trainer.callback_metrics.get(self.monitor)
        if trainer.sanity_checking or value is None or bool(torch.isfinite(value)):
            return
        raise TrainingError(
            trainer.default_root_dir,
            f"{self.monitor} is {float(value)} in epoch {trainer.current_epoch + 1}",
            "Lower the learning rate or clip gradients, then train with --fresh.",
        )


class EpochLines(L.Callback):
    """A line every few seconds with the epoch and its validation values, for logs and pipes."""

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds
        self._last = 0.0

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log when it is time, and at the end."""
        last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
        if not trainer.is_global_zero or (
            time.monotonic() - self._last < self.seconds and not last_epoch
        ):
            return
        self._last = time.monotonic()
        # Not val/<subject>/...: what is of one of several subjects.
        shown = {k: v for k, v in trainer.callback_metrics.items() if k.count("/") == 1}
        text = "  ".join(
            f"{k.removeprefix('val/')} {float(v):.4f}"
            for k, v in sorted(shown.items())
            if k.startswith("val/")
        )
        log.info(
            "epoch %d of %s   validation: %s", trainer.current_epoch + 1, trainer.max_epochs, text
        )


def progress_callback() -> L.Callback:
    """Rich bars on a terminal, lines elsewhere."""
    return RichProgressBar(leave=False) if console.is_terminal else EpochLines()
