"""Sweep files: what they say is searched, and what is wrong with them is named beforehand."""

import itertools
from pathlib import Path

import optuna
import pytest
import yaml

from chasm.errors import ConfigError
from chasm.training.recipes import Recipe
from chasm.training.search_space import Sweep, as_arguments, read_sweep, short_names
from chasm.training.space_checks import LOSS, REFUSED, assignments, check_space

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "experiments" / "smoke.yaml"
RATE = "model.init_args.learning_rate"
ENCODER = "model.init_args.encoder.init_args"

SPACE = {
    RATE: {"type": "float", "low": "1e-4", "high": 0.01, "log": True},
    f"{ENCODER}.dropout": {"type": "float", "low": 0.1, "high": 0.3, "step": 0.1},
    f"{ENCODER}.gate": {"type": "categorical", "choices": ["image", "parcel"]},
    f"{ENCODER}.d_gate": {"type": "int", "low": 8, "high": 16, "step": 8,
                          "when": {f"{ENCODER}.gate": "parcel"}},
    f"{ENCODER}.local_blocks": {"type": "int", "low": 1, "high": 2,
                                "when": {f"{ENCODER}.d_gate": [16]}},
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """Write a sweep file of the smallest recipe, and give its path."""

    def write(space=None, **others):
        path = tmp_path / "sweep.yaml"
        content = {"recipe": str(SMOKE), "space": SPACE if space is None else space, **others}
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


def test_a_file_says_what_is_searched(write):
    sweep = read_sweep(write(trials=7, sampler={"kind": "grid"}, settings={"data.batch_size": 8}))
    assert (sweep.study, sweep.trials, sweep.sampler.kind) == ("sweep", 7, "grid")
    assert (sweep.sampler.startup, sweep.pruner.kind) == (8, "median")
    assert sweep.arguments(["--name", "x"])[2:] == ["--data.batch_size", "8", "--name", "x"]
    rate, dropout, gate, d_gate, _ = sweep.space
    assert (rate.ends, rate.values) == ((1e-4, 0.01), ())
    assert dropout.values == (0.1, 0.2, 0.3)  # not 0.30000000000000004
    assert gate.ends == ("image", "parcel")
    assert d_gate.values == (8, 16)
    assert d_gate.when == {f"{ENCODER}.gate": ("parcel",)}


@pytest.mark.parametrize(("value", "inside"), [
    (0.1, True), (0.3, True), (0.30000000000000004, True), (0.25, False), (0.4, False),
    (True, False), ("0.1", False), (None, False),
])  # fmt: skip
def test_steps_are_told_from_what_lies_between(value, inside, write):
    dropout = read_sweep(write()).space[1]
    assert dropout.contains(value) is inside


def test_a_key_is_searched_only_under_its_conditions(write):
    sweep = read_sweep(write())
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(40):
        values = sweep.suggest(study.ask())
        present = tuple(f"{ENCODER}.{name}" in values for name in ("d_gate", "local_blocks"))
        gate, d_gate = values[f"{ENCODER}.gate"], values.get(f"{ENCODER}.d_gate")
        assert present == (gate == "parcel", d_gate == 16)
        assert values[f"{ENCODER}.dropout"] in (0.1, 0.2, 0.3)
        assert 1e-4 <= values[RATE] <= 0.01
        seen.add(present)
    assert seen == {(False, False), (True, False), (True, True)}


def test_a_grid_has_every_combination_once(write):
    space = {key: value for key, value in SPACE.items() if key != RATE}
    found = list(read_sweep(write(space)).grid())
    wanted = [
        {f"{ENCODER}.dropout": dropout, f"{ENCODER}.gate": gate}
        | ({f"{ENCODER}.d_gate": d_gate} if gate == "parcel" else {})
        | ({f"{ENCODER}.local_blocks": blocks} if (gate, d_gate) == ("parcel", 16) else {})
        for dropout, gate, d_gate, blocks in itertools.product(
            (0.1, 0.2, 0.3), ("image", "parcel"), (8, 16), (1, 2)
        )
    ]
    distinct = {tuple(sorted(values.items())) for values in wanted}
    assert len(found) == len(distinct) == 3 * (1 + 1 + 2)
    assert {tuple(sorted(values.items())) for values in found} == distinct


def test_a_range_without_steps_has_no_grid(write):
    with pytest.raises(ConfigError, match=rf"space.{RATE}: a grid needs steps"):
        read_sweep(write()).grid()


def test_the_recipes_own_values_are_found_where_they_are_inside(write):
    settings = Recipe(["-c", str(SMOKE)]).settings()
    assert read_sweep(write()).values_of(settings) == {
        RATE: 1e-3, f"{ENCODER}.dropout": 0.1, f"{ENCODER}.gate": "image"
    }  # fmt: skip
    narrow = {**SPACE, RATE: {"type": "float", "low": 0.01, "high": 0.1}}
    assert read_sweep(write(narrow)).values_of(settings) is None


def test_names_are_as_short_as_they_can_be():
    keys = ["a.init_args.rate", "a.init_args.encoder.d", "a.init_args.decoder.d", "d"]
    assert list(short_names(keys).values()) == ["rate", "encoder.d", "decoder.d", "d"]


def test_values_arrive_in_the_recipe_as_they_were():
    values = {
        RATE: 1e-05, f"{ENCODER}.scan": "torch", f"{ENCODER}.residual_clamp": None,
        f"{ENCODER}.block_norm": True, "data.backbone.cls_layers": "[3, 6]",
    }  # fmt: skip
    settings = Recipe(["-c", str(SMOKE), *as_arguments(values)]).settings()
    encoder = settings["model"]["init_args"]["encoder"]["init_args"]
    assert settings["model"]["init_args"]["learning_rate"] == 1e-5
    assert (encoder["scan"], encoder["residual_clamp"]) == ("torch", None)
    assert encoder["block_norm"] is True
    assert settings["data"]["backbone"]["cls_layers"] == [3, 6]


def test_every_end_and_choice_is_tried_under_its_conditions(write):
    sweep = read_sweep(write())
    tried = list(assignments(sweep))
    for dimension in sweep.space:
        seen = {values[dimension.key] for values in tried if dimension.key in values}
        assert seen == set(dimension.ends)
        for values in tried:
            if dimension.key in values:
                assert dimension.active(values)
    assert len(tried) <= 4


@pytest.mark.parametrize(("changed", "named"), [
    ({"type": "real"}, "type.*float, int, categorical"),
    ({"type": "float", "low": 1}, "high is missing"),
    ({"type": "float", "low": 2, "high": 1}, "low <= high"),
    ({"type": "float", "low": 0, "high": 1, "log": True}, "low > 0"),
    ({"type": "float", "low": 0, "high": 1, "log": True, "step": 0.1}, "`step` is not supported"),
    ({"type": "float", "low": 0, "high": 1, "step": 0.3}, "whole number of steps"),
    ({"type": "float", "low": "a", "high": 1}, "could not convert"),
    ({"type": "int", "low": 1.5, "high": 2}, "1.5 is no int"),
    ({"type": "int", "low": 1, "high": 2, "choices": [1]}, "'choices' is no part of a int"),
    ({"type": "categorical", "choices": []}, "Give a list of values"),
    ({"type": "categorical", "choices": [1, 1]}, "twice"),
    ({"type": "int", "low": 1, "high": 2, "when": {"x.y": 1}}, "'x.y' is not searched"),
    ({"type": "int", "low": 1, "high": 2, "when": {RATE: 5}}, "never 5"),
    ({"type": "int", "low": 1, "high": 2, "when": 3}, "when: found 3"),
    (3, "found 3"),
])  # fmt: skip
def test_a_range_that_is_none_is_named_with_file_and_key(changed, named, write):
    path = write({RATE: SPACE[RATE], "a.b": changed})
    with pytest.raises(ConfigError, match=named) as caught:
        read_sweep(path)
    assert str(caught.value).startswith(f"{path}: space.a.b: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("others", "named"), [
    ({"trails": 3}, "'trails' is not accepted"),
    ({"trials": "many"}, "trials.*many"),
    ({"trials": 0}, "Give 1 or more"),
    ({"sampler": {"kind": "guess"}}, "sampler.kind"),
    ({"pruner": {"kid": "none"}}, "'kid'"),
    ({"recipe": "no.yaml"}, "recipe: 'no.yaml' is not there"),
    ({"settings": [1]}, "settings"),
    ({"space": {}}, "no search space"),
])  # fmt: skip
def test_an_unknown_key_or_value_of_the_file_is_named(others, named, write):
    path = write(**others)
    with pytest.raises(ConfigError, match=named) as caught:
        read_sweep(path)
    assert str(path) in str(caught.value)


def test_what_is_no_sweep_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="is not there"):
        read_sweep(tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match="no search space"):
        read_sweep(SMOKE)
    path = tmp_path / "bad.yaml"
    path.write_text("space: [")
    with pytest.raises(ConfigError, match=r"bad\.yaml: is no YAML"):
        read_sweep(path)


def test_a_key_that_the_recipe_does_not_have_is_named_before_anything_starts(write):
    path = write({**SPACE, f"{ENCODER}.widht": {"type": "int", "low": 1, "high": 2}})
    with pytest.raises(ConfigError, match="widht") as caught:
        check_space(read_sweep(path))
    assert str(caught.value).startswith(f"{path}: space.{ENCODER}.widht: 1 cannot be used")


def test_an_end_that_the_recipe_does_not_take_is_named(write):
    gates = {"type": "categorical", "choices": ["image", "voxel"]}
    path = write({RATE: SPACE[RATE], f"{ENCODER}.gate": gates})
    with pytest.raises(ConfigError, match=rf"space.{ENCODER}.gate: 'voxel' cannot be used"):
        check_space(read_sweep(path))
    path = write({"model.init_args.top_p": {"type": "float", "low": 0.5, "high": 1.5}})
    with pytest.raises(ConfigError, match=r"space.model.init_args.top_p: 1.5 cannot be used"):
        check_space(read_sweep(path))


def test_keys_that_change_what_is_compared_are_refused_with_the_reason(write):
    choices = {"type": "categorical", "choices": [1, 2]}
    for key in ("data.subject", "data.parcels.size", "data", "selection.mode", "seed_everything"):
        path = write({key: choices})
        with pytest.raises(ConfigError, match=rf"space.{key}: cannot be searched: \w+") as caught:
            check_space(read_sweep(path))
        reasons = {why for name, why in REFUSED.items() if name.startswith(key.split(".")[0])}
        assert any(why in str(caught.value) for why in reasons)
    # The loss may be searched, unless it is what trials are compared by.
    sweep = read_sweep(write({LOSS[0] + ".init_args.pearson_weight": choices}))
    assert isinstance(check_space(sweep), Recipe)
    with pytest.raises(ConfigError, match="the value that trials are compared by"):
        check_space(sweep, ["--selection.monitor", "val/loss"])


def test_every_refused_key_is_one_of_the_recipe():
    recipes = SMOKE, SMOKE.with_name("smoke_stage2.yaml")
    stage1, stage2 = (Recipe(["-c", str(recipe)]).settings() for recipe in recipes)
    for key in REFUSED:
        first, _, rest = key.partition(".")
        assert first in stage1, key
        if rest.startswith("init_args."):
            assert rest.removeprefix("init_args.") in stage2[first]["init_args"], key
        else:
            assert not rest or rest in (*stage1[first], "seed"), key


def test_a_key_is_fixed_or_searched(write):
    with pytest.raises(ConfigError, match="Fix it or search it"):
        check_space(read_sweep(write()), ["--model.init_args.learning_rate", "0.1"])
    with pytest.raises(ConfigError, match="Fix it or search it"):
        check_space(read_sweep(write(settings={RATE: 0.1})))


@pytest.mark.parametrize(("more", "named"), [
    (["--trainer.devices", "2"], "2 devices.*--workers"),
    (["--selection.monitor", "val/mze"], "val/mze.*val/mse"),
])  # fmt: skip
def test_a_base_that_cannot_be_swept_is_named(more, named, write):
    with pytest.raises(ConfigError, match=named):
        check_space(read_sweep(write()), more)


def test_a_model_of_other_units_is_refused(write):
    classes = ["chasm.training.modules.Stage1Module", "chasm.training.linear_module.LinearModule"]
    path = write({"model": {"type": "categorical", "choices": classes}})
    with pytest.raises(ConfigError, match=r"space\.model: "):
        check_space(read_sweep(path))


def test_a_sweep_is_a_plain_value(write):
    sweep = read_sweep(write())
    assert isinstance(sweep, Sweep)
    assert read_sweep(write()).described() == sweep.described()
    wider = {**SPACE, RATE: {**SPACE[RATE], "high": 0.1}}
    assert read_sweep(write(wider)).described() != sweep.described()
