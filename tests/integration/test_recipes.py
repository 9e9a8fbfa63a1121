"""Every recipe parses against the real signatures and says what it is."""

from pathlib import Path

import pytest

from chasm.training.recipes import Recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "experiments").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_recipe_parses_and_builds(path):
    recipe = Recipe(["-c", str(path)])
    assert recipe.name != "run", "a recipe has a name"
    assert recipe.selection.monitor.startswith("val/"), "validation selects"
    assert recipe.make_model() is not None
    assert recipe.make_data().seed == recipe.seed
    header = path.read_text().splitlines()[0]
    assert header.startswith("# "), "a recipe says what it is"


def test_recipes_are_listed_with_their_command():
    text = (ROOT / "experiments" / "README.md").read_text()
    for path in RECIPES:
        assert str(path.relative_to(ROOT / "experiments")) in text


def test_sizes_that_depend_on_data_are_in_no_recipe():
    for path in RECIPES:
        for key in ("n_voxels", "n_parcels", "n_patches", "patch_width", "cls_width"):
            assert f"{key}:" not in path.read_text(), (path, key)
