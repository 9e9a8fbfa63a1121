"""Stage 2 with what is fixed of every image computed once equals Stage 2 that computes it anew."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from chasm.data.batches import KnownImages
from chasm.models.stage2 import MambaVAE
from chasm.training.image_cache import learn_images
from chasm.training.recipes import Recipe
from chasm.training.runs import fit

RECIPE = Path(__file__).parents[2] / "experiments" / "smoke_stage2.yaml"
STILL = [
    "--model.init_args.decoder.init_args.token_noise", "0",
    "--trainer.max_epochs", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def stage1(toy_dataset, tmp_path_factory):
    runs = tmp_path_factory.mktemp("stage1")
    recipe = ["-c", str(RECIPE), "--data.dataset_dir", str(toy_dataset), "--runs", str(runs)]
    return fit(Recipe(recipe).stage1_recipe())


@pytest.fixture
def arguments(toy_dataset, stage1, tmp_path):
    return ["-c", str(RECIPE), "--data.dataset_dir", str(toy_dataset), "--stage1", str(stage1),
            "--runs", str(tmp_path / "runs")]  # fmt: skip


def weights(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


class Watch:
    """Count passes through Stage 1 and the patch tokens of steps."""

    def __init__(self, monkeypatch):
        from chasm.training.modules import Stage1Module
        from chasm.training.stage2 import Stage2Module

        self.stage1, self.patches, self.known = 0, set(), []
        encode, decode = Stage1Module.network_streams, Stage2Module.decode

        def counted(module, batch):
            self.stage1 += 1
            return encode(module, batch)

        def seen(module, batch, parcels):
            self.patches.add(batch["patches"].shape[1])
            self.known.append(module.trainer.datamodule.known)
            return decode(module, batch, parcels)

        monkeypatch.setattr(Stage1Module, "network_streams", counted)
        monkeypatch.setattr(Stage2Module, "decode", seen)


def test_cached_training_equals_training_that_computes_anew(arguments, monkeypatch):
    recipe = [*arguments, *STILL, "--data.samples", "trials"]  # which share the image's row
    data = Recipe(recipe).make_data()
    anew = fit(Recipe([*recipe, "--model.init_args.cache_stage1", "false"]))
    with monkeypatch.context() as patch:
        watch = Watch(patch)
        cached = fit(Recipe(recipe))
    split = data.data_split
    once = sum(-(-len(ids) // data.batch_size) for ids in (split.train, split.validation))
    assert watch.stage1 == once, "every image passes through Stage 1 once in the whole fit"
    assert watch.patches == {1}, "no step is given patch tokens"
    assert not any(known.parts for known in watch.known[0].values()), "freed at the end"
    assert cached != anew
    a, b = weights(anew), weights(cached)
    for key in a:
        torch.testing.assert_close(b[key], a[key], rtol=0, atol=1e-6)
    tables = [pd.read_csv(run / "metrics.csv") for run in (anew, cached)]
    assert {"val/mse", "val/share_linear", "train/loss"} <= set(tables[0])
    pd.testing.assert_frame_equal(*tables, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("extra", "patch"),
    [
        (["--model.init_args.stage1_training", "joint"], False),
        ([], True),  # a decoder that says that it reads patches
    ],
)
def test_where_patches_or_gradients_are_needed_tokens_are_read(
    arguments, monkeypatch, extra, patch
):
    if patch:
        monkeypatch.setattr(MambaVAE, "reads_patches", True)
    watch = Watch(monkeypatch)
    recipe = Recipe([*arguments, *STILL, *extra])
    fit(recipe)
    assert watch.patches == {recipe.make_data().sizes.n_patches}


def test_what_is_kept_and_held_is_bounded(toy_dataset):
    data = Recipe(["-c", str(RECIPE), "--data.dataset_dir", str(toy_dataset)]).make_data()
    held = []

    def compute(batch):
        held.append(batch["patches"].numel())
        return {"patches": batch["patches"].mean(1, keepdim=True), "parcels": batch["cls"][:, 0]}

    learn_images(data, "train", compute, torch.device("cpu"))
    parts, sizes, n = data.known["train"].parts, data.sizes, len(data.data_split.train)
    kept = sum(part.untyped_storage().nbytes() for part in parts.values())
    assert kept == n * (sizes.patch_width + sizes.cls_width) * 4
    assert max(held) == data.batch_size * sizes.n_patches * sizes.patch_width
    assert len(held) > 2
    image = data.data_split.train[[5, 0]]
    expected = np.asarray(data.tokens.patches[image], np.float32).mean(1, keepdims=True)
    np.testing.assert_allclose(data.known["train"].of(image)["patches"], expected, atol=1e-5)
    assert not data.known["validation"].parts


def test_known_parts_are_found_by_image():
    known = KnownImages()
    assert known.of(np.array([4, 2])) == {}
    known.learn(np.array([2, 3, 9]), {"parcels": torch.tensor([[2.0], [3.0], [9.0]])})
    assert known.of(np.array([9, 2, 9]))["parcels"].tolist() == [[9.0], [2.0], [9.0]]
    known.forget()
    assert known.of(np.array([9])) == {}
