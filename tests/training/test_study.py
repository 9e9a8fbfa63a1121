"""Studies: where they are kept, and trials whose process is gone."""

import sqlite3
import subprocess
import sys
import time

import pytest
from optuna.trial import TrialState

from chasm.errors import ChasmError, ConfigError, DataError
from chasm.training import study as studies
from chasm.training.study import Storage, bring_back_dead, counts, open_study, quiet


@pytest.fixture(autouse=True)
def no_advice():
    """Optuna says nothing of its own."""
    quiet()


@pytest.mark.parametrize("kind", ["db", "journal"])
def test_a_trial_whose_process_is_gone_is_run_again(kind, tmp_path):
    storage = Storage.of(str(tmp_path / f"s.{kind}"), tmp_path)
    study = open_study(storage, "s", "min", {})
    dead, alive, unlocked = (study.ask() for _ in range(3))
    for trial in (dead, alive, unlocked):
        trial.suggest_float("x", 0, 1)
        trial.report(3.0, 0)
    holder = subprocess.Popen(
        [sys.executable, "-c",
         "import sys; from filelock import FileLock; locks = [FileLock(p) for p in sys.argv[1:]]\n"
         "for lock in locks: lock.acquire()\nprint('held', flush=True); sys.stdin.read()",
         str(storage.locks / f"s.{dead.number}")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    with storage.lock("s", alive.number), storage.turn:
        bring_back_dead(study, storage)
        states = [t.state for t in study.trials[:3]]
        assert states == [TrialState.RUNNING, TrialState.RUNNING, TrialState.FAIL]
        holder.kill()
        holder.communicate()
        bring_back_dead(study, storage)
        bring_back_dead(study, storage)
    found = study.trials
    assert [t.state for t in found[:3]] == [
        TrialState.FAIL, TrialState.RUNNING, TrialState.FAIL
    ]  # fmt: skip
    assert [t.state for t in found[3:]] == [TrialState.WAITING] * 2
    assert [t.params for t in found[3:]] == [found[2].params, found[0].params]
    assert found[4].intermediate_values == {0: 3.0}


def test_a_trial_is_not_run_again_for_ever(tmp_path):
    storage = Storage.of(str(tmp_path / "s.db"), tmp_path)
    study = open_study(storage, "s", "min", {})
    for _ in range(studies.RETRIES + 1):
        study.ask().suggest_float("x", 0, 1)
        bring_back_dead(study, storage)
    assert counts(study) == {TrialState.FAIL: studies.RETRIES + 1}


def test_a_server_is_asked_for_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "HEARTBEAT", 1)
    monkeypatch.setattr(studies, "GRACE", 1)
    storage = Storage("server", f"sqlite:///{tmp_path / 's.db'}", tmp_path / ".locks")
    study = open_study(storage, "s", "min", {})
    dead, elsewhere = study.ask(), study.ask()
    storage.open().record_heartbeat(dead._trial_id)
    time.sleep(2.1)
    storage.open().record_heartbeat(elsewhere._trial_id)
    bring_back_dead(study, storage)
    states = [t.state for t in study.trials]
    assert states == [TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING]


@pytest.mark.parametrize("kind", ["db", "journal"])
def test_a_damaged_storage_is_named(kind, tmp_path):
    path = tmp_path / f"s.{kind}"
    path.write_text("this is no study\n" * 300)
    with pytest.raises(DataError, match=rf"s\.{kind}.*Give another --storage"):
        open_study(Storage.of(str(path), tmp_path), "s", "min", {})


@pytest.mark.parametrize("revision", ["v3.0.0.a", "v99.0.0.a"])
def test_a_storage_of_another_optuna_is_named(revision, tmp_path):
    path = tmp_path / "s.db"
    storage = Storage.of(str(path), tmp_path)
    open_study(storage, "s", "min", {})
    with sqlite3.connect(path) as connection:
        connection.execute("update alembic_version set version_num = ?", (revision,))
    with pytest.raises(DataError, match=r"s\.db: was written by another version of Optuna.*upgra"):
        open_study(storage, "s", "min", {})


def test_a_study_of_another_format_is_named(tmp_path, monkeypatch):
    storage = Storage.of(str(tmp_path / "s.journal"), tmp_path)
    open_study(storage, "s", "min", {})
    monkeypatch.setattr(studies, "FORMAT", studies.FORMAT + 1)
    with pytest.raises(DataError, match=r"study s: was written by another version.*format 1"):
        open_study(storage, "s", "min", {})


@pytest.mark.parametrize(("text", "kind"), [
    (None, "sqlite"), ("a.db", "sqlite"), ("sqlite:///a/b", "sqlite"), ("a.journal", "journal"),
    ("a.log", "journal"), ("postgresql://u@h/d", "server"), ("mysql+pymysql://u@h/d", "server"),
])  # fmt: skip
def test_storages_are_told_by_their_names(text, kind, tmp_path):
    assert Storage.of(text, tmp_path).kind == kind


def test_other_storages_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--storage: 'study.txt'.*\.db.*\.journal"):
        Storage.of("study.txt", tmp_path)
    with pytest.raises(ConfigError, match="driver of this database"):
        Storage.of("oracle://u:secret@h/d", tmp_path).open()
    for url in ("nodb://u:secret@h/d", "postgresql://u:secret@h:x/d"):
        with pytest.raises(ChasmError) as caught:
            Storage.of(url, tmp_path).open()
        assert "secret" not in str(caught.value)
