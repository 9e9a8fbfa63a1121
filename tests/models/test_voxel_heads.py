"""Holistic heads, the layout of voxels by parcel, the residual decoder and the amplitude."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from chasm.errors import ConfigError
from chasm.models.voxel_heads import Amplitude, ResidualDecoder, holistic_head, voxel_places
from chasm.parcellation import Parcellation, sequential

UNEVEN = [2, -1, 0, 2, 1, 2, 0, -1, 2]
"""Parcels of 2, 1 and 4 voxels, two voxels without one, in mixed order."""


def head(kind, **sizes):
    options = {"n_tokens": 3, "d_model": 4, "n_voxels": 7, "d_hidden": 6, "rank": 2, "dropout": 0}
    return holistic_head(kind, **{**options, **sizes})


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_of_the_heads_at_the_papers_sizes():
    sizes = {"n_tokens": 128, "d_model": 384, "n_voxels": 15724, "d_hidden": 4096, "rank": 256}
    with torch.device("meta"):
        counts = {kind: count(head(kind, **sizes)) for kind in ("dense", "low_rank", "query")}
    flat = 128 * 384
    assert counts["dense"] == flat * 4096 + 4096 + 2 * 4096 + 4096 * 15724 + 15724
    assert counts["low_rank"] == flat * 256 + 2 * 256 + 256 * 15724 + 15724
    assert counts["query"] == 15724 * (128 + 384 + 1) + 2 * 384
    assert counts["dense"] >= 10 * max(counts["low_rank"], counts["query"])


@pytest.mark.parametrize("kind", ["dense", "low_rank"])
def test_hidden_layer_heads(kind):
    module, tokens = head(kind), torch.randn(5, 3, 4)
    first, norm, _, _, last = module.layers
    assert first.weight.shape == ({"dense": 6, "low_rank": 2}[kind], 12)
    assert (first.bias is None) == (kind == "low_rank")
    hidden = tokens.reshape(5, 12) @ first.weight.T
    hidden = hidden if first.bias is None else hidden + first.bias
    hidden = F.gelu(F.layer_norm(hidden, norm.normalized_shape))
    torch.testing.assert_close(module(tokens), hidden @ last.weight.T + last.bias)


def test_the_query_head_weights_queries_and_channels_per_voxel():
    module, tokens = head("query"), torch.randn(5, 3, 4)
    with torch.no_grad():
        module.where.normal_()
    expected = torch.einsum(
        "bqc,vq,vc->bv", F.layer_norm(tokens, (4,)), module.where, module.what.weight
    )
    torch.testing.assert_close(module(tokens), expected + module.bias)


def test_an_unknown_head():
    with pytest.raises(ConfigError, match="model:head: found 'sparse'"):
        head("sparse")


@st.composite
def labels(draw):
    parcels = draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(1, 5), min_size=parcels, max_size=parcels))
    flat = [k for k, size in enumerate(sizes) for _ in range(size)]
    flat += [-1] * draw(st.integers(0, 4))
    return draw(st.permutations(flat))


@given(labels())
@settings(max_examples=60, deadline=None)
def test_places_of_voxels(given):
    """Voxel by voxel: the parcel's row, and how many of its voxels came before."""
    place, largest, outside = voxel_places(Parcellation(given))
    n_parcels = max(given) + 1
    assert largest == max(np.bincount([k for k in given if k >= 0]))
    assert outside == given.count(-1)
    for voxel, parcel in enumerate(given):
        before = given[:voxel].count(parcel)
        row = parcel if parcel >= 0 else n_parcels
        assert place[voxel] == row * largest + before


def test_the_residual_decoder_parcel_by_parcel():
    decoder = ResidualDecoder(Parcellation(UNEVEN), d_model=4, d_hidden=5, dropout=0.0)
    visual, tokens, parcels = torch.randn(6, 4), torch.randn(6, 3, 4), torch.randn(6, 3)
    found = decoder(visual, tokens, parcels)
    assert found.shape == (6, 9)
    outside = visual @ decoder.outside.weight.T + decoder.outside.bias
    for voxel, parcel in enumerate(UNEVEN):
        rank = UNEVEN[:voxel].count(parcel)
        if parcel < 0:
            expected = outside[:, rank]
        else:
            expected = parcels[:, parcel] + decoder.mlp(tokens[:, parcel])[:, rank]
        torch.testing.assert_close(found[:, voxel], expected)


def test_a_residual_of_zero_expands_the_parcels():
    parcellation = Parcellation(UNEVEN)
    decoder = ResidualDecoder(parcellation, d_model=4, d_hidden=5, dropout=0.0)
    for layer in (decoder.mlp[-1], decoder.outside):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    parcels = torch.randn(6, 3)
    found = decoder(torch.randn(6, 4), torch.randn(6, 3, 4), parcels)
    torch.testing.assert_close(found, parcellation.expand(parcels))


def test_mixing_starts_as_expansion_and_has_weights_per_voxel():
    parcellation = Parcellation(UNEVEN)
    plain = ResidualDecoder(parcellation, 4, 5, 0.0)
    mixing = ResidualDecoder(parcellation, 4, 5, 0.0, mix=True)
    mixing.load_state_dict(plain.state_dict(), strict=False)
    batch = torch.randn(6, 4), torch.randn(6, 3, 4), torch.randn(6, 3)
    torch.testing.assert_close(mixing(*batch), plain(*batch))
    weight, bias = torch.randn(9, 3), torch.randn(9)
    with torch.no_grad():
        mixing.mixing.weight.copy_(weight)
        mixing.mixing.bias.copy_(bias)
    difference = plain(*batch) - parcellation.expand(batch[2])
    torch.testing.assert_close(mixing(*batch), difference + batch[2] @ weight.T + bias)
    assert mixing.mixing.weight.requires_grad


def test_without_a_remainder_there_is_no_head_for_it():
    assert ResidualDecoder(sequential(12, 4), 4, 5, 0.0).outside is None
    assert ResidualDecoder(sequential(14, 4), 4, 5, 0.0).outside.weight.shape == (2, 4)


def test_the_arrangement_of_voxels_travels_with_the_weights():
    first = ResidualDecoder(Parcellation([0, 0, 1, 1]), 4, 5, 0.0)
    other = ResidualDecoder(Parcellation([1, 0, 1, 0]), 4, 5, 0.0)
    batch = torch.randn(2, 4), torch.randn(2, 2, 4), torch.randn(2, 2)
    assert not torch.equal(other(*batch), first(*batch))
    other.load_state_dict(first.state_dict())
    assert torch.equal(other(*batch), first(*batch))


def test_amplitude():
    module, visual = Amplitude(4, 5, 2.5), torch.randn(6, 4)
    hidden = F.gelu(visual @ module.mlp[0].weight.T + module.mlp[0].bias)
    logit = hidden @ module.mlp[2].weight.T + module.mlp[2].bias
    torch.testing.assert_close(module(visual), 2.5 / (1 + torch.exp(-logit)))
    assert module(visual).shape == (6, 1)
    with torch.no_grad():
        module.bound.fill_(4.0)
        module.mlp[2].weight.zero_()
        module.mlp[2].bias.fill_(np.log(3))  # sigmoid: 3 / 4
    torch.testing.assert_close(module(visual), torch.full((6, 1), 3.0))
