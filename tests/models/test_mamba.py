"""Mamba layers: names and initial values of mamba_ssm, causality, dispatch to the fused kernel."""

import sys
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

from chasm.errors import ConfigError
from chasm.models import cuda_packages, scan
from chasm.models import mamba as module
from chasm.models.convolution import causal_convolution
from chasm.models.mamba import Mamba, ResidualMamba, fused_kernel, mamba_blocks
from chasm.models.mamba2 import Mamba2


def test_parameters_are_those_of_mamba_ssm():
    shapes = {name: tuple(value.shape) for name, value in Mamba(512).state_dict().items()}
    assert shapes == {
        "A_log": (1024, 16),
        "D": (1024,),
        "in_proj.weight": (2048, 512),
        "conv1d.weight": (1024, 1, 4),
        "conv1d.bias": (1024,),
        "x_proj.weight": (64, 1024),
        "dt_proj.weight": (1024, 32),
        "dt_proj.bias": (1024,),
        "out_proj.weight": (512, 1024),
    }


def test_initial_values_are_those_of_mamba_ssm():
    layer = Mamba(64)
    expected = torch.arange(1.0, 17.0).expand(128, -1)
    torch.testing.assert_close(layer.A_log.exp(), expected)
    assert layer.D.eq(1).all()
    step = F.softplus(layer.dt_proj.bias)
    assert step.min() >= 0.00099
    assert step.max() <= 0.1001
    assert step.median().item() == pytest.approx(0.01, rel=0.6)  # log-uniform
    assert layer.dt_proj.weight.abs().max() <= 0.5  # dt_rank 4
    assert layer.dt_proj.weight.abs().max() > 0.45


def written_out(layer, x):
    """Compute the layer by the paper's equations with torch's own convolution."""
    u, z = (x @ layer.in_proj.weight.T).chunk(2, -1)
    u = F.silu(layer.conv1d(u.mT)[..., : x.shape[1]])
    parts = layer.x_proj(u.mT).split([layer.dt_rank, layer.d_state, layer.d_state], -1)
    step = F.softplus(layer.dt_proj(parts[0])).mT
    state, outputs = torch.zeros(len(x), layer.d_inner, layer.d_state, dtype=x.dtype), []
    for t in range(x.shape[1]):
        decay = torch.exp(step[:, :, t, None] * -layer.A_log.exp())
        state = decay * state + (step * u)[:, :, t, None] * parts[1][:, t, None]
        outputs.append((state * parts[2][:, t, None]).sum(-1) + layer.D * u[:, :, t])
    y = torch.stack(outputs, 1) * F.silu(z)
    return y @ layer.out_proj.weight.T


@pytest.mark.parametrize("tokens", [1, 2, 3, 17])
def test_layer_equals_its_equations(tokens):
    torch.manual_seed(tokens)
    layer = Mamba(12, d_state=5)
    with torch.no_grad():
        layer.A_log.add_(0.1 * torch.randn_like(layer.A_log))
    x = torch.randn(3, tokens, 12)
    torch.testing.assert_close(layer(x), written_out(layer, x), rtol=1e-4, atol=1e-6)
    parameters = list(layer.parameters())
    found = torch.autograd.grad(layer(x).square().sum(), parameters)
    expected = torch.autograd.grad(
        written_out(layer, x).square().sum(), parameters, materialize_grads=True
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_layer_is_causal():
    layer, x = Mamba(8), torch.randn(2, 9, 8)
    changed = x.clone()
    changed[:, 5:] = 0
    before, after = layer(x), layer(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@pytest.fixture
def fake_mamba_ssm(monkeypatch):
    """Installed look-alikes of mamba_ssm and causal_conv1d, and the calls they got."""
    calls = []

    def mamba_inner_fn(
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        out_proj_weight,
        out_proj_bias,
        A,
        B=None,
        C=None,
        D=None,
        delta_bias=None,
        delta_softplus=True,
    ):
        calls.append((xz, A, B, C, out_proj_bias, delta_softplus))
        rank, states = delta_proj_weight.shape[1], A.shape[1]
        u, z = xz.chunk(2, 1)
        time = xz.shape[2]
        padding = conv1d_weight.shape[2] - 1
        u = F.conv1d(u, conv1d_weight, conv1d_bias, padding=padding, groups=len(conv1d_weight))
        u = F.silu(u[..., :time])
        delta, B, C = (u.mT @ x_proj_weight.T).split([rank, states, states], -1)
        step = delta_proj_weight @ delta.mT
        y = scan.reference_scan(u, step, A, B.mT, C.mT, D, z, delta_bias, delta_softplus)
        return F.linear(y.mT, out_proj_weight, out_proj_bias)

    interface = ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.mamba_inner_fn = mamba_inner_fn
    names = ("mamba_ssm", "mamba_ssm.ops", "selective_scan_cuda", "causal_conv1d")
    for fake in [ModuleType(name) for name in names] + [interface]:
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.delenv("CHASM_SCAN", raising=False)
    forget_imports()
    yield calls
    forget_imports()


def forget_imports():
    """Let optional packages be looked for again."""
    for owner in (cuda_packages, scan):
        owner.optional_module.cache_clear()


def test_fused_kernel_needs_cuda_and_both_packages(fake_mamba_ssm, monkeypatch):
    cuda = torch.device("cuda")
    assert fused_kernel(cuda) is not None
    assert fused_kernel(torch.device("cpu")) is None
    assert fused_kernel(cuda, "torch") is None
    monkeypatch.setenv("CHASM_SCAN", "torch")
    assert fused_kernel(cuda) is None
    monkeypatch.delenv("CHASM_SCAN")
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    forget_imports()
    assert fused_kernel(cuda) is None


def test_fused_path_gives_the_same_numbers(fake_mamba_ssm, monkeypatch):
    layer, x = Mamba(16), torch.randn(2, 7, 16)
    expected = layer(x)
    assert not fake_mamba_ssm
    monkeypatch.setattr(
        module, "fused_kernel", lambda device, scan: fused_kernel(torch.device("cuda"), scan)
    )
    found = layer(x)
    assert len(fake_mamba_ssm) == 1
    xz, A, B, C, bias, softplus = fake_mamba_ssm[0]
    assert xz.is_contiguous()
    assert xz.shape == (2, 64, 7)
    assert A.max() < 0
    assert (B, C, bias, softplus) == (None, None, None, True)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert all(value.grad is not None for value in layer.parameters())


def test_residual_block():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8)
    plain = ResidualMamba(8)
    torch.testing.assert_close(plain(x), x + plain.mamba(x))
    clamped = ResidualMamba(8, clamp=1e-3)
    torch.testing.assert_close((clamped(x) - x).abs().max(), torch.tensor(1e-3), atol=1e-6, rtol=0)
    normed = ResidualMamba(8, norm=True)
    torch.testing.assert_close(normed(x), x + normed.mamba(F.layer_norm(x, (8,))))
    reverse = ResidualMamba(8, reverse=True)
    torch.testing.assert_close(reverse(x), x + reverse.mamba(x.flip(1)).flip(1))
    dropped = ResidualMamba(8, dropout=0.999999)
    assert torch.equal(dropped(x), x)


def test_residual_block_stays_in_float32_under_autocast():
    x = torch.randn(2, 6, 8)
    block = ResidualMamba(8)
    with torch.autocast("cpu", torch.bfloat16):
        full = block(x)
        narrow = ResidualMamba(8, full_precision=False)
        narrow.load_state_dict(block.state_dict())
        mixed = narrow(x)
    assert torch.equal(full, block(x))
    assert not torch.equal(mixed, full)
    torch.testing.assert_close(mixed.float(), full, rtol=0.05, atol=0.05)


def torch_convolution(u, weight, bias):
    """The layer's convolution by torch's own."""
    padding = weight.shape[2] - 1
    y = F.conv1d(u.mT, weight, bias, padding=padding, groups=len(weight))[..., : u.shape[1]]
    return F.silu(y.mT)


@pytest.mark.parametrize(("tokens", "taps"), [(1, 4), (2, 4), (3, 1), (9, 4)])
@pytest.mark.parametrize("biased", [True, False])
def test_convolution_equals_torch(tokens, taps, biased, monkeypatch):
    monkeypatch.setattr("chasm.models.convolution._BLOCK", 40)  # several blocks of rows
    inputs = [torch.randn(5, tokens, 2 * 6), torch.randn(6, 1, taps), torch.randn(6)]
    inputs = [value.double().requires_grad_() for value in inputs[: 2 + biased]]

    def result(convolve):
        u, weight, bias = [*inputs, None][:3]
        y = convolve(u.chunk(2, -1)[0], weight, bias)
        return y, *torch.autograd.grad(y.sin().sum(), inputs)

    for a, b in zip(result(causal_convolution), result(torch_convolution), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_convolution_sums_narrow_inputs_in_the_weights_dtype():
    u, weight, bias = torch.randn(2, 5, 6).bfloat16(), torch.randn(6, 1, 4), torch.randn(6)
    u.requires_grad_()
    found = causal_convolution(u, weight, bias)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, causal_convolution(u.float(), weight, bias))
    (gradient,) = torch.autograd.grad(found.sum(), u)
    assert gradient.dtype == torch.bfloat16


def test_float64_layer_is_exact_to_float64():
    layer, x = Mamba(8).double(), torch.randn(2, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), written_out(layer, x), rtol=1e-10, atol=1e-12)


def test_choice_of_the_block():
    assert type(ResidualMamba(8).mamba) is Mamba
    blocks = mamba_blocks(2, 64, block="mamba2", d_state=5)
    assert all(type(block.mamba) is Mamba2 for block in blocks)
    assert blocks[0].mamba.headdim == 16
    assert mamba_blocks(1, 64, block="mamba2", headdim=32)[0].mamba.nheads == 4
    with pytest.raises(ConfigError, match=r"model:block: found 'mamba3'.*mamba, mamba2"):
        ResidualMamba(8, block="mamba3")
    with pytest.raises(ConfigError, match=r"model:headdim: 7 does not divide .* 16"):
        ResidualMamba(8, block="mamba2", headdim=7)
    with pytest.raises(ConfigError, match="model:headdim: is an option of Mamba-2"):
        ResidualMamba(8, headdim=4)
