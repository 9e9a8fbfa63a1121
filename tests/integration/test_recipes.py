"""Every recipe parses against the real signatures and says what it is."""

from pathlib import Path

import pytest

from chasm.training.recipes import Recipe
from chasm.training.search_space import read_sweep
from chasm.training.space_checks import check_space

ROOT = Path(__file__).parents[2]
RETRAIN = sorted((ROOT / "ablations" / "retrain").glob("*.yaml"))
SWEEPS = sorted((ROOT / "experiments" / "sweeps").glob("*.yaml"))
FOUND = sorted(set((ROOT / "experiments").rglob("*.yaml")) - set(SWEEPS))
RECIPES = [*FOUND, *RETRAIN]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_recipe_parses_and_builds(path):
    recipe = Recipe(["-c", str(path)])
    assert recipe.name != "run", "a recipe has a name"
    assert recipe.selection.monitor.startswith("val/"), "validation selects"
    assert recipe.make_model() is not None
    assert recipe.make_data().seed == recipe.seed
    header = path.read_text().splitlines()[0]
    assert header.startswith("# "), "a recipe says what it is"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.name)
def test_a_sweep_searches_keys_of_its_recipe(path):
    sweep = read_sweep(path)
    recipe = check_space(sweep)
    assert sweep.values_of(recipe.settings()) is not None, "the recipe as it is comes first"
    assert path.read_text().startswith("# "), "a sweep says what it is"


def test_recipes_are_listed_with_their_command():
    text = (ROOT / "experiments" / "README.md").read_text()
    for path in [*RECIPES, *SWEEPS]:
        below = "experiments" if path not in RETRAIN else "ablations"
        assert str(path.relative_to(ROOT / below)) in text


def test_sizes_that_depend_on_data_are_in_no_recipe():
    for path in RECIPES:
        for key in ("n_voxels", "n_parcels", "n_patches", "patch_width", "cls_width"):
            assert f"{key}:" not in path.read_text(), (path, key)


def test_the_faithful_recipe_has_the_published_values():
    settings = Recipe(["-c", str(ROOT / "experiments" / "paper" / "stage1.yaml")]).settings()
    model, data = settings["model"]["init_args"], settings["data"]
    encoder, loss = model["encoder"]["init_args"], model["loss"]["init_args"]
    assert (model["target"], model["top_p"], model["token_scaling"]) == ("top_p", 0.7, "none")
    assert (model["learning_rate"], model["weight_decay"]) == (3e-5, 0.01)
    assert (model["schedule"], model["warmup"]) == ("constant", 0.0)
    published = {
        "d_model": 512, "global_blocks": 2, "local_blocks": 4, "d_state": 16, "d_conv": 4,
        "expand": 2, "dropout": 0.4, "token_noise": 0.1, "d_embedding": 256,
        "full_precision": True,
    }  # fmt: skip
    assert {key: encoder[key] for key in published} == published
    weights = [loss[f"{name}_weight"] for name in ("error", "pearson", "std", "contrastive")]
    assert weights == [0.7, 0.3, 0.2, 0.2]
    assert (loss["error"], loss["peak_alpha"], loss["peak_tau"]) == ("peak", 0.5, 0.3)
    assert loss["temperature"] == 0.15
    assert (data["split"], data["statistics"], data["samples"]) == ("paper", "all", "trials")
    assert data["parcels"] == {"kind": "sequential", "size": 30, "atlas": "streams"}
    assert data["backbone"]["model"] == "vit_base_patch14_dinov2"
    assert (data["backbone"]["image_size"], data["batch_size"]) == (224, 32)
    assert data["backbone"]["cls_layers"] == data["backbone"]["patch_layers"] == [12]
    assert settings["trainer"]["max_epochs"] == 450
    assert settings["trainer"]["gradient_clip_val"] == 0.5
