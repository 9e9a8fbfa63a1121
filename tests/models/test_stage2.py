"""Stage 2: sizes of the paper, fusion by hand, latent and draws, variants, learning."""

import pytest
import torch

from chasm.errors import ConfigError
from chasm.losses import Stage2Loss
from chasm.models.latent import LOG_VARIANCE_RANGE, Latent, sample
from chasm.models.stage2 import MambaVAE, MLPDecoder, VoxelDecoder
from chasm.parcellation import Parcellation, sequential

UNEVEN = [2, -1, 0, 2, 1, 2, 0, -1, 2, 1]
"""Parcels of 2, 2 and 4 voxels, two voxels without one, in mixed order."""


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def linear(n_in, n_out):
    return n_in * n_out + n_out


def test_parameter_counts_at_the_papers_sizes():
    """15,724 voxels in 524 parcels; the paper's total is 280 million."""
    parcellation = sequential(15724, 30)
    with torch.device("meta"):
        model = MambaVAE(768, 1, 768, 256, parcellation)
        light = [MambaVAE(768, 1, 768, 256, parcellation, head=h) for h in ("low_rank", "query")]
        mixing = MambaVAE(768, 1, 768, 256, parcellation, head="low_rank", mix_parcels=True)
        none = MambaVAE(768, 1, 768, 256, parcellation, head="none")
        dual = MambaVAE(768, 1, 768, 256, parcellation, d_latent=0)
        mlp = MLPDecoder(768, 1, 768, 256, parcellation)
    width, inner, states, rank, parcels, voxels = 384, 768, 16, 24, 524, 15724
    mamba = (
        2 * width * inner  # in_proj
        + inner * 4 + inner  # conv1d
        + inner * (rank + 2 * states)  # x_proj
        + linear(rank, inner)  # dt_proj
        + inner * states  # A_log
        + inner  # D
        + inner * width  # out_proj
    )  # fmt: skip
    head = linear(128 * width, 4096) + 2 * 4096 + linear(4096, voxels)
    latent = linear(width, 192) + 2 * linear(192, 128) + linear(128, width)
    total = (
        linear(768, 256) + 2 * 256 + linear(768 + 256, width)  # visual token
        + linear(1, width) + parcels * width + 2 * width  # parcel tokens, norm
        + 8 * mamba + 128 * width + latent + head
        + linear(width, 192) + 2 * 192 + linear(192, 30) + linear(width, 4)  # residual
        + linear(width, 256) + linear(256, 1) + 2  # amplitude with its bound, fusion
    )  # fmt: skip
    assert count(model) == total == 274_667_025
    assert total / 280e6 == pytest.approx(0.981, abs=1e-3)
    assert model.head_parameters() == head == 265_760_108
    for other in light:
        assert 10 * other.head_parameters() <= head
        assert count(other) - other.head_parameters() == total - head
    assert count(mixing) == count(light[0]) + linear(parcels, voxels)
    assert 10 * (mixing.head_parameters() + linear(parcels, voxels)) <= head
    assert none.head_parameters() == 0
    assert count(dual) == total - latent
    assert count(mlp) == linear(parcels, 4096) + 2 * 4096 + linear(4096, voxels) == 66_579_820


def small(parcellation=None, **options):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_blocks": 2, "decoder_blocks": 1, "d_state": 4, "d_patch": 6}
    sizes |= {"d_latent": 5, "d_variational": 7, "n_queries": 3, "d_hidden": 11, "rank": 2}
    sizes |= {"d_residual": 9, "d_amplitude": 8, "token_noise": 0.0}
    return MambaVAE(10, 2, 7, 12, parcellation or Parcellation(UNEVEN), **{**sizes, **options})


def batch(images=4, parcels=3):
    generator = torch.Generator().manual_seed(1)
    shapes = (images, 2, 10), (images, 12, 7), (images, parcels)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


VARIANTS = [
    {},
    {"head": "low_rank"},
    {"head": "query"},
    {"head": "none"},
    {"residual": False},
    {"mix_parcels": True},
    {"amplitude": False},
    {"d_latent": 0},
    {"direction": "alternate", "block_norm": True, "residual_clamp": 1.0, "dropout": 0.1},
]


@pytest.mark.parametrize("options", VARIANTS)
def test_output(options):
    model, inputs = small(**options).eval(), batch()
    out = model(*inputs)
    present = {
        "voxels": (4, 10),
        "mean": None if "d_latent" in options else (4, 5),
        "log_variance": None if "d_latent" in options else (4, 5),
        "holistic": None if options.get("head") == "none" else (4, 10),
        "residual": None if "residual" in options else (4, 10),
        "amplitude": None if "amplitude" in options else (4, 1),
    }
    for name, shape in present.items():
        value = getattr(out, name)
        assert (None if value is None else tuple(value.shape)) == shape
    assert torch.equal(model(*inputs).voxels, out.voxels)
    single = model(*(value[2:3] for value in inputs)).voxels
    torch.testing.assert_close(single, out.voxels[2:3])


@pytest.mark.parametrize("options", VARIANTS)
def test_every_parameter_learns(options):
    model = small(**options)
    out = model(*batch())
    out.voxels.square().sum().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_fusion_and_amplitude_by_hand():
    model = small().eval()
    with torch.no_grad():
        model.fusion.fill_(-1.2)
    out = model(*batch())
    share = 1 / (1 + torch.exp(torch.tensor(1.2)))
    expected = out.amplitude * (share * out.holistic + (1 - share) * out.residual)
    torch.testing.assert_close(out.voxels, expected)
    with torch.no_grad():
        model.fusion.fill_(30.0)
        model.amplitude.mlp[2].weight.zero_()
        model.amplitude.mlp[2].bias.fill_(0.0)
    out = model(*batch())
    torch.testing.assert_close(out.voxels, 1.25 * out.holistic)


def test_it_starts_as_the_published_code_does():
    model = small()
    assert model.fusion.item() == 0.5
    assert model.amplitude.bound.item() == 2.5
    assert small(amplitude_bound=1.5).amplitude.bound.item() == 1.5


def test_only_what_a_decoder_needs_is_there():
    assert not hasattr(small(head="none"), "fusion")
    assert not hasattr(small(residual=False), "fusion")
    assert small(amplitude=False).amplitude is None
    voxels = small(amplitude=False, head="none").eval()(*batch())
    assert torch.equal(voxels.voxels, voxels.residual)


def test_tokens_of_image_and_parcels():
    """By hand without blocks: the visual token first, then value times weight plus position."""
    model = small(encoder_blocks=0).eval()
    cls, patches, parcels = batch()
    tokens = model.encode(model.streams(cls, patches), parcels)
    pool, projection = model.visual.pool, model.visual.projection
    pooled = torch.nn.functional.layer_norm(patches.mean(1) @ pool[0].weight.T + pool[0].bias, (6,))
    joint = torch.cat([cls[:, 0], cls[:, 1], torch.nn.functional.gelu(pooled)], 1)
    visual = joint @ projection.weight.T + projection.bias
    weight, bias = model.value.weight[:, 0], model.value.bias
    values = parcels[:, :, None] * weight + bias + model.position
    expected = torch.nn.functional.layer_norm(torch.cat([visual[:, None], values], 1), (16,))
    torch.testing.assert_close(tokens, expected)


def test_the_holistic_decoder_sees_every_token():
    model = small(amplitude=False, d_latent=0).eval()
    cls, patches, parcels = batch()
    tokens = model.encode(model.streams(cls, patches), parcels).detach().requires_grad_()
    model.holistic(tokens).square().sum().backward()
    assert tokens.grad.abs().sum(-1).gt(0).all()


def test_alternate_direction_lets_the_visual_token_see_the_parcels():
    cls, patches, parcels = batch()
    for direction, sees in (("forward", False), ("alternate", True)):
        model = small(direction=direction).eval()
        assert [block.reverse for block in model.blocks] == [False, sees]
        assert not model.holistic.blocks[0].reverse
        first = model.encode(model.streams(cls, patches), parcels)[:, 0]
        other = model.encode(model.streams(cls, patches), parcels + 1)[:, 0]
        assert torch.equal(first, other) != sees


# The latent.


def test_the_latent_by_hand():
    latent, pooled = Latent(6, 4, 3), torch.randn(5, 6)
    hidden = torch.nn.functional.gelu(pooled @ latent.hidden[0].weight.T + latent.hidden[0].bias)
    mean, log_variance = latent(pooled)
    torch.testing.assert_close(mean, hidden @ latent.mean.weight.T + latent.mean.bias)
    expected = hidden @ latent.log_variance.weight.T + latent.log_variance.bias
    torch.testing.assert_close(log_variance, expected)


def test_the_log_variance_is_bounded():
    latent = Latent(6, 4, 2)
    with torch.no_grad():
        latent.log_variance.weight.zero_()
        latent.log_variance.bias.copy_(torch.tensor([1e6, -1e6]))
    mean, log_variance = latent(torch.randn(3, 6))
    assert log_variance.tolist() == [list(LOG_VARIANCE_RANGE[::-1])] * 3
    assert sample(mean, log_variance).isfinite().all()
    assert log_variance.exp().isfinite().all()


def test_samples_have_the_given_moments():
    mean, log_variance = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, 1.0]])
    drawn = sample(mean, log_variance, torch.Generator().manual_seed(0), 40_000)
    assert drawn.shape == (40_000, 1, 2)
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.var(0), log_variance.exp(), atol=0, rtol=0.03)
    assert sample(mean, log_variance).shape == (1, 2)


def test_the_latent_is_added_to_every_token():
    model = small().eval()
    tokens, z = torch.randn(4, 4, 16), torch.randn(4, 5)
    shift = z @ model.latent.projection.weight.T + model.latent.projection.bias
    for position in range(4):
        torch.testing.assert_close(
            model.inject(tokens, z)[:, position], tokens[:, position] + shift
        )


def test_training_samples_and_evaluation_does_not():
    model, inputs = small(), batch()
    assert not torch.equal(model(*inputs).voxels, model(*inputs).voxels)
    first = model(*inputs, generator=torch.Generator().manual_seed(3)).voxels
    state = torch.get_rng_state()
    again = model(*inputs, generator=torch.Generator().manual_seed(3)).voxels
    assert torch.equal(first, again)
    assert torch.equal(state, torch.get_rng_state())
    model.eval()
    assert torch.equal(model(*inputs).voxels, model(*inputs).voxels)
    assert torch.get_rng_state().equal(state)


def test_without_a_latent_training_is_deterministic():
    model, inputs = small(d_latent=0), batch()
    assert torch.equal(model(*inputs).voxels, model(*inputs).voxels)


def set_log_variance(model, value):
    with torch.no_grad():
        model.latent.log_variance.weight.zero_()
        model.latent.log_variance.bias.fill_(value)


def test_draws_spread_with_the_variance():
    model, inputs = small().eval(), batch()
    spread = []
    for value in (0.0, -4.0, -60.0):
        set_log_variance(model, value)
        draws = model.draws(*inputs, 200, torch.Generator().manual_seed(0), chunk=800)
        assert draws.shape == (200, 4, 10)
        spread.append(draws.std(0).mean().item())
    assert spread[0] > 1e-3
    assert spread[1] == pytest.approx(spread[0] * 0.1353, rel=0.3)  # exp(-2)
    assert spread[2] < 1e-6
    mean = model(*inputs).voxels
    torch.testing.assert_close(draws.mean(0), mean, atol=1e-5, rtol=1e-5)
    set_log_variance(model, -8.0)
    draws = model.draws(*inputs, 400, torch.Generator().manual_seed(1), chunk=800)
    error = (draws.mean(0) - mean).abs()
    assert (error <= 5 * draws.std(0) / 20 + 1e-6).all()


def test_draws_are_seeded_and_do_not_depend_on_the_chunk():
    model, inputs = small().eval(), batch()
    first = model.draws(*inputs, 7, torch.Generator().manual_seed(2))
    for chunk in (1, 5, 100):
        other = model.draws(*inputs, 7, torch.Generator().manual_seed(2), chunk=chunk)
        torch.testing.assert_close(other, first)
    assert not torch.equal(model.draws(*inputs, 7, torch.Generator().manual_seed(3)), first)
    assert not first.requires_grad


def test_draws_are_decodings_of_samples_in_order():
    model, inputs = small().eval(), batch()
    draws = model.draws(*inputs, 3, torch.Generator().manual_seed(2), chunk=5)
    out = model(*inputs)
    z = sample(out.mean, out.log_variance, torch.Generator().manual_seed(2), 3)
    tokens = model.encode(model.streams(*inputs[:2]), inputs[2])
    for number in range(3):
        for image in range(4):
            one = model.inject(tokens[image : image + 1], z[number, image : image + 1])
            expected = model.decode(one, inputs[2][image : image + 1]).voxels[0]
            torch.testing.assert_close(draws[number, image], expected)


def test_draws_encode_once_and_hold_little(monkeypatch):
    model, inputs = small().eval(), batch()
    calls, rows = [], []
    encode, decode = model.encode, model.decode
    monkeypatch.setattr(model, "encode", lambda *a: calls.append(1) or encode(*a))
    monkeypatch.setattr(model, "decode", lambda t, p: rows.append(len(t)) or decode(t, p))
    model.draws(*inputs, 5, chunk=8)
    assert calls == [1]
    assert rows == [8, 8, 4]


def test_draws_that_cannot_be():
    inputs = batch()
    for model in (small(d_latent=0), MLPDecoder(10, 2, 7, 12, Parcellation(UNEVEN), d_hidden=5)):
        with pytest.raises(ConfigError, match=r"model:d_latent: .* no latent to draw from"):
            model.draws(*inputs, 3)
    with pytest.raises(ConfigError, match="draws:n: found 0"):
        small().draws(*inputs, 0)
    with pytest.raises(ConfigError, match="draws:chunk: found 0"):
        small().draws(*inputs, 2, chunk=0)


# Options, scaling, learning.


def test_noise_and_scaling_of_tokens():
    cls, patches, parcels = batch()
    model = small(d_latent=0, token_noise=0.5)
    assert not torch.equal(model(cls, patches, parcels)[0], model(cls, patches, parcels)[0])
    model.eval()
    plain = model((cls - 3) / 2, patches / 4, parcels).voxels
    model.cls_scaler.set_statistics(torch.full((2, 10), 3.0), torch.full((2, 10), 2.0))
    model.patch_scaler.set_statistics(torch.zeros(7), torch.full((7,), 4.0))
    torch.testing.assert_close(model(cls, patches, parcels).voxels, plain)
    half = model(cls.half(), patches.half(), parcels).voxels
    torch.testing.assert_close(half, plain, atol=1e-2, rtol=1e-2)


def test_the_mean_patch_does_as_well_as_the_patches():
    cls, patches, parcels = batch()
    model = small(d_latent=0).eval()
    model.patch_scaler.set_statistics(torch.randn(7), torch.rand(7) + 0.5)
    mean = patches.mean(1, keepdim=True)
    torch.testing.assert_close(
        model(cls, mean, parcels).voxels, model(cls, patches, parcels).voxels
    )
    _, scaled = model.scaled(cls, patches)
    torch.testing.assert_close(model.scaled_mean(cls, patches)[1], scaled.mean(1))


def test_noise_of_the_mean_patch_is_the_mean_of_noise_on_every_patch():
    model = small(token_noise=0.5).train()
    cls, patches = torch.zeros(4000, 2, 10), torch.zeros(4000, 12, 7)
    expected = 0.5 / 12**0.5
    for given in (patches, patches[:, :1]):
        of_cls, of_mean = model.scaled_mean(cls, given)
        assert of_cls.std().item() == pytest.approx(0.5, rel=0.03)
        assert of_mean.std().item() == pytest.approx(expected, rel=0.03)
    assert model.scaled(cls, patches)[1].mean(1).std().item() == pytest.approx(expected, rel=0.03)


def test_back_ends_agree():
    model, inputs = small(scan="torch").eval(), batch()
    other = small(scan="reference").eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(*inputs).voxels, other(*inputs).voxels)


@pytest.mark.parametrize("head", ["dense", "low_rank", "query"])
def test_autocast(head):
    model, inputs = small(head=head).eval(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*inputs)
    assert out.mean.dtype == torch.float32
    torch.testing.assert_close(out.voxels.float(), model(*inputs).voxels, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("options", [{}, {"head": "low_rank"}, {"head": "query"}, {"d_latent": 0}])
def test_it_can_learn_a_batch(options):
    model, inputs, loss = small(**options), batch(), Stage2Loss()
    target = torch.randn(4, 10)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    errors = []
    for _ in range(80):
        out = model(*inputs)
        terms = loss(out.voxels, target, out.mean, out.log_variance)
        optimiser.zero_grad()
        terms["total"].backward()
        optimiser.step()
        errors.append(terms["error"].item())
    assert errors[-1] < 0.2 * errors[0]


def test_the_mlp_upsamples_parcels_alone():
    model = MLPDecoder(10, 2, 7, 12, Parcellation(UNEVEN), d_hidden=5)
    cls, patches, parcels = batch()
    out = model(cls, patches, parcels)
    assert out.voxels.shape == (4, 10)
    assert out[1:] == (None,) * 5
    assert torch.equal(model(cls + 1, patches * 0, parcels).voxels, out.voxels)
    out.voxels.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_titles_are_those_of_the_published_rows():
    assert small().title == "stage 2"
    assert small(d_latent=0).title == "stage 2 (without VAE)"
    assert MLPDecoder(10, 2, 7, 12, Parcellation(UNEVEN), 5).title == "stage 2 (MLP)"


def test_the_base_predicts_nothing():
    with pytest.raises(NotImplementedError):
        VoxelDecoder(10, 2, 7, 12, Parcellation(UNEVEN))(*batch())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "sparse"}, "model:head: found 'sparse'"),
        ({"direction": "spiral"}, "model:direction: found 'spiral'"),
        ({"head": "none", "residual": False}, "model:residual"),
        ({"d_model": 0}, "model:d_model: found 0"),
        ({"d_latent": -1}, "model:d_latent: found -1"),
        ({"encoder_blocks": -1}, "model:encoder_blocks: found -1"),
        ({"decoder_blocks": -2}, "model:decoder_blocks: found -2"),
        ({"rank": 0}, "model:rank: found 0"),
        ({"n_queries": 0}, "model:n_queries: found 0"),
        ({"d_amplitude": 0}, "model:d_amplitude: found 0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        small(**options)


def test_bad_sizes():
    with pytest.raises(ConfigError, match="model:n_cls: found 0"):
        MLPDecoder(10, 0, 7, 12, Parcellation(UNEVEN))
    with pytest.raises(ConfigError, match="model:d_hidden: found 0"):
        MLPDecoder(10, 1, 7, 12, Parcellation(UNEVEN), d_hidden=0)
