"""Adapters: what each arm trains, what it may see, and that its checkpoint stands alone."""

import copy
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import Ridge

from chasm.errors import ConfigError
from chasm.evaluation.predictions import PredictionFile
from chasm.evaluation.testing import predict_run
from chasm.interventions import Intervention, intervene
from chasm.models.adapters import HEAD_SPACES, add_lora, backbone_state, belongs, merge_lora
from chasm.models.baselines import LinearEncoder
from chasm.models.kernels import linear_kernels
from chasm.models.linear_path import RidgeHead
from chasm.training.adapters import ROW_NAMES, AdapterModule
from chasm.training.checkpoints import build_module, describe_module, load_module
from chasm.training.closed_form import responses, solve
from chasm.training.facts import facts_of
from chasm.training.joint import subject_runs
from chasm.training.recipes import Recipe
from chasm.training.runs import RunInterruptedError, fit, load
from chasm.training.sources import check_sources, fit_head, source_features

from .conftest import adapter_recipe, poison_test_images

ARMS = tuple(ROW_NAMES)
FEW = ("--data.few_shot.n", "20")


def arm_recipe(arm, dataset, runs, source, *extra):
    return Recipe(adapter_recipe(dataset, runs, source, "--model.init_args.arm", arm, *FEW, *extra))


@pytest.fixture(scope="module")
def adapted(toy_subjects, joint_run, tmp_path_factory):
    """Give the finished run of an arm, trained once."""
    runs = tmp_path_factory.mktemp("adapted")
    return lambda arm: fit(arm_recipe(arm, toy_subjects, runs, joint_run))


@pytest.fixture
def sources(joint_run):
    return [load_module(run / "checkpoints" / "best.ckpt") for run in subject_runs(joint_run)]


@pytest.fixture(scope="module")
def target(toy_subjects, joint_run, tmp_path_factory):
    """Data of the new subject."""
    return arm_recipe(
        "head", toy_subjects, tmp_path_factory.mktemp("unused"), joint_run
    ).make_data()


def state_of(run):
    return torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def batch_of(data, part="validation"):
    images = data.dataset(part)
    return data.on_after_batch_transfer(images.__getitems__(list(range(len(images)))), 0)


# The closed-form head.


def standardised(values, rows):
    """Features whose products are the kernel of a space."""
    centred = values - values[rows].mean(axis=0)
    scale = values[rows].std(axis=0)
    varies = scale > 1e-6
    return centred[:, varies] / scale[varies] / np.sqrt(varies.sum())


def test_a_head_is_scikit_learns_ridge_on_the_same_features(sources, target):
    given, held_out = target.dataset("given"), target.dataset("validation")
    ids = np.concatenate([given.image_ids, held_out.image_ids])
    features = source_features(sources, target, ids)
    rows = np.arange(len(given))
    targets = given.betas(rows)[:, :40]
    shares, alpha = np.array([[0.2, 0.5, 0.3]], np.float32), 0.37
    head = RidgeHead({s: features[s].shape[1] for s in HEAD_SPACES}, 40, None)
    one = LinearEncoder(HEAD_SPACES, shares=shares, alphas=np.array([alpha]))
    solve(head, features, rows, targets, one.fit)
    found = head.from_features({s: torch.from_numpy(v) for s, v in features.items()}).numpy()
    columns = [
        np.sqrt(share) * standardised(features[space].astype(np.float64), rows)
        for space, share in zip(HEAD_SPACES, shares[0], strict=True)
    ]
    design = np.concatenate(columns, axis=1)
    reference = Ridge(alpha).fit(design[rows], targets).predict(design)
    np.testing.assert_allclose(found, reference, rtol=2e-3, atol=2e-4)


def test_the_fitted_arm_is_the_ridge_head_in_kernel_space(adapted, sources):
    model, data, _ = load(adapted("ridge_head"))
    given, held_out = data.dataset("given"), data.dataset("test")
    assert len(given) == 20, "validation included: nothing is left to select"
    ids = np.concatenate([given.image_ids, held_out.image_ids])
    features = source_features(sources, data, ids)
    rows, test = np.arange(20), np.arange(20, len(ids))
    kernels = {space: linear_kernels(features[space], rows, test) for space in HEAD_SPACES}
    targets = responses(given, model.units_of)
    expected = fit_head(kernels, targets, data.seed).predict(kernels)
    with torch.inference_mode():
        found = model(batch_of(data, "test")).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_one_mixture_of_spaces_serves_all_units_and_is_the_best_by_cross_validation():
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((60, 6)).astype(np.float32)
    features = {s: rng.standard_normal((60, 6)).astype(np.float32) for s in HEAD_SPACES}
    features["local"] = signal
    kernels = {space: linear_kernels(v, np.arange(60)) for space, v in features.items()}
    noise = rng.standard_normal((60, 9)).astype(np.float32)
    ridge = fit_head(kernels, signal @ rng.standard_normal((6, 9)).astype(np.float32) + noise, 0)
    np.testing.assert_allclose(ridge.shares_, np.tile([0, 1, 0], (9, 1)), atol=1e-6)


def test_source_features_come_in_the_order_asked(sources, target):
    ids = target.data_split.train[:5]
    forward = source_features(sources, target, ids)
    backward = source_features(sources, target, ids[::-1], ["responses"])
    assert list(backward) == ["responses"]
    np.testing.assert_allclose(backward["responses"][::-1], forward["responses"], atol=1e-5)
    n_units = sum(source.n_units for source in sources)
    assert forward["responses"].shape == (5, n_units)
    np.testing.assert_allclose(
        forward["responses"][:, : sources[0].n_units],
        sources[0].network({
            name: torch.from_numpy(np.asarray(getattr(target.tokens, name)[ids])).float()
            for name in ("cls", "patches")
        }).detach().numpy(),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


# What an arm trains.


def test_a_frozen_backbone_is_bit_identical_and_the_heads_are_trained(adapted, sources):
    run = adapted("head")
    model = load_module(run / "checkpoints" / "best.ckpt")
    assert_same(backbone_state(sources[0].encoder), backbone_state(model.encoder))
    heads = [
        name
        for name, _ in model.encoder.named_parameters()
        if belongs(name, ("global_stream.head", "local_stream.head"))
    ]
    saved = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    moments = saved["optimizer_states"][0]["state"].values()
    assert len(moments) == len(heads)
    assert all(moment["exp_avg"].abs().sum() > 0 for moment in moments)


def test_below_trained_heads_the_backbone_has_no_dropout_and_no_noise(adapted):
    model, data, _ = load(adapted("head"))
    batch = batch_of(data)
    model.train()
    tokens = (batch["cls"], batch["patches"])
    first, second = model.encoder.features(*tokens), model.encoder.features(*tokens)
    for space in first:
        assert torch.equal(first[space], second[space])
    assert not torch.equal(model.network(batch), model.network(batch)), "heads have dropout"


def test_lora_leaves_the_layers_themselves_and_merges_to_the_same_predictions(adapted, sources):
    model, data, _ = load(adapted("lora"))
    reference = copy.deepcopy(sources[0].encoder)
    add_lora(reference, 8, 16.0)
    own = backbone_state(model.encoder)
    moved = [
        name
        for name, value in backbone_state(reference).items()
        if not torch.equal(value, own[name])
    ]
    assert moved
    assert all(".lora_" in name for name in moved)
    batch = batch_of(data)
    with torch.inference_mode():
        before = model(batch)
        merge_lora(model.encoder)
        after = model(batch)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_full_fine_tuning_moves_the_backbone_at_its_own_rate(adapted, sources):
    run = adapted("full")
    model = load_module(run / "checkpoints" / "best.ckpt")
    before, after = backbone_state(sources[0].encoder), backbone_state(model.encoder)
    assert not torch.equal(
        after["local_stream.projection.weight"], before["local_stream.projection.weight"]
    )
    saved = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    rates = {group["initial_lr"] for group in saved["optimizer_states"][0]["param_groups"]}
    assert sorted(rates) == pytest.approx([3e-4, 3e-3])


def test_the_count_of_trained_parameters_is_reported_and_right(adapted):
    counts, encoders = {}, {}
    for arm in ARMS:
        run = adapted(arm)
        counts[arm] = json.loads((run / "provenance.json").read_text())["trained"]["n_trained"]
        encoders[arm] = load_module(run / "checkpoints" / "best.ckpt").encoder
    # Every parcel has a weight for each of 16 channels, and an intercept, in the global head; the
    # local one is LayerNorm, Linear(16, 16) and Linear(16, parcels).
    n = encoders["head"].n_parcels
    heads = (2 * 16 + 17 * n) + (2 * 16 + 17 * 16 + 17 * n)
    assert counts["head"] == heads
    lora = sum(p.numel() for m, p in encoders["lora"].named_parameters() if ".lora_" in m)
    assert counts["lora"] == heads + lora
    assert counts["full"] == sum(
        p.numel() for m, p in encoders["full"].named_parameters() if not m.startswith("contrastive")
    )
    width = sum(source.n_parcels for source in encoders["ridge_head"].source.encoders)
    assert counts["ridge_head"] == n * (16 + 16 + width + 1)


@pytest.mark.parametrize(
    "arm", ["ridge_head", "head", *(pytest.param(a, marks=pytest.mark.slow) for a in ARMS[2:])]
)
def test_no_test_response_reaches_an_adapter(arm, adapted, toy_subjects, joint_run, tmp_path):
    clean = adapted(arm)
    folder = tmp_path / "poisoned" / "toy"
    shutil.copytree(toy_subjects, folder)
    poison_test_images(folder)
    run = fit(arm_recipe(arm, folder, tmp_path / "runs", joint_run))
    assert_same(state_of(clean), state_of(run))
    assert np.isfinite(pd.read_csv(run / "metrics.csv")["val/mse"]).all()


def test_an_interrupted_adapter_equals_an_unbroken_one(
    adapted, toy_subjects, joint_run, tmp_path, monkeypatch
):
    from chasm.training import runs
    from chasm.training.callbacks import SeededSteps

    class StopInEpoch1(SeededSteps):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if trainer.current_epoch == 1:
                raise KeyboardInterrupt

    recipe = arm_recipe("lora", toy_subjects, tmp_path, joint_run)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "SeededSteps", StopInEpoch1)
        with pytest.raises(RunInterruptedError):
            fit(recipe)
    resumed = fit(recipe)
    assert_same(state_of(adapted("lora")), state_of(resumed))
    whole, joined = (pd.read_csv(run / "metrics.csv") for run in (adapted("lora"), resumed))
    np.testing.assert_array_equal(whole["val/loss"], joined["val/loss"])


# What a checkpoint is good for.


@pytest.mark.parametrize("arm", ARMS)
def test_a_checkpoint_stands_alone_and_is_tested(arm, adapted, sources, tmp_path):
    run = tmp_path / "copied"
    shutil.copytree(adapted(arm), run)
    predictions = PredictionFile.read(predict_run(run))
    assert next(iter(predictions.rows)) == ROW_NAMES[arm]
    model, data, _ = load(run)
    assert_same(model.encoder.cls_scaler.state_dict(), sources[0].encoder.cls_scaler.state_dict())
    again = build_module(describe_module(model))
    again.load_state_dict(model.state_dict())
    batch = batch_of(data, "test")
    with torch.inference_mode():
        expected = predictions.rows[ROW_NAMES[arm]].values
        np.testing.assert_allclose(again(batch).numpy(), expected, rtol=1e-5, atol=1e-6)
        with intervene(model, [Intervention("global.out", "zero")]):
            changed = model.from_streams(model.streams(batch))
    assert not np.allclose(changed.numpy(), expected, atol=1e-6)


# Sources that do not fit.


def test_sources_that_fit_are_taken(sources, target):
    check_sources(sources, target)


def changed(sources, **facts):
    for source in sources:
        source.trained_on = source.trained_on | facts
    return sources


def test_a_source_of_another_backbone_is_named(sources, target):
    other = copy.deepcopy(sources[0].trained_on["backbone"])
    other["weights"] = {"source": "elsewhere"}
    with pytest.raises(ConfigError, match=r"source.*another backbone.*elsewhere"):
        check_sources(changed(sources, backbone=other), target)


@pytest.mark.parametrize("parcels", [{"size": 15}, {"kind": "spatial"}])
def test_a_source_of_other_parcels_is_named(sources, target, parcels):
    theirs = sources[0].trained_on["parcels"] | parcels
    with pytest.raises(ConfigError, match=r"source.*parcels.*here they are sequential of 7"):
        check_sources(changed(sources, parcels=theirs), target)


def test_the_new_subject_is_none_of_the_sources(sources, target):
    own = facts_of(target)
    with pytest.raises(ConfigError, match=r"subj03, the new subject"):
        check_sources(changed(sources[:1], subject=own["subject"]), target)
    with pytest.raises(ConfigError, match=r"subj03, the new subject"):
        check_sources(changed(sources[1:], trained_with=[own]), target)


@pytest.mark.parametrize("part", ["train", "validation"])
def test_test_images_that_any_source_has_seen_are_counted(sources, target, part):
    seen = torch.from_numpy(target.data_split.test[:3].astype("int64"))
    other = sources[0].trained_on["trained_with"][0]
    with pytest.raises(ConfigError, match=rf"3 of the {part} images of its subj02"):
        check_sources(changed(sources[:1], trained_with=[other | {part: seen}]), target)
    # Ids of other images say nothing.
    elsewhere = other | {part: seen, "images": "others"}
    check_sources(changed(sources[:1], trained_with=[elsewhere]), target)


def test_a_source_without_its_facts_is_named(sources, target):
    facts = {k: v for k, v in sources[0].trained_on.items() if k not in ("backbone", "parcels")}
    sources[0].trained_on = facts
    with pytest.raises(ConfigError, match=r"older version.*backbone, parcels"):
        check_sources(sources, target)
    sources[0].trained_on = None
    with pytest.raises(ConfigError, match="does not say what it was trained on"):
        check_sources(sources, target)


def test_only_a_stage_1_of_others_is_a_source(adapted, sources, tiny_recipe):
    stage2 = Recipe(["-c", str(tiny_recipe[1]).replace("smoke", "smoke_stage2")]).make_model()
    for wrong, said in (
        (stage2, "is no Stage 1"),
        (load_module(adapted("head") / "checkpoints" / "best.ckpt"), "itself an adapter"),
    ):
        with pytest.raises(ConfigError, match=said):
            AdapterModule().take_source([wrong])


def test_sources_have_one_backbone(sources, target):
    torch.nn.init.normal_(sources[1].encoder.local_stream.projection.weight)
    with pytest.raises(ConfigError, match="different backbones"):
        check_sources(sources, target)


@pytest.mark.parametrize("key", ["encoder", "token_scaling"])
def test_what_is_the_sources_is_no_key_of_an_adapter(toy_subjects, joint_run, tmp_path, key):
    with pytest.raises(ConfigError, match=key):
        arm_recipe("head", toy_subjects, tmp_path, joint_run, f"--model.init_args.{key}", "none")


@pytest.mark.parametrize("option", ["lora_rank", "lora_alpha", "backbone_rate"])
def test_options_are_positive(option):
    with pytest.raises(ConfigError, match=option):
        AdapterModule(**{option: 0})
