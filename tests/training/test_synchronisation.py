"""A training step asks the device for nothing: no value is read while training goes on."""

from collections import Counter
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chasm.progress import console
from chasm.training.recipes import Recipe
from chasm.training.runs import fit

EXPERIMENTS = Path(__file__).parents[2] / "experiments"

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2")
"""Operators that need a tensor's values on the host."""

METHODS = ("item", "tolist", "cpu")
"""The same as methods, of which some never reach an operator on a CPU."""


class Reads(TorchDispatchMode):
    """Count what reads values of tensors."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[-1].split(".")[0]
        boolean_index = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITS or boolean_index:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


class ReadsOfSteps(L.Callback):
    """Watch the steps of the first epoch, from the beginning of the second to the last's."""

    def __init__(self, monkeypatch):
        self.reads, self.monkeypatch, self.steps = Reads(), monkeypatch, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch:
            return
        if batch_idx == 1:
            for name in METHODS:
                self.monkeypatch.setattr(torch.Tensor, name, self.counted(name))
            self.reads.__enter__()
        if batch_idx == trainer.num_training_batches - 1:
            self.reads.__exit__(None, None, None)
            self.monkeypatch.undo()
            self.steps = batch_idx - 1

    def counted(self, name):
        method = getattr(torch.Tensor, name)

        def counts(tensor, *args, **kwargs):
            self.reads.found[name] += 1
            return method(tensor, *args, **kwargs)

        return counts


def reads_of(recipe):
    with pytest.MonkeyPatch.context() as patch:
        watch = ReadsOfSteps(patch)
        fit(Recipe(recipe), callbacks=[watch])
    assert watch.steps > 0
    return watch.reads.found


@pytest.fixture
def batches(toy_dataset, tmp_path):
    return ["--data.batch_size", "8", "--trainer.max_epochs", "1",
            "--data.dataset_dir", str(toy_dataset), "--runs", str(tmp_path / "runs")]  # fmt: skip


PUBLISHED = [
    "--model.init_args.target", "top_p", "--trainer.gradient_clip_val", "0.5",
    "--model.init_args.loss.init_args.error", "peak",
    "--model.init_args.loss.init_args.std_weight", "0.2",
]  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "extra"),
    [
        ("smoke.yaml", PUBLISHED),
        ("smoke_stage2.yaml", ["--trainer.gradient_clip_val", "1"]),
        ("smoke_stage2.yaml", ["--model.init_args.stage1_training", "joint"]),
    ],
)
def test_no_value_is_read_in_a_step(batches, recipe, extra, monkeypatch):
    monkeypatch.setattr(console, "_force_terminal", True)  # with the bars of a terminal
    assert reads_of(["-c", str(EXPERIMENTS / recipe), *batches, *extra]) == {}


def test_what_reads_a_value_is_found(batches, monkeypatch):
    from chasm.training.modules import Stage1Module

    step = Stage1Module.training_step

    def reading(module, batch, batch_idx):
        loss = step(module, batch, batch_idx)
        float(loss)
        batch["betas"][batch["betas"] > 0].sum().detach().tolist()
        return loss

    monkeypatch.setattr(Stage1Module, "training_step", reading)
    found = reads_of(["-c", str(EXPERIMENTS / "smoke.yaml"), *batches])
    assert {"_local_scalar_dense", "index", "tolist"} <= set(found)
