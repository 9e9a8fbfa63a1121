"""The house itself: import directions, light start-up, whole files."""

import subprocess
import sys
from pathlib import Path

import pytest

from chasm.io import atomic_folder, atomic_path, digest, write_json

ROOT = Path(__file__).parents[1]


def test_import_directions():
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_help_and_facts_start_without_heavy_packages():
    code = (
        "import sys; from chasm.cli import main; import chasm.data.nsd; main(['--help']);"
        "heavy = {'torch', 'lightning', 'timm', 'nilearn', 'matplotlib'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "simulate" in done.stdout


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a" / "file.nii.gz"
    with atomic_path(path) as temporary:
        assert temporary.name.endswith(".nii.gz")
        temporary.write_text("one")
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text(str(1 / 0))
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["file.nii.gz"]


def test_a_failed_folder_leaves_what_was_there(tmp_path):
    folder = tmp_path / "result"
    with atomic_folder(folder) as temporary:
        write_json(temporary / "x.json", {"a": 1})
    with pytest.raises(ZeroDivisionError), atomic_folder(folder) as temporary:
        write_json(temporary / "x.json", {"a": 1 / 0})
    assert [p.name for p in folder.iterdir()] == ["x.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["result"]


def test_a_digest_depends_on_values_not_on_order():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
