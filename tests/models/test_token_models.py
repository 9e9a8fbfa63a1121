"""The token models: sizes of the paper, shapes, what passes between tokens, options."""

import pytest
import torch

from chasm.errors import ConfigError
from chasm.models.token_models import (
    MLPEncoder,
    OneStreamMamba,
    RecurrentEncoder,
    TransformerEncoder,
)

SIZES = (10, 3, 7, 12, 9)
SMALL = {
    "MLP": lambda **o: MLPEncoder(*SIZES, **{"d_model": 8, "d_feedforward": 16, "d_head": 6} | o),
    "GRU": lambda **o: RecurrentEncoder(*SIZES, **{"d_model": 8, "d_head": 6} | o),
    "LSTM": lambda **o: RecurrentEncoder(*SIZES, **{"cell": "lstm", "d_model": 8, "d_head": 6} | o),
    "one-stream Mamba": lambda **o: OneStreamMamba(
        *SIZES, **{"d_model": 8, "blocks": 2, "d_state": 4, "d_head": 6} | o
    ),
    "Transformer": lambda **o: TransformerEncoder(
        *SIZES, **{"d_model": 8, "layers": 2, "heads": 2, "d_feedforward": 16, "d_head": 6} | o
    ),
}
each = pytest.mark.parametrize("name", SMALL)


def batch():
    generator = torch.Generator().manual_seed(1)
    cls = torch.randn(4, 3, 10, generator=generator)
    return cls, torch.randn(4, 12, 7, generator=generator)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def linear(n_in, n_out):
    return n_in * n_out + n_out


def test_parameter_counts_at_the_papers_sizes():
    """768 -> 512, 257 tokens, 524 parcels; the paper's Transformer has 19.8 million."""
    outside = 2 * linear(768, 512) + 257 * 512 + 2 * 512  # projections, positions, norm
    outside += 2 * 1024 + linear(1024, 256) + linear(256, 524)  # readout
    layer = 3 * linear(512, 512) + linear(512, 512) + linear(512, 2048) + linear(2048, 512)
    transformer = count(TransformerEncoder(768, 1, 768, 256, 524))
    assert transformer == outside + 6 * (layer + 2 * 2 * 512) == 20_233_484
    assert transformer / 19.8e6 == pytest.approx(1, abs=0.025)
    mamba = 1_694_720  # as counted in test_stage1.py
    assert count(OneStreamMamba(768, 1, 768, 256, 524)) == outside + 6 * mamba
    gru, lstm = (RecurrentEncoder(768, 1, 768, 256, 524, cell=cell) for cell in ("gru", "lstm"))
    step = 512 * 1024 + 2 * 512
    assert (count(gru) - outside, count(lstm) - outside) == (2 * 3 * step, 2 * 4 * step)
    block = 2 * 512 + linear(512, 2048) + linear(2048, 512)
    assert count(MLPEncoder(768, 1, 768, 256, 524)) == outside + 2 * block


@each
@pytest.mark.parametrize("readout", ["pooled", "spatial"])
def test_output(name, readout):
    model = SMALL[name](readout=readout).eval()
    assert model.title == name
    out = model(*batch())
    assert out.parcels.shape == (4, 9)
    assert out.parcels.is_contiguous()
    assert out.local_features.shape == (4, 8)
    assert out.gate is None
    assert out.visual_embedding is None
    torch.testing.assert_close(model(*batch()).parcels, out.parcels)


@each
@pytest.mark.parametrize("readout", ["pooled", "spatial"])
def test_both_kinds_of_tokens_are_read(name, readout):
    model = SMALL[name](readout=readout).eval()
    cls, patches = batch()
    out = model(cls, patches).parcels
    assert not torch.allclose(out, model(cls.roll(1, 0), patches).parcels, atol=1e-4)
    assert not torch.allclose(out, model(cls, patches.roll(1, 0)).parcels, atol=1e-4)


def influence(model, changed):
    """Tokens after mixing that move when one token before it does, (tokens,) bool."""
    tokens = torch.randn(1, 15, 8, generator=torch.Generator().manual_seed(2))
    other = tokens.clone()
    other[:, changed] += torch.randn(8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        moved = (model.mix(tokens) - model.mix(other)).abs().amax((0, 2))
    return moved > 1e-7


@each
def test_what_passes_between_tokens(name):
    """Nothing in the MLP, from earlier to later tokens in recurrences and scans, all otherwise."""
    moved = influence(SMALL[name]().eval(), changed=6)
    reached = {"MLP": range(6, 7), "Transformer": range(15)}.get(name, range(6, 15))
    assert moved.nonzero().flatten().tolist() == list(reached)


def test_alternate_directions_reach_every_token():
    assert influence(SMALL["one-stream Mamba"](direction="alternate").eval(), changed=6).all()


def test_recurrence_equals_its_equations():
    """One GRU layer, written out from Cho et al. (2014) as torch orders its gates."""
    model = SMALL["GRU"](layers=1).eval()
    weights = dict(model.recurrence.named_parameters())
    tokens = torch.randn(2, 15, 8)
    state, states = torch.zeros(2, 8), []
    for token in tokens.unbind(1):
        drive = token @ weights["weight_ih_l0"].T + weights["bias_ih_l0"]
        memory = state @ weights["weight_hh_l0"].T + weights["bias_hh_l0"]
        (r, z, n), (hr, hz, hn) = drive.chunk(3, -1), memory.chunk(3, -1)
        update = torch.sigmoid(z + hz)
        candidate = torch.tanh(n + torch.sigmoid(r + hr) * hn)
        state = (1 - update) * candidate + update * state
        states.append(state)
    torch.testing.assert_close(model.mix(tokens), torch.stack(states, 1))


@each
def test_every_parameter_learns(name):
    for readout in ("pooled", "spatial"):
        model = SMALL[name](readout=readout, dropout=0.1)
        model(*batch()).parcels.square().sum().backward()
        still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert still == []


@each
def test_it_can_learn_a_batch(name):
    model = SMALL[name](token_noise=0.0)
    cls, patches = batch()
    target = torch.randn(4, 9)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(60):
        loss = (model(cls, patches).parcels - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_noise_and_dropout_act_in_training_only():
    model = SMALL["MLP"](token_noise=0.5).train()
    assert not torch.equal(model(*batch()).parcels, model(*batch()).parcels)
    model.eval()
    assert torch.equal(model(*batch()).parcels, model(*batch()).parcels)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("MLP", {"readout": "mean"}, "model:readout: found 'mean'"),
        ("MLP", {"layers": 0}, "model:layers: found 0"),
        ("MLP", {"d_feedforward": 0}, "model:d_feedforward"),
        ("GRU", {"cell": "rnn"}, "model:cell: found 'rnn'. Use one of: gru, lstm"),
        ("GRU", {"d_model": 0}, "model:d_model"),
        ("one-stream Mamba", {"direction": "both"}, "model:direction"),
        ("one-stream Mamba", {"blocks": 0}, "model:blocks"),
        ("Transformer", {"heads": 3}, "model:heads: 3 heads for a width of 8"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ConfigError, match=message):
        SMALL[name](**options)
