"""Stage 1: sizes of the paper, shapes, fusion, options."""

import pytest
import torch

from chasm.errors import ConfigError
from chasm.models.stage1 import DualStreamEncoder
from chasm.models.tokens import TokenScaler


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def linear(n_in, n_out):
    return n_in * n_out + n_out


def test_parameter_counts_at_the_papers_sizes():
    """768 -> 512, 2 + 4 blocks, 524 parcels; the paper's total is 14.6 million."""
    model = DualStreamEncoder(768, 1, 768, 256, 524)
    width, inner, states, rank, parcels = 512, 1024, 16, 32, 524
    norm = 2 * width
    mamba = (
        width * 2 * inner  # in_proj
        + inner * 4 + inner  # conv1d
        + inner * (rank + 2 * states)  # x_proj
        + linear(rank, inner)  # dt_proj
        + inner * states  # A_log
        + inner  # D
        + inner * width  # out_proj
    )  # fmt: skip
    assert mamba == 1_694_720
    blocks = [*model.global_stream.blocks, *model.local_stream.blocks]
    assert [count(block) for block in blocks] == [mamba] * 6

    stream = model.global_stream
    assert count(stream.projection) == count(model.local_stream.projection) == linear(768, width)
    assert count(stream.norm) == count(model.local_stream.norm) == norm
    assert count(stream.head) == norm + linear(width, parcels) == 269_836
    assert count(stream) == 2 * mamba + linear(768, width) + norm + 269_836 == 4_054_028

    stream = model.local_stream
    assert stream.position.shape == (256, width)
    assert count(stream.head) == norm + linear(width, 256) + linear(256, parcels) == 267_020
    outside = linear(768, width) + 256 * width + norm
    assert count(stream) == 4 * mamba + outside + 267_020 == 7_571_724

    assert count(model.gate) == linear(2 * width, 512) + linear(512, 2) == 525_826
    visual = linear(width, 512) + linear(512, 256) + 2 * 256
    response = linear(parcels, 512) + linear(512, 256) + 2 * 256
    assert count(model.contrastive) == visual + response == 795_136

    total = 4_054_028 + 7_571_724 + 525_826 + 795_136
    assert count(model) == total == 12_946_714
    assert total / 14.6e6 == pytest.approx(0.887, abs=1e-3)  # hidden widths are not published


def small(**options):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "global_blocks": 1, "local_blocks": 2, "d_state": 4, "d_head": 8}
    sizes |= {"d_gate": 8, "d_contrast": 8, "d_embedding": 6}
    return DualStreamEncoder(10, 3, 7, 12, 9, **{**sizes, **options})


def batch():
    generator = torch.Generator().manual_seed(1)
    cls = torch.randn(4, 3, 10, generator=generator)
    return cls, torch.randn(4, 12, 7, generator=generator)


@pytest.mark.parametrize(("gate", "n_gates"), [("image", 1), ("parcel", 9)])
def test_output(gate, n_gates):
    model = small(gate=gate).eval()
    out = model(*batch())
    assert out.parcels.shape == out.global_parcels.shape == out.local_parcels.shape == (4, 9)
    assert out.gate.shape == (4, n_gates, 2)
    assert out.global_features.shape == out.local_features.shape == (4, 16)
    assert out.visual_embedding.shape == model.embed_parcels(out.parcels).shape == (4, 6)
    torch.testing.assert_close(out.gate.sum(-1), torch.ones(4, n_gates))
    share = out.gate[..., :1].squeeze(-1)
    expected = share * out.global_parcels + (1 - share) * out.local_parcels
    torch.testing.assert_close(out.parcels, expected)


def test_streams_see_only_their_tokens():
    model = small().eval()
    cls, patches = batch()
    out = model(cls, patches)
    other = model(cls.roll(1, 0), patches)
    assert torch.equal(out.local_parcels, other.local_parcels)
    assert not torch.allclose(out.global_parcels, other.global_parcels)
    other = model(cls, patches.roll(1, 0))
    assert torch.equal(out.global_parcels, other.global_parcels)
    assert not torch.allclose(out.local_parcels, other.local_parcels)


def test_every_parameter_learns():
    model = small(gate="parcel", direction="alternate", block_norm=True, dropout=0.1)
    out = model(*batch())
    embedding = model.embed_parcels(out.parcels.detach())
    (out.parcels.square().sum() + (out.visual_embedding * embedding).sum()).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_it_can_learn_a_batch():
    model = small(token_noise=0.0)
    cls, patches = batch()
    target = torch.randn(4, 9)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (model(cls, patches).parcels - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_alternate_direction_turns_every_second_block():
    model = small(local_blocks=3, direction="alternate")
    assert [block.reverse for block in model.local_stream.blocks] == [False, True, False]
    assert not model.global_stream.blocks[0].reverse
    assert not any(block.reverse for block in small().local_stream.blocks)


def test_noise_only_in_training():
    model = small(token_noise=0.5)
    tokens = batch()
    assert not torch.equal(model(*tokens).parcels, model(*tokens).parcels)
    model.eval()
    assert torch.equal(model(*tokens).parcels, model(*tokens).parcels)
    noise = model.noise.train()(torch.zeros(20_000))
    assert noise.std().item() == pytest.approx(0.5, rel=0.03)


def test_scaler_travels_with_the_state_dict():
    tokens = torch.randn(500, 3, 10) * torch.arange(1, 11) + 5
    tokens[..., 4] = 2.5
    scaler = TokenScaler(3, 10)
    assert torch.equal(scaler(tokens), tokens)
    scaler.set_statistics(tokens.mean(0), tokens.std(0))
    scaled = scaler(tokens)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(3, 10), atol=1e-5, rtol=0)
    spread = torch.ones(3, 10)
    spread[:, 4] = 0
    torch.testing.assert_close(scaled.std(0), spread, atol=1e-5, rtol=0)
    fresh = TokenScaler(3, 10)
    fresh.load_state_dict(scaler.state_dict())
    assert torch.equal(fresh(tokens.half()).isfinite(), torch.ones_like(tokens).bool())
    assert torch.equal(fresh(tokens), scaled)
    with pytest.raises(ConfigError, match="mean"):
        scaler.set_statistics(torch.zeros(10), torch.ones(10))
    with pytest.raises(ConfigError, match="std"):
        scaler.set_statistics(torch.zeros(3, 10), torch.full((3, 10), float("nan")))


def test_back_ends_agree():
    model, tokens = small(scan="torch").eval(), batch()
    other = small(scan="reference").eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(*tokens).parcels, other(*tokens).parcels)


def test_bad_settings():
    with pytest.raises(ConfigError, match="model:gate: found 'voxel'"):
        small(gate="voxel")
    with pytest.raises(ConfigError, match="model:direction"):
        small(direction="spiral")
    with pytest.raises(ConfigError, match="model:n_parcels: found 0"):
        DualStreamEncoder(8, 1, 8, 4, 0)
