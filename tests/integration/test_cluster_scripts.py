"""The job scripts of docs/slurm, run with a `srun`, `scontrol` and `chasm` that only take notes."""

import itertools
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "docs" / "slurm"

SRUN = """#!/bin/bash
echo "srun $*" >> "$NOTES"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
NOTE = """#!/bin/bash
echo "{name} $*" >> "$NOTES"
echo "runs/nsd/subj01/stage2-0123abcd"
exit ${{{name}_STATUS:-0}}
"""


@pytest.fixture
def submit(tmp_path):
    """Run a script as `sbatch` would; give its status and what was called, `srun` aside."""
    commands, own = tmp_path / "bin", tmp_path / ".venv" / "bin"
    for folder, name, text in (
        (commands, "srun", SRUN),
        (commands, "scontrol", NOTE.format(name="scontrol")),
        (own, "chasm", NOTE.format(name="chasm")),
        (own, "python", NOTE.format(name="python")),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    notes = tmp_path / "notes"

    def run(script, *args, **environment):
        notes.write_text("")
        clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        own_environment = {
            "NOTES": str(notes), "PATH": f"{commands}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "77", "SLURM_ARRAY_JOB_ID": "70",
        }  # fmt: skip
        done = subprocess.run(
            ["bash", str(SLURM / script), *args],
            env=clean | own_environment | environment,
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        lines = notes.read_text().splitlines()
        started = [line.removeprefix("srun ") for line in lines if line.startswith("srun ")]
        return done, [line for line in lines if not line.startswith("srun ")], started

    return run


def value(line, key):
    (found,) = re.findall(rf"{key} (\S+)", line)
    return found


def test_every_combination_is_a_task_of_its_own(submit):
    subjects, seeds, suites = ["1", "2", "7"], ["0", "3"], ["fit", "cls", "swap"]
    lists = {"SUBJECTS": "1 2 7", "SEEDS": "0 3", "SUITES": "fit cls swap"}
    seen = []
    for task in range(18):
        done, (line,), _ = submit("array.sbatch", SLURM_ARRAY_TASK_ID=str(task), **lists)
        assert done.returncode == 0, done.stderr
        command = line.split()
        suite = "fit" if command[:2] == ["chasm", "run"] else command[3]
        seen.append((value(line, "--data.subject"), value(line, "--seed_everything"), suite))
        assert "-c experiments/nsd/stage2.yaml" in line
    assert seen == list(itertools.product(subjects, seeds, suites))


def test_by_default_there_are_eight_subjects_and_five_seeds(submit):
    _, (first,), _ = submit("array.sbatch", SLURM_ARRAY_TASK_ID="0")
    assert (value(first, "--data.subject"), value(first, "--seed_everything")) == ("1", "0")
    _, (last,), _ = submit("array.sbatch", SLURM_ARRAY_TASK_ID="39")
    assert (value(last, "--data.subject"), value(last, "--seed_everything")) == ("8", "4")
    done, called, _ = submit("array.sbatch", SLURM_ARRAY_TASK_ID="40")
    assert done.returncode == 2
    assert "submit with --array=0-39" in done.stderr
    assert not called


def test_data_are_made_before_tokens_and_a_failure_ends_it(submit):
    task = {"SLURM_ARRAY_TASK_ID": "6", "SEEDS": "0", "SUITES": "data", "NSD": "/nsd"}
    _, called, _ = submit("array.sbatch", **task)
    assert called == [
        "chasm prepare nsd --nsd /nsd --subject 7 --out data/nsd/subj07.h5",
        "chasm extract -c experiments/nsd/stage2.yaml --data.subject 7 --data.dataset_dir data/nsd",
    ]
    done, called, _ = submit("array.sbatch", **task, chasm_STATUS="2")
    assert done.returncode == 2
    assert len(called) == 1


@pytest.mark.parametrize(
    ("script", "job"), [("array.sbatch", "70_3"), ("nodes.sbatch", "77"), ("sweep.sbatch", "70_3")]
)
@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(0, 0, False), (143, 0, True), (143, 50, False), (2, 0, False), (130, 0, False)],
)
def test_only_what_was_stopped_is_queued_again(submit, script, job, status, restarts, requeued):
    done, called, _ = submit(
        script, SLURM_ARRAY_TASK_ID="3", SLURM_RESTART_COUNT=str(restarts),
        SLURM_NTASKS_PER_NODE="4", SLURM_NNODES="2", STORAGE="s.journal", STUDY="s",
        chasm_STATUS=str(status),
    )  # fmt: skip
    assert done.returncode == status
    assert (called[-1] == f"scontrol requeue {job}") == requeued


def test_nodes_train_together_and_one_process_tests(submit):
    args = ("-c", "experiments/nsd/stage1.yaml", "--data.subject", "1")
    _, called, started = submit("nodes.sbatch", *args, SLURM_NTASKS_PER_NODE="4", SLURM_NNODES="2")
    assert called == [
        "chasm fit -c experiments/nsd/stage1.yaml --data.subject 1"
        " --trainer.devices 4 --trainer.num_nodes 2",
        "chasm test runs/nsd/subj01/stage2-0123abcd",
    ]
    assert "--ntasks=1" not in started[0]
    assert "--ntasks=1" in started[1]


def test_scripts_ask_for_what_the_docs_promise(submit):
    for script in SLURM.glob("*.sbatch"):
        text = script.read_text()
        options = re.findall(r"^#SBATCH (--\S+)", text, re.MULTILINE)
        assert {"--requeue", "--signal=TERM@120", "--open-mode=append"} <= set(options), script
        assert any(option.startswith("--ntasks-per-node=") for option in options), script
        assert script.name in (ROOT / "docs" / "cluster.md").read_text()
    # Options that the commands know, with any recipe key among them.
    from chasm.training.recipes import Recipe

    recipe = ROOT / "experiments" / "nsd" / "stage2.yaml"
    keys = "--trainer.devices 4 --trainer.num_nodes 2 --data.subject 1 --seed_everything 3"
    assert Recipe(["-c", str(recipe), *keys.split()]).n_processes == 8
