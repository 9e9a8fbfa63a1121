"""Two processes on a CPU give what one gives, and a run of several is one run."""

import os
import signal
import socket
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chasm.data.batches import EpochShuffle, SharedBatches
from chasm.errors import ConfigError
from chasm.training.joint import subject_runs
from chasm.training.launch import is_main_process, refuse_several
from chasm.training.recipes import Recipe
from chasm.training.run_files import is_finished, read_provenance
from chasm.training.runs import fit, load

from .conftest import joint_recipe

WORKER = Path(__file__).with_name("distributed_worker.py")
ENVIRONMENT = {k: v for k, v in os.environ.items() if "RANK" not in k} | {"OMP_NUM_THREADS": "1"}

SAME = [
    "--model.init_args.encoder.init_args.dropout", "0",
    "--model.init_args.encoder.init_args.token_noise", "0",
]  # fmt: skip
"""What draws no random numbers in a step: these are each process's own."""

HARD = [
    *SAME, "--data.batch_size", "7", "--model.init_args.linear", "banded_ridge",
    "--model.init_args.loss.init_args.error", "peak",
    "--model.init_args.loss.init_args.std_weight", "0.2",
]  # fmt: skip
"""Batches that halves cannot share, terms that know the whole batch, a closed form."""


def assert_equal_runs(one, other, tolerance=1e-5):
    for name in ("best", "last"):
        a, b = (
            torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
            for run in (one, other)
        )
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=tolerance)
    tables = [pd.read_csv(run / "metrics.csv") for run in (one, other)]
    pd.testing.assert_frame_equal(*tables, rtol=0, atol=tolerance)


def assert_equal_predictions(one, other):
    values = []
    for run in (one, other):
        model, data, _ = load(run)
        batches = [data.on_after_batch_transfer(b, 0) for b in data.val_dataloader()]
        with torch.inference_mode():
            values.append(torch.cat([model(batch) for batch in batches]))
    assert values[0].std() > 0.01
    torch.testing.assert_close(*values, rtol=0, atol=1e-5)


def run_together(n, folder):
    """Start the worker n times, as torchrun does, and give what each found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder)],
            env=ENVIRONMENT | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(n)
    ]
    said = [process.communicate(timeout=240)[1] for process in started]
    assert [p.returncode for p in started] == [0] * n, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(n)]


def chasm(*args, **options):
    """Run a command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "chasm.cli", *args],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False, **options,
    )  # fmt: skip


@given(n=st.integers(1, 60), batch=st.integers(1, 20), processes=st.integers(1, 5))
def test_shares_are_the_batches_of_one_process(n, batch, processes):
    if min(n, batch) < processes:
        with pytest.raises(ConfigError, match=f"shared by {processes} processes"):
            SharedBatches(range(n), batch, processes)
        return
    order = list(EpochShuffle(n, seed=1))
    shares = [
        list(SharedBatches(EpochShuffle(n, 1), batch, processes, r)) for r in range(processes)
    ]
    assert {len(share) for share in shares} == {len(SharedBatches(range(n), batch, processes))}
    batches = [list(chain(*parts)) for parts in zip(*shares, strict=True)]
    assert list(chain(*batches)) == order, "none is repeated, left out or moved"
    for parts in zip(*shares, strict=True):
        sizes = [len(part) for part in parts]
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1
    whole = list(SharedBatches(EpochShuffle(n, 1), batch))
    joined = 0 < n % batch < processes and n > batch
    assert batches == ([*whole[:-2], whole[-2] + whole[-1]] if joined else whole)


def test_losses_gradients_and_metrics_of_uneven_shares_are_those_of_the_whole(tmp_path):
    for found in run_together(2, tmp_path):
        alone = found["alone"]
        for together, single in zip(found["gradients"], alone["gradients"], strict=True):
            torch.testing.assert_close(together, single, rtol=1e-5, atol=1e-6)
        assert found["scores"] == pytest.approx(alone["scores"], rel=1e-6)
        assert found["gathered"] == list(range(11))
        assert found["own"]
        assert found["any"] == [False, True]
        assert found["taken"] == [[0.0, 0.0], [0.0, 0.0]]


def test_a_command_of_two_processes_equals_that_of_one(tiny_recipe, tmp_path):
    recipe = [*tiny_recipe, *HARD]
    one = fit(Recipe([*recipe, "--runs", str(tmp_path / "one")]))
    done = chasm("fit", *recipe, "--trainer.devices", "2")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    two = Path(line)
    assert_equal_runs(one, two)
    assert_equal_predictions(one, two)
    assert done.stderr.count("epoch 3 of 3") == 1, "all but the first are silent"
    assert "Warning" not in done.stderr
    assert read_provenance(two)["hardware"]["processes"] == 2
    assert [p.name for p in (two / "logs").iterdir()] == ["attempt-0"]
    assert len(list((two / "tensorboard").glob("events*"))) == 1


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["--data.batch_size", "1"], r"data\.batch_size: 1 images cannot be shared by 2 processes"),
        (["--trainer.devices", "many"], r"trainer\.devices: found 'many'"),
        (["--trainer.devices", "0"], r"trainer\.devices"),
    ],
)
def test_what_processes_cannot_share_is_named(tiny_recipe, extra, named):
    recipe = Recipe([*tiny_recipe, "--trainer.devices", "2", *extra])
    data = recipe.make_data()

    def second_of_several():
        data.trainer = SimpleNamespace(world_size=recipe.n_processes, global_rank=1)
        data.train_dataloader()

    with pytest.raises(ConfigError, match=named):
        second_of_several()


@pytest.mark.parametrize(
    ("devices", "nodes", "n"),
    [("auto", 1, 1), ("1", 1, 1), ("2", 1, 2), ("[0,2,3]", 1, 3), ("1", 2, 2)],
)
def test_processes_are_devices_times_nodes(tiny_recipe, devices, nodes, n):
    extra = ["--trainer.devices", devices, "--trainer.num_nodes", str(nodes)]
    recipe = Recipe([*tiny_recipe, *extra])
    assert recipe.n_processes == n
    if n == 1:
        refuse_several(recipe, "chasm tune")
        return
    with pytest.raises(ConfigError, match=rf"chasm tune uses one device, {n} processes"):
        refuse_several(recipe, "chasm tune")


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "1"}, False),  # Lightning's own launcher
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),  # the same in a job's script
        ({"SLURM_PROCID": "2", "SLURM_LOCALID": "0"}, False),  # srun
        ({"RANK": "2", "LOCAL_RANK": "0"}, False),  # torchrun, second node
        ({"NODE_RANK": "1"}, False),  # a node each by hand
        ({"RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "0"}, True),
    ],
)
def test_the_first_process_is_known_before_they_meet(tiny_recipe, monkeypatch, environment, first):
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_main_process(Recipe([*tiny_recipe, "--trainer.devices", "2"])) == first
    assert is_main_process(Recipe(tiny_recipe)), "a single process writes, whatever its number"


def test_lightning_does_not_requeue_under_slurm(tiny_recipe, monkeypatch):
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    for name, value in {"NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_JOB_NAME", "chasm")
    trainer = Recipe(tiny_recipe).make_trainer(logger=False)
    environment = trainer._accelerator_connector.cluster_environment
    assert isinstance(environment, SLURMEnvironment)
    assert not environment.auto_requeue


# Slow: each starts the command several times.


@pytest.mark.slow
def test_three_processes_and_single_trials(tiny_recipe, tmp_path):
    batches = ["--data.samples", "trials", "--data.batch_size", "8"]
    recipe = [*tiny_recipe, *HARD, *batches, "--trainer.max_epochs", "2"]
    one = fit(Recipe([*recipe, "--runs", str(tmp_path / "one")]))
    done = chasm("fit", *recipe, "--trainer.devices", "3")
    assert done.returncode == 0, done.stderr
    assert_equal_runs(one, Path(done.stdout.strip()))


@pytest.mark.slow
def test_subjects_together_on_two_processes(toy_subjects, tmp_path):
    recipe = [*joint_recipe(toy_subjects, tmp_path / "one"), *SAME, "--data.batch_size", "7"]
    one = fit(Recipe(recipe))
    done = chasm("fit", *recipe, "--trainer.devices", "2", "--runs", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    two = Path(done.stdout.strip())
    assert_equal_runs(one, two)
    for own, other in zip(subject_runs(one), subject_runs(two), strict=True):
        assert_equal_predictions(own, other)


@pytest.mark.slow
def test_stage_2_trains_its_stage_1_on_the_way(tiny_recipe, tmp_path):
    two = tiny_recipe[1].replace("smoke.yaml", "smoke_stage2.yaml")
    recipe = ["-c", two, *tiny_recipe[2:]]
    done = chasm("fit", *recipe, "--trainer.devices", "2")
    assert done.returncode == 0, done.stderr
    runs = list((tmp_path / "runs").glob("*/*/smoke-*"))
    assert len(runs) == 2
    assert all(map(is_finished, runs))
    again = chasm("fit", *recipe, "--trainer.devices", "2")
    assert again.stdout == done.stdout
    assert again.stderr.count("run is current") == 2


@pytest.mark.slow
def test_two_processes_that_know_the_images_equal_two_that_compute_anew(tiny_recipe, tmp_path):
    two = tiny_recipe[1].replace("smoke.yaml", "smoke_stage2.yaml")
    still = ["--model.init_args.decoder.init_args.token_noise", "0", "--trainer.devices", "2"]
    recipe = ["-c", two, *tiny_recipe[2:], *still, "--data.batch_size", "7"]
    found = []
    for cached in ("true", "false"):
        done = chasm("fit", *recipe, "--model.init_args.cache_stage1", cached)
        assert done.returncode == 0, done.stderr
        found.append(Path(done.stdout.strip()))
    assert_equal_runs(*found)


@pytest.mark.slow
def test_torchrun_and_run_end_once(tiny_recipe, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    args = [*tiny_recipe, *SAME, "--trainer.devices", "2"]
    subprocess.run(
        [*launcher, "2", "-m", "chasm.cli", "fit", *args],
        env=ENVIRONMENT, check=True, timeout=240,
    )  # fmt: skip
    one = fit(Recipe([*tiny_recipe, *SAME, "--runs", str(tmp_path / "one")]))
    (run,) = (tmp_path / "runs").glob("*/*/smoke-*")
    assert_equal_runs(one, run)
    done = chasm("run", *args, "--runs", str(tmp_path / "again"), "--n-boot", "100")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Report: ") == 1
    assert done.stderr.count("step: test") == 1


@pytest.mark.slow
def test_a_stopped_command_of_several_processes_goes_on(tiny_recipe, tmp_path):
    args = ["fit", *tiny_recipe, "--trainer.devices", "2", "--trainer.max_epochs", "30"]
    unbroken = chasm(*args, "--runs", str(tmp_path / "unbroken")).stdout.strip()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        folder = tmp_path / number.name
        said, status = stop(number, [*args, "--runs", str(folder)], folder)
        expected = {signal.SIGTERM: [143], signal.SIGINT: [130], signal.SIGKILL: [-9, 1]}[number]
        assert status in expected, said
        assert said.count("training stopped") == (number != signal.SIGKILL)
        (run,) = folder.glob("*/*/smoke-*")
        assert not is_finished(run)
        resumed = chasm(*args, "--runs", str(folder))
        assert resumed.returncode == 0, resumed.stderr
        assert_equal_runs(Path(unbroken), run, tolerance=0)


def stop(number, args, folder):
    """Send a signal after the first epoch; SIGKILL to the process that Lightning started."""
    process = subprocess.Popen(
        [sys.executable, "-m", "chasm.cli", *args],
        env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(folder.rglob("last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    target = process.pid
    if number == signal.SIGKILL:
        target = int(Path(f"/proc/{target}/task/{target}/children").read_text().split()[-1])
    os.kill(target, number)
    return process.communicate(timeout=120)[1], process.returncode
