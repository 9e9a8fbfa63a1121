"""Stage2Module: built on a trained Stage 1, alone in its checkpoint, resumable."""

import sys
from pathlib import Path

import pytest
import torch

from chasm.errors import ConfigError, DataError
from chasm.io import sha256_of_file
from chasm.training import runs
from chasm.training.callbacks import SeededSteps
from chasm.training.checkpoints import build_module, describe_module, load_module
from chasm.training.facts import facts_of
from chasm.training.recipes import Recipe
from chasm.training.runs import fit, load, stage1_checkpoint
from chasm.training.stage2 import check_same_data

RECIPE = Path(__file__).parents[2] / "experiments" / "smoke_stage2.yaml"
JOINT = ["--model.init_args.stage1_training", "joint", "--model.init_args.stage1_rate", "1"]


@pytest.fixture
def arguments(toy_dataset, tmp_path):
    return ["-c", str(RECIPE), "--data.dataset_dir", str(toy_dataset),
            "--runs", str(tmp_path / "runs")]  # fmt: skip


def stage1_arguments(recipe):
    return ["-c", str(recipe.stage1), "--runs", recipe.runs,
            "--data.dataset_dir", str(recipe.make_data().dataset_dir)]  # fmt: skip


def state(path):
    return torch.load(path, weights_only=True)["state_dict"]


def stage1_part(path):
    return {k.removeprefix("stage1."): v for k, v in state(path).items() if k.startswith("stage1.")}


def test_a_frozen_stage_1_is_trained_first_and_stays_bit_identical(arguments):
    recipe = Recipe(arguments)
    run = fit(recipe)
    source = stage1_checkpoint(recipe)
    assert source.parents[1].name.startswith("smoke-")
    before = sha256_of_file(source)
    inside, alone = stage1_part(run / "checkpoints" / "last.ckpt"), state(source)
    assert inside.keys() == alone.keys()
    assert all(torch.equal(inside[key], alone[key]) for key in alone)
    assert fit(Recipe(arguments)) == run  # current: nothing is trained again
    assert sha256_of_file(stage1_checkpoint(recipe)) == before


def test_joint_training_changes_stage_1(arguments):
    recipe = Recipe([*arguments, *JOINT])
    inside = stage1_part(fit(recipe) / "checkpoints" / "last.ckpt")
    alone = state(stage1_checkpoint(recipe))
    key = "encoder.global_stream.projection.weight"
    assert not torch.equal(inside[key], alone[key])
    assert all(torch.isfinite(value).all() for value in inside.values())


def test_a_checkpoint_stands_alone(arguments):
    run = fit(Recipe(arguments))
    model, data, recipe = load(run)
    alone = load_module(run / "checkpoints" / "best.ckpt")
    stage1_checkpoint(recipe).unlink()
    again = load_module(run / "checkpoints" / "best.ckpt")
    rebuilt = build_module(describe_module(alone))
    rebuilt.load_state_dict(alone.state_dict())
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    with torch.inference_mode():
        expected = model(batch)
        for other in (alone, again, rebuilt):
            assert torch.equal(other(batch), expected)
    assert expected.shape == batch["betas"].shape


def test_rows_are_the_blend_the_network_and_the_expanded_parcels(arguments):
    model, data, _ = load(fit(Recipe(arguments)))
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    with torch.inference_mode():
        rows = model.rows(batch)
        linear = model.linear(batch["cls"], batch["patches"])
        parcels = model.stage1(batch)
    blend, network, expanded = rows.values()
    assert list(rows) == ["stage 2", "stage 2, network alone", "stage 1, expanded"]
    torch.testing.assert_close(blend, (1 - model.share) * network + model.share * linear)
    labels = model.parcellation.labels
    torch.testing.assert_close(expanded[:, labels == 2], parcels[:, [2]].expand(-1, 15))
    assert not expanded[:, labels < 0].any()


def test_draws_are_seeded_and_spread(arguments):
    model, data, _ = load(fit(Recipe(arguments)))
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    first, second = (model.draws(batch, 4, torch.Generator().manual_seed(s)) for s in (1, 1))
    assert first.shape == (4, *batch["betas"].shape)
    assert torch.equal(first, second)
    assert first.std(0).min() > 0


def test_a_resumed_run_equals_an_unbroken_one(arguments, tmp_path, monkeypatch):
    whole = fit(Recipe(arguments))

    class StopInEpoch2(SeededSteps):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if trainer.current_epoch == 2 and type(pl_module).__name__ == "Stage2Module":
                raise KeyboardInterrupt

    parts = [*arguments, "--runs", str(tmp_path / "parts")]
    with monkeypatch.context() as patch:
        patch.setattr(runs, "SeededSteps", StopInEpoch2)
        with pytest.raises(runs.RunInterruptedError):
            fit(Recipe(parts))
    resumed = fit(Recipe(parts))
    for name in ("last", "best"):
        a, b = (state(run / "checkpoints" / f"{name}.ckpt") for run in (whole, resumed))
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--stage1", "nowhere.yaml"], "nowhere.yaml"),
        (["--stage1", str(RECIPE)], "is no Stage 1"),
        (["--model.init_args.stage1_rate", "0"], "stage1_rate"),
        (["--model.init_args.target", "top_p"], "target"),
    ],
)
def test_what_cannot_be_built_on_is_named(arguments, extra, message):
    with pytest.raises(ConfigError, match=message):
        fit(Recipe([*arguments, *extra]))


def test_a_stage_1_of_other_parcels_is_refused(arguments):
    source = fit(Recipe(arguments).stage1_recipe())
    with pytest.raises(ConfigError, match="stage1"):
        fit(Recipe([*arguments, "--stage1", str(source), "--data.parcels.size", "10"]))


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (["--data.split", "seeded", "--data.split_seed", "5"], "train images are test images"),
        (["--data.split", "paper"], "train images are test images"),
    ],
)
def test_a_stage_1_that_saw_held_out_images_is_refused(arguments, split, message):
    recipe = Recipe(arguments)
    source = fit(Recipe([*stage1_arguments(recipe), *split]))
    with pytest.raises(ConfigError, match=message):
        fit(Recipe([*arguments, "--data.split", "seeded", "--stage1", str(source)]))


def test_a_stage_1_of_other_data_is_refused(arguments):
    module = load_module(stage1_checkpoint(Recipe(arguments)))
    data = Recipe(arguments).make_data()
    check_same_data(module, data)
    for key in ("subject", "store", "tokens"):
        module.trained_on = {**facts_of(data), key: "another"}
        with pytest.raises(ConfigError, match=f"trained on the {key} another"):
            check_same_data(module, data)


def test_a_recipe_that_names_itself_ends_at_once(arguments, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(RECIPE.read_text().replace("stage1: smoke.yaml", "stage1: own.yaml"))
    with pytest.raises(ConfigError, match=r"own\.yaml is no Stage 1"):
        fit(Recipe(["-c", str(own), *arguments[2:]]))


def test_mixed_precision_leaves_the_closed_form_in_float32(arguments):
    run = fit(
        Recipe([*arguments, "--trainer.precision", "bf16-mixed", "--trainer.max_epochs", "1"])
    )
    model, data, _ = load(run)
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    with torch.inference_mode():
        expected = model.linear(batch["cls"], batch["patches"])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(model.linear(batch["cls"], batch["patches"]), expected)
            assert model(batch).dtype == torch.float32


def test_a_finished_run_needs_its_stage_1_no_more(arguments, tmp_path):
    recipe = tmp_path / "two.yaml"
    recipe.write_text(RECIPE.read_text())
    smoke = tmp_path / "smoke.yaml"
    smoke.write_text(RECIPE.with_name("smoke.yaml").read_text())
    run = fit(Recipe(["-c", str(recipe), *arguments[2:]]))
    smoke.unlink()
    assert load(run)[0].stage1 is not None


def test_a_stage_2_without_a_stage_1_says_so(arguments):
    with pytest.raises(ConfigError, match="builds on a trained Stage 1"):
        fit(Recipe([*arguments, "--stage1", "null"]))


def test_a_stage_1_recipe_takes_no_stage_1(arguments):
    source = fit(Recipe(arguments).stage1_recipe())
    smoke = ["-c", str(RECIPE.with_name("smoke.yaml")), *arguments[2:], "--stage1", str(source)]
    with pytest.raises(ConfigError, match="builds on no Stage 1"):
        fit(Recipe(smoke))


def test_a_description_cannot_name_foreign_code(arguments):
    description = describe_module(load(fit(Recipe(arguments)))[0])
    description["settings"]["decoder"] = {"class_path": "subprocess.Popen", "init_args": {}}
    with pytest.raises(DataError, match=r"subprocess\.Popen"):
        build_module(description)
    for sly in ("{class_path: antigravity.X}", "antigravity.X", "other.yaml"):
        description["settings"]["decoder"] = sly
        with pytest.raises(DataError, match="names"):
            build_module(description)
    assert "antigravity" not in sys.modules
    with pytest.raises(DataError, match="sizes"):
        build_module({"settings": {}})
