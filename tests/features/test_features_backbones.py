"""Backbones: what the tokens mean, where weights come from, and what is refused."""

import hashlib
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from scipy import stats

from chasm.errors import CacheError, ConfigError
from chasm.features.backbones import (
    BackboneSpec,
    create_backbone,
    matches,
    resize_images,
    resolve_layers,
)
from chasm.features.extract import _require_float16
from chasm.training.recipes import Recipe

TINY = "vit_tiny_patch16_224"
SMOKE = Path(__file__).parents[2] / "experiments/smoke.yaml"
GRID, SCALES, ORIENTATIONS = 8, 5, 6


def spec(weights="untrained", size=64, cls=(-1,), patches=(-1,)):
    return BackboneSpec(TINY, str(weights), size, cls, patches)


@pytest.fixture(scope="module")
def pyramid():
    return create_backbone(BackboneSpec())


@pytest.fixture(scope="module")
def vit():
    return create_backbone(spec(cls=(3, -1), patches=(6, 12)))


def random_images(n, shape=(128, 128, 3), seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(n)]


def tokens(backbone, images):
    return backbone(backbone.preprocess(images))


def grating(frequency, degrees, size=128):
    """Full-contrast grating; 0 degrees varies along x (vertical bars)."""
    y, x = np.mgrid[:size, :size] / size
    angle = np.deg2rad(degrees)
    phase = 2 * np.pi * frequency * (x * np.cos(angle) + y * np.sin(angle))
    values = np.round(127.5 + 127.5 * np.sin(phase))
    return np.repeat(values[..., None], 3, axis=2).astype(np.uint8)


def amplitudes(backbone, image):
    """Pyramid amplitudes, (rows, columns, scales, orientations), compression undone."""
    values = tokens(backbone, [image]).patches[0, :, : SCALES * ORIENTATIONS].numpy()
    return np.expm1(values).reshape(GRID, GRID, SCALES, ORIENTATIONS) * 0.02


def test_pyramid_sizes(pyramid):
    cls, patches = tokens(pyramid, random_images(3))
    assert cls.shape == (3, 1, 725)
    assert patches.shape == (3, 64, 36)
    assert (pyramid.n_cls, pyramid.cls_width) == (1, 725)
    assert (pyramid.n_patches, pyramid.patch_width, pyramid.grid) == (64, 36, (8, 8))
    assert pyramid.weights_label == "weight-free"
    assert not cls.requires_grad
    assert create_backbone(BackboneSpec(image_size=192)).grid == (12, 12)


@pytest.mark.parametrize(("frequency", "scale"), [(32, 0), (16, 1), (8, 2), (4, 3)])
@pytest.mark.parametrize(("degrees", "channel"), [(0, 0), (90, 3)])
def test_grating_drives_its_scale_and_orientation(pyramid, frequency, scale, degrees, channel):
    inner = amplitudes(pyramid, grating(frequency, degrees))[2:6, 2:6].mean((0, 1))
    peak = inner.max()
    best = np.unravel_index(inner.argmax(), inner.shape)
    assert best[1] == channel
    assert abs(best[0] - scale) <= 1
    assert 0.25 < peak < 0.45, "the same contrast must weigh the same at every scale"
    orthogonal = (channel + 3) % ORIENTATIONS
    assert inner[:, orthogonal].max() < 0.02 * peak


def test_oblique_orientations_are_mirror_images(pyramid):
    right = amplitudes(pyramid, grating(16, 30))[2:6, 2:6].mean((0, 1, 2))
    left = amplitudes(pyramid, grating(16, -30))[2:6, 2:6].mean((0, 1, 2))
    assert right.argmax() in (1, 5)
    assert left.argmax() == ORIENTATIONS - right.argmax()


def test_energy_stays_where_the_contrast_is(pyramid):
    image = np.full((128, 128, 3), 128, np.uint8)
    image[:64, 64:] = grating(32, 0)[:64, 64:]
    fine = amplitudes(pyramid, image)[:, :, 0].max(-1)
    inside = fine[1:3, 5:7].min()
    assert fine[5:, :].max() < 0.05 * inside
    assert fine[:, :3].max() < 0.05 * inside


def test_image_border_is_not_wrapped_around(pyramid):
    ramp = np.repeat(np.linspace(0, 255, 128)[None, :, None], 128, 0).repeat(3, 2).astype(np.uint8)
    fine = amplitudes(pyramid, ramp)[:, :, :2]
    assert fine.max() < 0.03, "a circular pyramid sees a step of 255 levels at the border"


def test_patch_colours_match_a_naive_loop(pyramid):
    image = random_images(1, seed=5)[0]
    image[:40] //= 3
    found = tokens(pyramid, [image]).patches[0, :, -6:].numpy()
    red, green, blue = np.moveaxis(image / 255, -1, 0)
    channels = [(red + green + blue) / 3, red - green, (red + green) / 2 - blue]
    for patch in range(64):
        row, column = divmod(patch, GRID)
        cells = [c[16 * row :, 16 * column :][:16, :16] for c in channels]
        expected = [c.mean() for c in cells] + [np.log1p(c.std() / 0.02) for c in cells]
        np.testing.assert_allclose(found[patch], expected, atol=2e-5)


def test_cls_moments_match_scipy(pyramid):
    image = random_images(1, seed=6)[0]
    image[30:90, 20:100, 0] = 250
    cls = tokens(pyramid, [image]).cls[0, 0].numpy()
    dithered = image.astype(np.float64).transpose(2, 0, 1) / 255 + pyramid.dither.numpy()
    grey = dithered.mean(0).ravel()
    pixel = [
        grey.mean(),
        np.log(grey.var(ddof=1)),
        np.arcsinh(stats.skew(grey)),
        np.arcsinh(stats.kurtosis(grey, fisher=False)),
        grey.min(),
        grey.max(),
    ]
    np.testing.assert_allclose(cls[:6], pixel, atol=1e-3)
    red, green, blue = dithered.reshape(3, -1)
    opponent = np.stack([(red + green + blue) / 3, red - green, (red + green) / 2 - blue])
    r = np.corrcoef(opponent)
    expected = np.concatenate(
        [
            opponent.mean(1),
            np.log(opponent.std(1)),
            np.arcsinh(stats.skew(opponent, axis=1)),
            np.arcsinh(stats.kurtosis(opponent, axis=1, fisher=False)),
            [r[0, 1], r[0, 2], r[1, 2]],
        ]
    )
    np.testing.assert_allclose(cls[-15:], expected, atol=1e-4)


def test_strange_images_give_finite_float16(pyramid):
    point = np.zeros((128, 128, 3), np.uint8)
    point[64, 64] = 255
    grey = random_images(1)[0][..., :1].repeat(3, 2)
    grey.flags.writeable = False
    strange = [np.full((128, 128, 3), v, np.uint8) for v in (0, 128, 255)]
    strange += [point, grey, random_images(1, (37, 211, 3))[0], random_images(1, (1, 1, 3))[0]]
    cls, patches = tokens(pyramid, strange)
    assert cls.half().isfinite().all()
    assert patches.half().isfinite().all()
    assert cls.abs().max() < 100
    assert patches.abs().max() < 100


def test_tokens_do_not_depend_on_the_batch(pyramid, vit):
    images = random_images(4)
    for backbone in (pyramid, vit):
        whole, one = tokens(backbone, images), tokens(backbone, images[2:3])
        for a, b in zip(whole, one, strict=True):
            torch.testing.assert_close(a[2:3], b, rtol=1e-4, atol=1e-4)


def test_resizing_keeps_the_whole_image():
    image = np.zeros((100, 200, 3), np.uint8)
    image[:, 100:] = 200
    small = resize_images([image], 50)[0]
    assert small.shape == (3, 50, 50)
    assert float(small[:, :, :20].max()) == 0
    assert abs(float(small[:, :, 30:].mean()) - 200 / 255) < 1e-3
    same = random_images(1)[0]
    np.testing.assert_allclose(
        resize_images([same], 128)[0].permute(1, 2, 0).numpy() * 255, same, atol=1e-4
    )


@pytest.mark.parametrize("size", [100, 96, 130])
def test_pyramid_refuses_sizes(size):
    with pytest.raises(ConfigError, match=f"image_size: {size} px"):
        create_backbone(BackboneSpec(image_size=size))


def test_layers_count_from_one_or_from_the_end():
    assert resolve_layers((3, -1, 6), 12, "cls_layers") == (3, 12, 6)
    for wrong in [(0,), (13,), (-13,), (), (12, -1)]:
        with pytest.raises(ConfigError, match="cls_layers"):
            resolve_layers(wrong, 12, "cls_layers")


def test_vit_tokens_are_the_normed_blocks(vit):
    x = vit.preprocess(random_images(2, (70, 90, 3)))
    cls, patches = vit(x)
    assert cls.shape == (2, 2, 192)
    assert patches.shape == (2, 16, 2 * 192)
    kept = {}
    hooks = [
        vit.model.blocks[i - 1].register_forward_hook(
            lambda _module, _inputs, output, i=i: kept.__setitem__(i, output)
        )
        for i in (3, 6, 12)
    ]
    with torch.no_grad():
        final = vit.model.forward_features(x)
        normed = {i: vit.model.norm(kept[i]) for i in kept}
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(cls, torch.stack([normed[3][:, 0], normed[12][:, 0]], 1))
    torch.testing.assert_close(patches, torch.cat([normed[6][:, 1:], normed[12][:, 1:]], -1))
    torch.testing.assert_close(cls[:, 1], final[:, 0])


def test_untrained_is_labelled_and_repeatable(vit):
    state = torch.random.get_rng_state()
    again = create_backbone(spec(cls=(3, -1), patches=(6, 12)))
    assert torch.equal(state, torch.random.get_rng_state())
    assert again.weights_label == "UNTRAINED"
    assert again.key == vit.key
    assert not any(p.requires_grad for p in again.parameters())
    assert not again.training


def test_register_tokens_are_left_out():
    name = "vit_small_patch14_reg4_dinov2"
    backbone = create_backbone(BackboneSpec(name, "untrained", 56))
    assert backbone.grid == (4, 4)
    assert backbone.n_patches == 16
    assert backbone.key["default_image_size"] == 518


def test_standardisation_is_the_models_own(vit):
    white = vit.preprocess([np.full((64, 64, 3), 255, np.uint8)])
    config = timm.get_pretrained_cfg(TINY)
    expected = (1 - torch.tensor(config.mean)) / torch.tensor(config.std)
    torch.testing.assert_close(white[0].mean((1, 2)), expected)


@pytest.fixture(scope="module")
def trained():
    """A model that stands for a trained one: random, but not the untrained one's values."""
    torch.manual_seed(5)
    return timm.create_model(TINY, num_classes=7).eval()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_weight_file(tmp_path, trained, suffix):
    path = tmp_path / f"weights{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save(trained.state_dict(), path)
    backbone = create_backbone(spec(path, size=224))
    x = backbone.preprocess(random_images(1, (224, 224, 3)))
    with torch.no_grad():
        expected = trained.forward_features(x)
    torch.testing.assert_close(backbone(x).cls[:, 0], expected[:, 0])
    torch.testing.assert_close(backbone(x).patches, expected[:, 1:])
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    assert backbone.weights_label == f"file:{sha[:12]}"
    assert backbone.key["weights"] == {"source": "file", "sha256": sha}
    assert matches(spec(path, size=224), backbone.key)
    other = {**trained.state_dict(), "norm.bias": trained.norm.bias.detach() + 1}
    save(other, path)
    assert create_backbone(spec(path, size=224)).key != backbone.key
    assert not matches(spec(path, size=224), backbone.key)


class _Payload:
    def __reduce__(self):
        return (print, ("a pickle was executed",))


def test_weight_files_that_are_refused(tmp_path, trained, capsys):
    with pytest.raises(ConfigError, match="no such weight file"):
        create_backbone(spec(tmp_path / "none.pth"))
    (tmp_path / "w.npz").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"found a \.npz file"):
        create_backbone(spec(tmp_path / "w.npz"))
    bad = tmp_path / "bad.pth"
    torch.save({"model": _Payload()}, bad)
    with pytest.raises(ConfigError, match=r"bad\.pth:weights"):
        create_backbone(spec(bad))
    assert "executed" not in capsys.readouterr().out
    part = {k: v for k, v in trained.state_dict().items() if "blocks.3" not in k}
    torch.save(part, bad)
    with pytest.raises(ConfigError, match="not a state dict of"):
        create_backbone(spec(bad))
    for suffix in (".pth", ".safetensors"):
        broken = tmp_path / f"broken{suffix}"
        broken.write_bytes(b"not weights at all")
        with pytest.raises(ConfigError, match=f"broken{suffix}:weights"):
            create_backbone(spec(broken))


def test_models_that_are_refused():
    with pytest.raises(ConfigError, match=r"no model 'vit_tiny_patch16_225'.*vit_tiny_patch16_224"):
        create_backbone(BackboneSpec("vit_tiny_patch16_225"))
    with pytest.raises(ConfigError, match="resnet18 has no CLS token"):
        create_backbone(BackboneSpec("resnet18", "untrained"))
    with pytest.raises(ConfigError, match="does not take an image size"):
        create_backbone(BackboneSpec("resnet18", "untrained", 64))
    with pytest.raises(ConfigError, match="cls_layers"):
        create_backbone(spec(cls=(13,)))


def test_unreachable_hub_is_one_line(monkeypatch):
    def offline(*_args, **_options):
        raise LocalEntryNotFoundError("Cannot find the file.\nAnd a second line.")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConfigError, match=r"weights FILE.*untrained.*pyramid") as caught:
        create_backbone(BackboneSpec(TINY, "pretrained"))
    assert "\n" not in str(caught.value)
    _options_exist(caught.value.remedy, 3)


def _options_exist(remedy, at_least):
    """Parse every option that a remedy suggests as the command line would."""
    values = {"cls_layers": "[1,2]", "patch_layers": "[1]", "weights": "FILE", "model": "pyramid"}
    options = re.findall(r"`(--\S+?)(?: (\S+?))?`", remedy)
    assert len(options) >= at_least
    for option, value in options:
        field = option.rpartition(".")[2]
        value = value or values[field]
        parsed = Recipe(["-c", str(SMOKE), option, value]).settings()
        assert parsed["data"]["backbone"][field] == yaml.safe_load(value)


def test_remedies_name_options_that_exist(tmp_path, monkeypatch):
    for wrong, count in (
        (BackboneSpec("vit_tiny_patch16_225"), 1),
        (BackboneSpec("resnet18", "untrained"), 2),
        (BackboneSpec(TINY, str(tmp_path / "none.pth")), 1),
    ):
        with pytest.raises(ConfigError) as caught:
            create_backbone(wrong)
        _options_exist(caught.value.remedy, count)
    with pytest.raises(CacheError) as too_large:
        _require_float16(torch.full((1, 2), 1e6), "x", np.array([0]))
    _options_exist(too_large.value.remedy, 2)


def test_the_hubs_retries_are_not_logged(monkeypatch, caplog):
    def offline(*_args, **_options):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise LocalEntryNotFoundError("Cannot find the file.")

    monkeypatch.setattr(timm, "create_model", offline)
    level = logging.getLogger("huggingface_hub").level
    with pytest.raises(ConfigError):
        create_backbone(BackboneSpec(TINY, "pretrained"))
    assert "Retry" not in caplog.text
    assert logging.getLogger("huggingface_hub").level == level


def test_matching_specs_without_building(pyramid, vit):
    assert matches(BackboneSpec(), pyramid.key)
    assert matches(BackboneSpec(weights="untrained", image_size=128), pyramid.key)
    assert not matches(BackboneSpec(image_size=192), pyramid.key)
    assert matches(spec(cls=(-10, 12), patches=(-7, -1)), vit.key)
    assert not matches(spec(cls=(3, -1), patches=(-1, 6)), vit.key)
    assert not matches(spec("pretrained", cls=(3, -1), patches=(6, 12)), vit.key)
    assert not matches(spec(size=None, cls=(3, -1), patches=(6, 12)), vit.key)
    older = vit.key | {"versions": {"timm": "0.1"}}
    assert not matches(spec(cls=(3, -1), patches=(6, 12)), older)
