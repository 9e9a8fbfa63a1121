"""LinearPath: parts add up; the best share is the least-squares one."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from chasm.errors import ConfigError
from chasm.models.linear_path import LinearPath, best_share


@pytest.mark.parametrize("rank", [None, 3, 100])
def test_parts_and_bias_add_up(rank):
    path = LinearPath(8, 20, 5, rank)
    for parameter in path.parameters():
        torch.nn.init.normal_(parameter)
    cls, patches = torch.randn(4, 2, 4), torch.randn(4, 5, 4)
    of_cls, of_patches = path.parts(cls.half(), patches.half())
    assert of_cls.shape == of_patches.shape == (4, 5)
    whole = path(cls.half(), patches.half())
    torch.testing.assert_close(whole, path.bias + of_cls + of_patches)


def test_nothing_in_it_is_trained():
    assert not any(p.requires_grad for p in LinearPath(8, 20, 5).parameters())


def test_a_rank_below_one_is_refused():
    with pytest.raises(ConfigError, match="linear_rank"):
        LinearPath(8, 20, 5, 0)


def test_a_low_rank_has_few_weights_at_nsd_size():
    with torch.device("meta"):
        path = LinearPath(768, 256 * 768, 15_724, 1024)
    assert sum(p.numel() for p in path.parameters()) < 0.24e9


@pytest.mark.parametrize("truth", [0.0, 0.3, 1.0])
def test_the_best_share_minimises_the_squared_error(truth):
    network, linear, noise = torch.randn(3, 50, 7)
    target = network.lerp(linear, truth) + 0.5 * noise
    found = float(best_share(target, network, linear))

    def error(share):
        return float((target - (1 - share) * network - share * linear).square().sum())

    expected = minimize_scalar(error, bounds=(0, 1), method="bounded").x
    assert found == pytest.approx(expected, abs=1e-4)


def test_equal_predictions_have_no_share():
    same = torch.randn(3, 2)
    assert float(best_share(torch.randn(3, 2), same, same)) == 0
    assert np.isfinite(float(best_share(same, same, same)))
