"""Optuna studies: where they are kept, what they are of, and trials whose process is gone.

Every running trial holds the lock of a file of its own. Whoever looks for the next trial first
looks for running ones whose lock nobody holds: their process was killed. They are failed and run
again. Databases on a server are also reached from machines that see none of these files; there
Optuna's heartbeat does the same after some minutes.
"""

from __future__ import annotations

import logging
import platform
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, StorageInternalError
from optuna.storages import (
    BaseStorage,
    JournalStorage,
    RDBStorage,
    RetryHeartbeatStaleTrialCallback,
    fail_stale_trials,
)
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from chasm.errors import ConfigError, DataError

log = logging.getLogger(__name__)

FORMAT = 1
"""Of what a study keeps of its sweep."""

FACTS = "chasm"
"""Attribute of a study that holds it."""

QUEUED = "queued"
"""Attribute of a study that has all that it tries first."""

RETRIES = 3
"""How often a trial is run again whose process was killed."""

HEARTBEAT, GRACE = 60, 180
"""Seconds between signs of life in a database on a server, and until a trial counts as dead."""

PATIENCE = 10.0
"""Seconds in which another machine may finish making a study."""

_SQLITE, _JOURNAL = (".db", ".sqlite", ".sqlite3"), (".journal", ".log", ".jsonl")
_BUSY = 60.0


def quiet() -> None:
    """Leave it to this package to say what happens in a study."""
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)


@dataclass(frozen=True)
class Storage:
    """Where studies are kept.

    Attributes
    ----------
    kind
        ``sqlite`` and ``journal`` are files, ``server`` any database URL of SQLAlchemy.
    place
        Path or URL; it may hold a password.
    locks
        Folder of lock files, beside the file.
    """

    kind: Literal["sqlite", "journal", "server"]
    place: str = field(repr=False)
    locks: Path

    @classmethod
    def of(cls, text: str | None, folder: Path) -> Storage:
        """Tell the kind of storage by its name.

        Parameters
        ----------
        text
            File or URL; None for ``study.db`` in `folder`.
        folder
            Of the study.

        Raises
        ------
        ConfigError
            Neither a file that ends as one of them nor a URL.
        """
        text = str(folder / "study.db") if text is None else text
        file = text.removeprefix("sqlite:///")
        if "://" in file:
            return cls("server", text, folder / ".locks")
        path = Path(file)
        locks = path.with_name(f".{path.name}.locks")
        if path.suffix in _SQLITE or file != text:
            return cls("sqlite", str(path), locks)
        if path.suffix in _JOURNAL:
            return cls("journal", str(path), locks)
        raise ConfigError(
            "--storage",
            f"{text!r} is neither a file of a study nor a URL",
            f"End a file in {_SQLITE[0]} (SQLite) or {_JOURNAL[0]}, or give e.g. "
            "postgresql://user@host/database.",
        )

    @property
    def name(self) -> str:
        """How it is shown and logged: without a password."""
        if self.kind != "server":
            return self.place
        try:
            url = make_url(self.place)
        except (SQLAlchemyError, ValueError):
            return self.place.partition("://")[0] + "://..."
        return url.set(query={}).render_as_string(hide_password=True)

    @property
    def turn(self) -> FileLock:
        """Lock of who takes the next trial."""
        self.locks.mkdir(parents=True, exist_ok=True)
        return FileLock(self.locks / "turn")

    def lock(self, study: str, number: int | str) -> FileLock:
        """Lock of a running trial by its number, or of the run that it trains by its name."""
        return FileLock(self._lock_path(study, number))

    def _lock_path(self, study: str, number: int | str) -> Path:
        # A file system of several machines may tell each that nobody holds another's lock.
        where = f".{platform.node()}" if self.kind == "server" else ""
        return self.locks / f"{study}.{number}{where}"

    def is_dead(self, study: str, number: int) -> bool:
        """Whether the process of a running trial is gone; False where that cannot be told.

        Call it with the turn taken.
        """
        if not self._lock_path(study, number).exists():
            # Of a file: killed between its start and its lock. Of a server: on another machine.
            return self.kind != "server"
        try:
            with self.lock(study, number).acquire(timeout=0):
                return True
        except Timeout:
            return False

    def forget(self, study: str, number: int) -> None:
        """Remove the lock of a trial that ended."""
        self._lock_path(study, number).unlink(missing_ok=True)

    def open(self) -> BaseStorage:
        """Open the storage; it is made where there is none.

        Raises
        ------
        DataError
            It cannot be reached, is damaged, or another version of Optuna made it.
        ConfigError
            The URL is none, or its driver is not installed.
        """
        try:
            opened = self._open()
            opened.get_all_studies()  # a journal is not read before
            return opened
        except ImportError as error:
            raise ConfigError(
                self.name, "the driver of this database is not installed",
                "Install it, e.g. `pip install psycopg2-binary` or `pip install pymysql`.",
            ) from error  # fmt: skip
        except RuntimeError as error:
            if "no longer compatible" not in str(error):
                raise
            url = f"sqlite:///{self.place}" if self.kind == "sqlite" else self.name
            raise DataError(
                self.name, f"was written by another version of Optuna than {optuna.__version__}",
                f"Run `optuna storage upgrade --storage {url}`, or give another --storage.",
            ) from error  # fmt: skip
        except (SQLAlchemyError, StorageInternalError, OSError) as error:
            raise DataError(
                self.name, f"is no storage that can be used ({self._reason(error)})",
                "Give another --storage, or restore this one.",
            ) from error  # fmt: skip
        except (ValueError, KeyError, TypeError) as error:  # a journal's lines, a URL's port
            raise DataError(
                self.name, f"is damaged or no {self.kind} storage ({type(error).__name__})",
                "Give another --storage, or restore this one.",
            ) from error  # fmt: skip

    def _open(self) -> BaseStorage:
        if self.kind == "journal":
            Path(self.place).parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(self.place))
        if self.kind == "sqlite":
            Path(self.place).parent.mkdir(parents=True, exist_ok=True)
            options = {"connect_args": {"timeout": _BUSY}}
            return RDBStorage(f"sqlite:///{self.place}", engine_kwargs=options)
        return RDBStorage(
            self.place,
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=_again(),
        )

    def _reason(self, error: Exception) -> str:
        text = str(getattr(error, "orig", None) or error).partition("\n")[0]
        return " ".join(text.replace(self.place, self.name).split())


def _again(most: int | None = RETRIES) -> RetryHeartbeatStaleTrialCallback:
    return RetryHeartbeatStaleTrialCallback(most, inherit_intermediate_values=True)


def open_study(
    storage: Storage,
    name: str,
    mode: Literal["min", "max"],
    facts: Mapping[str, Any],
    queue: Iterable[Mapping[str, Any]] = (),
) -> Study:
    """Open a study, or make it.

    Parameters
    ----------
    storage, name
        Where it is.
    mode
        Whether the objective should be small or large.
    facts
        What it is a study of: plain types by name. They are kept with it.
    queue
        Values that a new study tries first.

    Raises
    ------
    DataError
        The storage cannot be used, or the study is of something else.
    """
    with storage.turn:
        opened = storage.open()
        try:
            study = optuna.create_study(
                storage=opened,
                study_name=name,
                direction="minimize" if mode == "min" else "maximize",
            )
        except DuplicatedStudyError:
            study = optuna.load_study(storage=opened, study_name=name)
            _check_facts(storage, study, facts)
        else:
            study.set_user_attr(FACTS, {"format": FORMAT, **facts})
        if not study.user_attrs.get(QUEUED):  # new, or stopped while it was made
            there = [trial.system_attrs.get("fixed_params") for trial in study.get_trials()]
            for values in queue:
                if dict(values) not in there:
                    study.enqueue_trial(dict(values))
            study.set_user_attr(QUEUED, True)
        return study


def load_study(storage: Storage, name: str) -> Study:
    """Open a study that is there."""
    return optuna.load_study(storage=storage.open(), study_name=name)


def _check_facts(storage: Storage, study: Study, facts: Mapping[str, Any]) -> None:
    where = f"{storage.name}: study {study.study_name}"
    remedy = "Give another --study, or the sweep, data and options it was begun with."
    deadline = time.monotonic() + PATIENCE
    # Another machine may be making it.
    while (found := study.user_attrs.get(FACTS)) is None and time.monotonic() < deadline:
        time.sleep(0.5)
    if not isinstance(found, dict):
        raise DataError(where, "was not made by `chasm tune`", "Give another --study.")
    if found.get("format") != FORMAT:
        problem = f"has format {found.get('format')}, this version reads format {FORMAT}"
        raise DataError(where, f"was written by another version: {problem}", remedy)
    for name, value in facts.items():
        if found.get(name) != value:
            raise DataError(where, f"was begun with another {name}", remedy)


def counts(study: Study) -> Counter[TrialState]:
    """Count the trials of a study by state."""
    return Counter(trial.state for trial in study.get_trials(deepcopy=False))


def n_finished(study: Study) -> int:
    """Count complete and pruned trials."""
    found = counts(study)
    return found[TrialState.COMPLETE] + found[TrialState.PRUNED]


def bring_back_dead(study: Study, storage: Storage) -> None:
    """Fail running trials whose process is gone, and queue them again; take the turn before."""
    fail_stale_trials(study)
    dead = {t.number for t in _running(study) if storage.is_dead(study.study_name, t.number)}
    # Look again: a trial gives its lock back when it has ended, perhaps just now.
    for trial in _running(study) if dead else ():
        if trial.number in dead:
            study.tell(trial.number, state=TrialState.FAIL)
            storage.forget(study.study_name, trial.number)
            queue_again(study, trial.number)


def _running(study: Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def queue_again(study: Study, number: int, *, asked: bool = False) -> None:
    """Queue a stopped trial again, to go on from its last whole epoch.

    One whose process was killed too often is left; one that was asked to stop never is.
    """
    (trial,) = (t for t in study.get_trials(deepcopy=True) if t.number == number)
    if asked:
        log.info("trial %d was stopped; it is queued again", number)
        _again(None)(study, trial)
        return
    if len(RetryHeartbeatStaleTrialCallback.retry_history(trial)) < RETRIES:
        log.warning("trial %d was stopped before its end; it is queued again", number)
    else:
        log.error("trial %d was stopped %d times; it is left", number, RETRIES + 1)
    _again()(study, trial)


def twin_of(study: Study, trial: FrozenTrial | optuna.Trial) -> FrozenTrial | None:
    """Find a finished trial with the same values."""
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    found = study.get_trials(deepcopy=False, states=states)
    return next((t for t in found if t.params == trial.params), None)
