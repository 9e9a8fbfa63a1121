"""Training several recipes at once, each in a process of its own.

On a CPU a small model gains little from more threads, so that two processes of one thread train
two recipes in about the time of one. Nothing but whole runs comes back, as from `fit`.
"""

from __future__ import annotations

import logging
import logging.handlers
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import Any, NamedTuple

import threadpoolctl
import torch

from chasm.errors import ChasmError
from chasm.io import write_text
from chasm.progress import quiet_lightning
from chasm.training.launch import refuse_several
from chasm.training.recipes import Recipe
from chasm.training.runs import RunInterruptedError, fit

log = logging.getLogger(__name__)

MAX_JOBS = 4
"""Processes that are started unless more are asked for."""

_PACKAGE = "chasm"


class Fitted(NamedTuple):
    """What became of a recipe: its run, or the error it ended with."""

    run: Path | None
    error: str = ""


def default_jobs() -> int:
    """One on a GPU, else one for each thread of torch, at most `MAX_JOBS`."""
    return 1 if torch.cuda.is_available() else max(1, min(MAX_JOBS, torch.get_num_threads()))


def fit_side_by_side(
    recipes: Mapping[str, Recipe], jobs: int = 1, *, fresh: bool = False
) -> dict[str, Fitted]:
    """Train recipes, `jobs` of them at a time; one that fails does not stop the others.

    The threads of torch are shared out among the processes; one job trains in this process, with
    all of them.

    Parameters
    ----------
    recipes
        By name; no two of the same run, and none that builds on a run among them.
    jobs
        Processes.
    fresh
        Train again although a run is current.

    Raises
    ------
    RunInterruptedError
        Training was stopped by a signal.
    """
    jobs = min(jobs, len(recipes))
    if jobs <= 1:
        return {name: _fitted(recipe, fresh) for name, recipe in recipes.items()}
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // jobs)
    found: dict[str, Fitted] = {}
    with (
        heard(context) as queue,
        ProcessPoolExecutor(jobs, context, begin, (queue, threads, os.getpid())) as pool,
    ):
        waiting = {
            pool.submit(_fit_apart, name, recipe.resolved(), fresh): name
            for name, recipe in recipes.items()
        }
        try:
            for done in as_completed(waiting):
                found[waiting[done]] = _result(done)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {name: found[name] for name in recipes}


def _result(done: Future[Fitted]) -> Fitted:
    try:
        return done.result()
    except BrokenProcessPool:
        return Fitted(None, "a process that trains ended unexpectedly (out of memory?)")


def _fitted(recipe: Recipe, fresh: bool) -> Fitted:
    try:
        refuse_several(recipe, "training side by side")
        return Fitted(fit(recipe, fresh=fresh))
    except RunInterruptedError:
        raise
    except (ChasmError, RuntimeError, OSError) as error:
        expected = isinstance(error, ChasmError)
        log.error("%s failed: %s", recipe.name, error, exc_info=not expected)
        return Fitted(None, " ".join(str(error).split()))


@contextmanager
def heard(context: SpawnContext) -> Iterator[Any]:
    """Give a queue whose log records are handled here, as if they were said here."""
    queue = context.Queue()
    listener = logging.handlers.QueueListener(queue, _Here())
    listener.start()
    try:
        yield queue
    finally:
        listener.stop()
        queue.close()


class _Here(logging.Handler):
    """Gives a record to the logger of its name in this process."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger(record.name).handle(record)


# In the other processes.


def begin(queue: Any, threads: int, parent: int) -> None:
    """Share the cores, log to the parent, and end when the parent does."""
    torch.set_num_threads(threads)
    threadpoolctl.threadpool_limits(threads)
    # No progress bars, and no advice of libraries, from several processes on one terminal.
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    logger = logging.getLogger(_PACKAGE)
    logger.handlers[:] = [logging.handlers.QueueHandler(queue)]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    quiet_lightning()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Stop training, with its last whole epoch kept, when the parent is gone."""
    while os.getppid() == parent:
        time.sleep(2)
    os.kill(os.getpid(), signal.SIGTERM)


class Named(logging.Filter):
    """Begins every message with the name of the recipe."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Put the name before the message."""
        record.msg, record.args = f"{self.name}: {record.getMessage()}", None
        return True


def _fit_apart(name: str, resolved: str, fresh: bool) -> Fitted:
    handler = logging.getLogger(_PACKAGE).handlers[0]
    handler.filters[:] = [Named(name)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        write_text(path, resolved)
        try:
            return _fitted(Recipe(["-c", str(path)]), fresh)
        except RunInterruptedError as error:
            return Fitted(None, str(error))
