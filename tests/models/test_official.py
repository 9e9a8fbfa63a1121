"""Weights of the published code: their forward pass, written out here, equals our modules'."""

import math
import pickle

import pytest
import torch
from torch.nn import functional as F

from chasm.errors import DataError
from chasm.models.official import NAMES, convert_official, official_name, read_official
from chasm.models.published import PublishedEncoder
from chasm.models.stage2 import MambaVAE
from chasm.parcellation import sequential

CLS, PATCH, PATCHES, WIDTH_1, WIDTH_2, STATES, TAPS = 10, 7, 6, 20, 12, 5, 3
PARCELS, PER_PARCEL, LATENT, QUERIES, HIDDEN, EMBEDDING, POOLED = 4, 5, 3, 2, 9, 8, 11


def shapes(remainder=3):
    """Names and shapes of the published model, by hand, at sizes that all differ."""

    def linear(name, n_in, n_out):
        return {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}

    def norm(name, width):
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    def mamba(name, width):
        inner, rank = 2 * width, math.ceil(width / 16)
        return {
            f"{name}.A_log": (inner, STATES),
            f"{name}.D": (inner,),
            f"{name}.in_proj.weight": (2 * inner, width),
            f"{name}.conv1d.weight": (inner, 1, TAPS),
            f"{name}.conv1d.bias": (inner,),
            f"{name}.x_proj.weight": (rank + 2 * STATES, inner),
            f"{name}.dt_proj.weight": (inner, rank),
            f"{name}.dt_proj.bias": (inner,),
            f"{name}.out_proj.weight": (width, inner),
        }

    voxels, half, joint = PARCELS * PER_PARCEL + remainder, WIDTH_1 // 2, WIDTH_1 + WIDTH_1 // 2
    names = {
        **linear("stage1.what_proj", CLS, WIDTH_1),
        **norm("stage1.what_norm", WIDTH_1),
        **mamba("stage1.what_mamba.0", WIDTH_1),
        **norm("stage1.what_head.0", WIDTH_1),
        **linear("stage1.what_head.1", WIDTH_1, PARCELS),
        **linear("stage1.where_proj", PATCH, WIDTH_1),
        "stage1.where_pos_embed": (1, PATCHES, WIDTH_1),
        **norm("stage1.where_norm", WIDTH_1),
        **mamba("stage1.where_mamba.0", WIDTH_1),
        **mamba("stage1.where_mamba.1", WIDTH_1),
        **norm("stage1.where_pool.0", WIDTH_1),
        **linear("stage1.where_pool.1", WIDTH_1, half),
        **linear("stage1.where_head", half, PARCELS),
        **linear("stage1.fusion_gate.0", 2 * WIDTH_1, WIDTH_1),
        **linear("stage1.fusion_gate.2", WIDTH_1, 2),
        **linear("stage1.img_contrastive_head.net.0", joint, joint),
        **linear("stage1.img_contrastive_head.net.2", joint, EMBEDDING),
        **norm("stage1.img_contrastive_head.net.3", EMBEDDING),
        **linear("stage1.brain_contrastive_head.net.0", PARCELS, PARCELS),
        **linear("stage1.brain_contrastive_head.net.2", PARCELS, EMBEDDING),
        **norm("stage1.brain_contrastive_head.net.3", EMBEDDING),
        "stage2.roi_pos_embed": (1, PARCELS, WIDTH_2),
        "stage2.global_queries": (1, QUERIES, WIDTH_2),
        "stage2.fusion_weight": (),
        "stage2.global_scale": (),
        **linear("stage2.vis_tokenizer", CLS + POOLED, WIDTH_2),
        **linear("stage2.roi_tokenizer", 1, WIDTH_2),
        **norm("stage2.backbone_norm", WIDTH_2),
        **mamba("stage2.backbone.0", WIDTH_2),
        **mamba("stage2.backbone.1", WIDTH_2),
        **linear("stage2.vae_encoder.0", WIDTH_2, WIDTH_2 // 2),
        **linear("stage2.fc_mu", WIDTH_2 // 2, LATENT),
        **linear("stage2.fc_logvar", WIDTH_2 // 2, LATENT),
        **linear("stage2.latent_proj", LATENT, WIDTH_2),
        **mamba("stage2.global_mamba.0", WIDTH_2),
        **linear("stage2.global_head.0", QUERIES * WIDTH_2, HIDDEN),
        **norm("stage2.global_head.1", HIDDEN),
        **linear("stage2.global_head.4", HIDDEN, voxels),
        **linear("stage2.local_head.0", WIDTH_2, WIDTH_2 // 2),
        **norm("stage2.local_head.1", WIDTH_2 // 2),
        **linear("stage2.local_head.4", WIDTH_2 // 2, PER_PARCEL),
        **linear("stage2.remainder_head", WIDTH_2, remainder),
        **linear("stage2.scale_layer.0", WIDTH_2, 6),
        **linear("stage2.scale_layer.2", 6, 1),
        **linear("patch_pooler.0", PATCH, POOLED),
        **norm("patch_pooler.1", POOLED),
    }
    return {key: shape for key, shape in names.items() if 0 not in shape}


def random_state(remainder=3, branch=0.1):
    """Random weights of moderate outputs; `branch` scales what the Mamba layers add."""
    state = {key: torch.randn(shape) for key, shape in shapes(remainder).items()}
    for key, value in state.items():
        if value.ndim > 1:
            value.mul_(0.3 if key.endswith("A_log") else value.shape[-1] ** -0.5)
        if key.endswith("out_proj.weight"):
            value.mul_(branch)
        if key.startswith(("stage1.fusion_gate", "stage2.fc_logvar", "stage2.scale_layer")):
            value.mul_(0.3)  # so that no softmax, sigmoid or clamp is saturated
    return state


def tokens(images=5):
    return torch.randn(images, 1, CLS), torch.randn(images, PATCHES, PATCH)


class Published:
    """The published forward pass on a published state dict, in double precision.

    `clamped` is the share of each stack's last branch that the clamp of +-10 cuts.
    """

    def __init__(self, state):
        self.state = {key: value.double() for key, value in state.items()}
        self.clamped = {}

    def linear(self, name, x):
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name, x):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def mamba(self, name, x):
        """One layer over (tokens, width), a state at a time."""
        get = {key[len(name) + 1 :]: v for key, v in self.state.items() if key.startswith(name)}
        u, gate = (get["in_proj.weight"] @ x.T).chunk(2)
        taps, length = get["conv1d.weight"][:, 0], x.shape[0]
        padded = F.pad(u, (TAPS - 1, 0))
        u = sum(taps[:, k, None] * padded[:, k : k + length] for k in range(TAPS))
        u = F.silu(u + get["conv1d.bias"][:, None])
        rank = get["dt_proj.weight"].shape[1]
        step, b, c = (get["x_proj.weight"] @ u).split([rank, STATES, STATES])
        step = F.softplus(get["dt_proj.weight"] @ step + get["dt_proj.bias"][:, None])
        state, outputs = torch.zeros(u.shape[0], STATES, dtype=u.dtype), []
        for t in range(length):
            decay = torch.exp(-step[:, t, None] * get["A_log"].exp())
            state = decay * state + step[:, t, None] * b[None, :, t] * u[:, t, None]
            outputs.append(state @ c[:, t] + get["D"] * u[:, t])
        return (torch.stack(outputs, 1) * F.silu(gate)).T @ get["out_proj.weight"].T

    def blocks(self, name, x):
        count = len({key.split(".")[2] for key in self.state if key.startswith(name + ".")})
        for number in range(count):
            branch = torch.stack([self.mamba(f"{name}.{number}", image) for image in x])
            self.clamped[name] = branch.abs().gt(10).double().mean().item()
            x = x + branch.clamp(-10, 10)
        return x

    def contrast(self, name, x):
        hidden = F.gelu(self.linear(f"{name}.net.0", x))
        return self.norm(f"{name}.net.3", self.linear(f"{name}.net.2", hidden))

    def stage1(self, cls, patches):
        what = self.norm("stage1.what_norm", self.linear("stage1.what_proj", cls))
        what = self.blocks("stage1.what_mamba", what)[:, 0]
        what_roi = self.linear("stage1.what_head.1", self.norm("stage1.what_head.0", what))
        where = self.linear("stage1.where_proj", patches) + self.state["stage1.where_pos_embed"]
        where = self.blocks("stage1.where_mamba", self.norm("stage1.where_norm", where)).mean(1)
        where = self.linear("stage1.where_pool.1", self.norm("stage1.where_pool.0", where))
        where = F.gelu(where)
        where_roi = self.linear("stage1.where_head", where)
        seen = torch.cat([what, where, torch.zeros(len(what), WIDTH_1 - where.shape[1])], -1)
        gate = F.gelu(self.linear("stage1.fusion_gate.0", seen))
        gate = self.linear("stage1.fusion_gate.2", gate).softmax(-1)
        parcels = gate[:, :1] * what_roi + gate[:, 1:] * where_roi
        image = self.contrast("stage1.img_contrastive_head", torch.cat([what, where], -1))
        return parcels, gate, image, self.contrast("stage1.brain_contrastive_head", parcels)

    def stage2(self, cls, patches, parcels):
        pooled = self.norm("patch_pooler.1", self.linear("patch_pooler.0", patches.mean(1)))
        visual = torch.cat([cls[:, 0], F.gelu(pooled)], -1)
        visual = self.linear("stage2.vis_tokenizer", visual)[:, None]
        roi = self.linear("stage2.roi_tokenizer", parcels[..., None])
        x = torch.cat([visual, roi + self.state["stage2.roi_pos_embed"]], 1)
        memory = self.blocks("stage2.backbone", self.norm("stage2.backbone_norm", x))
        hidden = F.gelu(self.linear("stage2.vae_encoder.0", memory.mean(1)))
        mean = self.linear("stage2.fc_mu", hidden)
        log_variance = self.linear("stage2.fc_logvar", hidden)
        memory = memory + self.linear("stage2.latent_proj", mean)[:, None]
        queries = self.state["stage2.global_queries"].expand(len(cls), -1, -1)
        mixed = self.blocks("stage2.global_mamba", torch.cat([memory, queries], 1))
        mixed = self.linear("stage2.global_head.0", mixed[:, -QUERIES:].flatten(1))
        mixed = F.gelu(self.norm("stage2.global_head.1", mixed))
        holistic = self.linear("stage2.global_head.4", mixed)
        local = self.norm("stage2.local_head.1", self.linear("stage2.local_head.0", memory[:, 1:]))
        local = parcels[..., None] + self.linear("stage2.local_head.4", F.gelu(local))
        local = local.flatten(1)
        if "stage2.remainder_head.weight" in self.state:
            local = torch.cat([local, self.linear("stage2.remainder_head", memory[:, 0])], 1)
        share = self.state["stage2.fusion_weight"].sigmoid()
        scale = F.gelu(self.linear("stage2.scale_layer.0", memory[:, 0]))
        scale = self.linear("stage2.scale_layer.2", scale).sigmoid()
        scale = scale * self.state["stage2.global_scale"]
        return scale * (share * holistic + (1 - share) * local), mean, log_variance


def compare(state, tolerance):
    """Compare everything that both predict for a batch; return the reference."""
    model, published = convert_official(state), Published(state)
    cls, patches = tokens()
    with torch.no_grad():
        ours = model.encoder(cls, patches)
        out = model.decoder(cls, patches, ours.parcels)
        response = model.encoder.embed_parcels(ours.parcels)
    parcels, gate, image, brain = published.stage1(cls.double(), patches.double())
    assert ((gate > 0.01) & (gate < 0.99)).all()
    voxels, mean, log_variance = published.stage2(cls.double(), patches.double(), parcels)
    for found, expected in (
        (ours.parcels, parcels), (ours.gate[:, 0], gate), (ours.visual_embedding, image),
        (response, brain), (out.voxels, voxels), (out.mean, mean),
        (out.log_variance, log_variance),
    ):  # fmt: skip
        torch.testing.assert_close(
            found, expected, atol=tolerance, rtol=tolerance, check_dtype=False
        )
    return published


@pytest.mark.parametrize("remainder", [0, 3])
def test_it_reproduces_the_published_forward_pass(remainder):
    published = compare(random_state(remainder), 1e-5)
    assert max(published.clamped.values()) == 0


def test_it_clamps_the_branches_as_published():
    published = compare(random_state(branch=2.0), 1e-3)
    del published.clamped["stage1.what_mamba"]  # one token: its branches stay small
    assert len(published.clamped) == 3
    assert all(0.005 < share < 0.9 for share in published.clamped.values())


def test_sizes_come_from_the_shapes():
    model = convert_official(random_state())
    assert model.sizes == {
        "n_cls": 1, "cls_width": CLS, "n_patches": PATCHES, "patch_width": PATCH,
        "n_voxels": 23, "n_parcels": PARCELS,
    }  # fmt: skip
    assert torch.equal(model.parcellation.labels, sequential(23, PER_PARCEL).labels)
    sizes = [model.sizes[name] for name in ("cls_width", "n_cls", "patch_width", "n_patches")]
    encoder = PublishedEncoder(*sizes, PARCELS, **model.encoder_args)
    encoder.load_state_dict(model.encoder.state_dict())
    decoder = MambaVAE(*sizes, model.parcellation, **model.decoder_args)
    decoder.load_state_dict(model.decoder.state_dict())
    batch = tokens()
    parcels = encoder.eval()(*batch).parcels
    assert torch.equal(parcels, model.encoder(*batch).parcels)
    assert torch.equal(
        decoder.eval()(*batch, parcels).voxels, model.decoder(*batch, parcels).voxels
    )
    assert not model.encoder.training
    assert not model.decoder.training


def test_every_published_tensor_is_used_and_copied():
    state = random_state()
    model = convert_official(state)
    own = {
        f"{part}.{key}": value
        for part in ("encoder", "decoder")
        for key, value in getattr(model, part).state_dict().items()
    }
    names = {key: official_name(key) for key in own}
    assert sorted(name for name in names.values() if name) == sorted(state)
    assert {key for key, name in names.items() if name is None} == {
        *(f"{part}.{kind}_scaler.{value}" for part in ("encoder", "decoder")
          for kind in ("cls", "patch") for value in ("mean", "std")),
        "decoder.residual.place",
    }  # fmt: skip
    for key, name in names.items():
        if name:
            assert torch.equal(own[key].flatten(), state[name].flatten())
    state["stage2.global_scale"].fill_(torch.nan)
    assert model.decoder.amplitude.bound.isfinite()


def test_names_at_the_published_sizes():
    """Every parameter of the paper-sized modules has a published name, all different."""
    parcellation = sequential(15724, 30)
    with torch.device("meta"):
        encoder = PublishedEncoder(768, 1, 768, 256, 524)
        decoder = MambaVAE(768, 1, 768, 256, parcellation)
    own = [f"encoder.{name}" for name, _ in encoder.named_parameters()]
    own += [f"decoder.{name}" for name, _ in decoder.named_parameters()]
    names = [official_name(name) for name in own]
    assert None not in names
    assert len(set(names)) == len(names)
    assert "stage1.where_mamba.3.dt_proj.bias" in names
    assert "stage2.backbone.5.A_log" in names
    prefixes = [theirs.split(".{n}")[0] for theirs in NAMES]
    assert all(any(name.startswith(prefix) for name in names) for prefix in prefixes)


def test_an_untrained_second_stage_is_recognised():
    state = random_state()
    assert convert_official(state).stage2_trained
    state["stage2.fusion_weight"], state["stage2.global_scale"] = (
        torch.tensor(0.5),
        torch.tensor(2.5),
    )
    assert not convert_official(state).stage2_trained


def test_half_precision_weights_become_single():
    state = {key: value.half() for key, value in random_state().items()}
    model = convert_official(state)
    assert {p.dtype for p in model.decoder.parameters()} == {torch.float32}
    value = model.encoder.state_dict()["global_stream.projection.weight"]
    assert torch.equal(value, state["stage1.what_proj.weight"].float())


@pytest.mark.parametrize(
    "key", ["stage1.what_proj.weight", "stage1.where_mamba.1.D", "stage2.fc_logvar.bias",
            "stage2.backbone.0.A_log", "stage2.remainder_head.bias", "stage2.fusion_weight",
            "patch_pooler.1.bias"],
)  # fmt: skip
def test_a_missing_tensor_is_named(key):
    state = random_state()
    del state[key]
    with pytest.raises(DataError) as error:
        convert_official(state, "best_model.pth")
    assert str(error.value).startswith(f"best_model.pth:{key}: is missing. Give ")


@pytest.mark.parametrize(
    "key", ["stage1.what_proj.weights", "module.stage1.what_proj.weight", "stage2.backbone.7.D",
            "stage2.backbone.x.D", "encoder.norm.weight"],
)  # fmt: skip
def test_an_unexpected_tensor_is_named(key):
    with pytest.raises(DataError) as error:
        convert_official({**random_state(), key: torch.zeros(3)})
    assert str(error.value).startswith(f"official checkpoint:{key}: is not part of the published")


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("stage1.what_head.1.weight", (5, 20), r"shape \(5, 20\), expected \(4, 20\)"),
        ("stage1.where_pos_embed", (6, 20), r"shape \(6, 20\), expected \(1, 20, 20\)"),
        ("stage2.roi_pos_embed", (2, 4, 12), r"shape \(2, 4, 12\), expected \(1, 4, 12\)"),
        ("stage2.fusion_weight", (1,), r"shape \(1,\), expected \(\)"),
        ("stage2.global_head.4.weight", (26, 9), "26 voxels do not make 4 parcels of 5"),
        ("stage2.global_head.4.weight", (19, 9), "19 voxels do not make 4 parcels of 5"),
        ("stage2.fc_mu.weight", (), r"shape \(\), expected at least 1 axes"),
        ("stage1.fusion_gate.0.weight", (20, 30), r"shape \(20, 30\), expected \(20, 40\)"),
    ],
)
def test_a_wrong_shape_is_named(key, shape, message):
    with pytest.raises(DataError, match=message):
        convert_official({**random_state(), key: torch.zeros(shape)})


def test_values_that_cannot_be_weights():
    state = random_state()
    with pytest.raises(DataError, match=r"stage2.fc_mu.bias: is not a floating-point tensor"):
        convert_official({**state, "stage2.fc_mu.bias": torch.zeros(LATENT).long()})
    with pytest.raises(DataError, match=r"stage2.fc_mu.bias: is not a floating-point tensor"):
        convert_official({**state, "stage2.fc_mu.bias": [0.0] * LATENT})
    with pytest.raises(DataError, match=r"stage2.fc_mu.bias: has values that are not finite"):
        convert_official({**state, "stage2.fc_mu.bias": torch.full((LATENT,), torch.inf)})


def test_reading_a_file(tmp_path):
    state, path = random_state(), tmp_path / "best_model.pth"
    for content in (state, {"model_state_dict": state, "epoch": 3, "note": "best"}):
        torch.save(content, path)
        read = read_official(path)
        assert list(read) == list(state)
        assert all(torch.equal(read[key], state[key]) for key in state)
    convert_official(read, path)


class Surprise:
    """What unpickling would run."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_refusing_a_file(tmp_path):
    path = tmp_path / "x.pth"
    for content in (Surprise(), {"stage1.what_proj.weight": Surprise()}):
        torch.save(content, path)
        with pytest.raises(DataError, match=r"x.pth: is no file of tensors .* trust it"):
            read_official(path)
    path.write_bytes(pickle.dumps(Surprise(), protocol=2))
    with pytest.raises(DataError, match="is no file of tensors"):
        read_official(path)
    for content, message in (
        ([torch.zeros(1)], "holds a list, no state dict"),
        ({}, "holds a dict, no state dict"),
        ({"a": {"x": torch.zeros(1)}, "b": {"x": torch.zeros(1)}}, "x.pth:a: is a dict"),
        ({"state": {"x": 3}}, "x.pth:x: is a int, no tensor"),
        ({"x": torch.zeros(1), "epoch": 3}, "x.pth:epoch: is a int, no tensor"),
    ):
        torch.save(content, path)
        with pytest.raises(DataError, match=message):
            read_official(path)
    for content in (b"", b"not a checkpoint at all", b"PK\x03\x04 cut"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x.pth: is "):
            read_official(path)
    with pytest.raises(DataError, match=r"y.pth: is not a readable checkpoint"):
        read_official(tmp_path / "y.pth")
