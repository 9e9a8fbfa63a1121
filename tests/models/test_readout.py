"""The factorised spatial readout."""

import torch

from chasm.models.readout import SpatialReadout
from chasm.models.stage1 import DualStreamEncoder


def test_it_equals_the_formula_parcel_by_parcel():
    torch.manual_seed(0)
    readout = SpatialReadout(d_model=6, n_patches=4, n_parcels=3, dropout=0.0)
    with torch.no_grad():
        readout.where.normal_()
        readout.bias.normal_()
    tokens = torch.randn(5, 4, 6)
    normed = torch.nn.functional.layer_norm(tokens, (6,))
    for k in range(3):
        expected = readout.bias[k] + sum(
            readout.where[k, p] * (normed[:, p] @ readout.what.weight[k]) for p in range(4)
        )
        torch.testing.assert_close(readout(tokens)[:, k], expected)


def test_at_the_start_every_place_counts_the_same():
    readout = SpatialReadout(d_model=6, n_patches=4, n_parcels=3, dropout=0.0)
    tokens = torch.randn(2, 4, 6)
    torch.testing.assert_close(readout(tokens), readout(tokens.flip(1)))


def test_it_can_follow_place_where_pooling_cannot():
    """The same patches elsewhere are the same to a pooled head without Mamba and positions."""
    sizes = {"cls_width": 3, "n_cls": 1, "patch_width": 2, "n_patches": 9, "n_parcels": 9}
    options = {"d_model": 8, "global_blocks": 0, "local_blocks": 0, "token_noise": 0.0}
    cls, patches = torch.zeros(9, 1, 3), torch.zeros(9, 9, 2)
    patches[torch.arange(9), torch.arange(9), 0] = 3.0  # image i: a spot in patch i
    errors = {}
    for readout in ("pooled", "spatial"):
        torch.manual_seed(0)
        model = DualStreamEncoder(**sizes, **options, readout=readout)
        model.local_stream.position.requires_grad_(False).zero_()
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(200):
            loss = (model(cls, patches).parcels - torch.eye(9)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        errors[readout] = loss.item()
    chance = (torch.eye(9) - 1 / 9).square().mean().item()
    assert errors["spatial"] < 0.1 * chance
    assert errors["pooled"] > 0.9 * chance


def test_the_default_is_the_papers():
    model = DualStreamEncoder(3, 1, 2, 9, 4, d_model=8)
    assert isinstance(model.local_stream.head, torch.nn.Sequential)
