"""Mamba-2: names and initial values of mamba_ssm, matrix products against the recurrence."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from chasm.errors import ConfigError
from chasm.models import ssd as module
from chasm.models.adapters import add_lora, merge_lora
from chasm.models.mamba2 import GatedRMSNorm, Mamba2, default_headdim
from chasm.models.published import PublishedEncoder
from chasm.models.sites import sites_of
from chasm.models.ssd import chunked_ssd, reference_ssd, resolve_backend, ssd, step_sizes
from chasm.models.stage1 import DualStreamEncoder
from chasm.models.stage2 import MambaVAE
from chasm.models.token_models import OneStreamMamba
from chasm.parcellation import sequential

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def make_inputs(time, *, batch=2, heads=4, width=6, groups=2, states=3, spread=1.0, dtype=None):
    torch.manual_seed(time)
    make = partial(torch.randn, dtype=dtype or torch.float64)
    return {
        "x": make(batch, time, heads, width),
        "dt": spread * make(batch, time, heads),
        "A": -16 * make(heads).sigmoid(),
        "B": make(batch, time, groups, states),
        "C": make(batch, time, groups, states),
        "D": make(heads),
        "dt_bias": make(heads),
    }


def scalar_loop(x, dt, A, B, C, D, dt_bias, dt_limit=(0.0, math.inf)):
    """Compute the recurrence of the paper one token, head and state matrix at a time."""
    rows = []
    for b in range(x.shape[0]):
        heads = []
        for h in range(x.shape[2]):
            group = h // (x.shape[2] // B.shape[2])
            state, outputs = torch.zeros(x.shape[3], B.shape[3], dtype=x.dtype), []
            for t in range(x.shape[1]):
                step = F.softplus(dt[b, t, h] + dt_bias[h]).clamp(*dt_limit)
                state = torch.exp(step * A[h]) * state + step * torch.outer(
                    x[b, t, h], B[b, t, group]
                )
                outputs.append(state @ C[b, t, group] + D[h] * x[b, t, h])
            heads.append(torch.stack(outputs))
        rows.append(torch.stack(heads, 1))
    return torch.stack(rows)


def with_gradients(scan, inputs, **options):
    """Give the output and the gradients of all inputs, in float64."""
    inputs = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    y = scan(**inputs, **options)
    weight = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y.dtype)
    gradients = torch.autograd.grad((y * weight).sum(), list(inputs.values()))
    return [value.double() for value in (y, *gradients)]


def worst(found, expected):
    """Give the largest relative error over outputs and gradients."""
    return max(
        ((a - b).norm() / b.norm().clamp(min=1e-12)).item()
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("time", [1, 2, 7, 8, 20])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_back_ends_equal_the_recurrence(time, backend):
    inputs = make_inputs(time)
    expected = with_gradients(scalar_loop, inputs)
    options = {"backend": backend, "chunk_size": 7}
    assert worst(with_gradients(ssd, inputs, **options), expected) < 1e-10
    narrow = {name: value.float() for name, value in inputs.items()}
    assert worst(with_gradients(ssd, narrow, **options), expected) < 1e-5


@pytest.mark.parametrize(("chunk", "time"), [(64, 150), (64, 64), (16, 65), (256, 70)])
def test_matrix_products_equal_the_loop_over_several_chunks(chunk, time):
    inputs = make_inputs(time, spread=4.0)  # from steps that change nothing to ones that forget
    expected = with_gradients(ssd, inputs, backend="reference")
    options = {"backend": "torch", "chunk_size": chunk}
    assert worst(with_gradients(ssd, inputs, **options), expected) < 1e-10
    narrow = {name: value.float() for name, value in inputs.items()}
    assert worst(with_gradients(ssd, narrow, **options), expected) < 1e-5


def test_gradients_by_finite_differences():
    inputs = list(make_inputs(5, batch=1, heads=2, width=2, groups=1, states=2).values())
    scan = partial(ssd, backend="torch", chunk_size=2)
    assert torch.autograd.gradcheck(scan, [value.requires_grad_() for value in inputs])


def test_steps_are_limited():
    inputs, limit = make_inputs(9, spread=3.0), (0.2, 0.9)
    expected = with_gradients(scalar_loop, inputs, dt_limit=limit)
    found = with_gradients(ssd, inputs, dt_limit=limit, backend="torch", chunk_size=4)
    assert worst(found, expected) < 1e-10
    assert worst(found, with_gradients(scalar_loop, inputs)) > 1e-2


def test_skip_per_channel():
    inputs = make_inputs(5)
    D = torch.randn(4, 6, dtype=torch.float64)
    plain = ssd(**inputs | {"D": None}, backend="torch")
    torch.testing.assert_close(ssd(**inputs | {"D": D}, backend="torch"), plain + D * inputs["x"])


@pytest.mark.parametrize("size", [1e3, 3e4])
def test_large_steps_overflow_nothing(size):
    inputs = make_inputs(40, dtype=torch.float32)
    inputs["dt"] = size * inputs["dt"].sign()  # decays of exp(-size * A) and of exactly 1
    for chunk_size in (8, 64):
        found = with_gradients(ssd, inputs, backend="torch", chunk_size=chunk_size)
        assert all(value.isfinite().all() for value in found)
        expected = with_gradients(ssd, inputs, backend="reference")
        assert worst(found, expected) < 1e-5


def test_a_long_pause_does_not_blur_what_follows():
    """Differences of sums from the chunk's start would lose the slow decays after a fast one."""
    inputs = make_inputs(60, dtype=torch.float32)
    inputs["dt"] = torch.full_like(inputs["dt"], -7.0)
    inputs["dt"][:, 3] = 2e4
    inputs["dt_bias"] = torch.zeros(4)
    expected = ssd(**{k: v.double() for k, v in inputs.items()}, backend="reference")
    torch.testing.assert_close(
        ssd(**inputs, backend="torch").double()[:, 4:], expected[:, 4:], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_summed_in_float32(dtype):
    inputs = make_inputs(70, dtype=torch.float32)
    narrow = {k: v.to(dtype) if k in "xdtBC" else v for k, v in inputs.items()}
    expected = ssd(**{k: v.float() for k, v in narrow.items()}, backend="torch")
    found = ssd(**narrow, backend="torch")
    assert found.dtype == dtype
    assert torch.equal(found, expected.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ssd(**narrow, backend="torch"), found)


def test_blocks_of_rows_change_nothing(monkeypatch):
    inputs = make_inputs(20, batch=5)
    expected = with_gradients(ssd, inputs, backend="torch")
    calls = []
    monkeypatch.setattr(module, "_BLOCK", 2 * 20 * 4 * 20)
    monkeypatch.setattr(
        module, "_multiply", lambda *a, inner=module._multiply: calls.append(len(a[0])) or inner(*a)
    )
    assert worst(with_gradients(ssd, inputs, backend="torch"), expected) < 1e-12
    assert sorted(calls) == [1, 1, 2, 2, 2, 2]  # forward, and once again for the gradients


def saved_numbers(scan, *inputs):
    """Count numbers kept for the backward pass, beside the inputs."""
    known, kept = {value.untyped_storage().data_ptr() for value in inputs}, {}

    def keep(value):
        storage = value.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() // value.itemsize
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        y = scan(*inputs)
    assert y.requires_grad
    return sum(numbers for pointer, numbers in kept.items() if pointer not in known)


def test_only_inputs_are_kept_for_the_backward_pass():
    inputs = make_inputs(128)
    arguments = [inputs[name].requires_grad_() for name in ("x", "dt", "A", "B", "C")]
    assert saved_numbers(chunked_ssd, *arguments) == 0
    assert saved_numbers(reference_ssd, *arguments) > 3 * inputs["x"].numel()


def test_shapes_are_checked():
    inputs = make_inputs(4)
    with pytest.raises(ValueError, match=r"dt has shape \(4,\), expected \(2, 4, 4\)"):
        ssd(**inputs | {"dt": inputs["A"]})
    with pytest.raises(ValueError, match=r"D has shape .* expected \(4,\) or \(4, 6\)"):
        ssd(**inputs | {"D": torch.ones(5)})
    with pytest.raises(ValueError, match="head width"):
        ssd(**inputs | {"x": inputs["dt"]})
    with pytest.raises(ValueError, match="3 groups do not divide 4 heads"):
        ssd(**inputs | {"B": torch.ones(2, 4, 3, 3)})


def test_choice_of_the_back_end(monkeypatch):
    monkeypatch.delenv("CHASM_SCAN", raising=False)
    monkeypatch.setattr(module, "mamba2_kernel", lambda: None)
    assert resolve_backend(CPU) == resolve_backend(CUDA) == "torch"
    assert resolve_backend(CPU, "numba") == "torch"
    monkeypatch.setenv("CHASM_SCAN", "reference")
    assert resolve_backend(CPU) == "reference"
    assert resolve_backend(CPU, "torch") == "torch"
    monkeypatch.setenv("CHASM_SCAN", "fast")
    with pytest.raises(ConfigError, match=r"CHASM_SCAN: found 'fast', .*auto, .*torch, reference"):
        ssd(**make_inputs(3))
    with pytest.raises(ConfigError, match="'mamba_ssm' cannot run on cuda: mamba_ssm is not ins"):
        resolve_backend(CUDA, "mamba_ssm")
    monkeypatch.setattr(module, "mamba2_kernel", lambda: object())
    with pytest.raises(ConfigError, match=r"'mamba_ssm' cannot run on cpu: .* need CUDA"):
        resolve_backend(CPU, "mamba_ssm")
    monkeypatch.delenv("CHASM_SCAN")
    assert resolve_backend(CUDA) == resolve_backend(CUDA, "mamba_ssm") == "mamba_ssm"
    assert resolve_backend(CUDA, dtype=torch.float64) == "torch"


def test_kernel_is_called_as_mamba_ssm_defines_it(monkeypatch):
    """A look-alike with the published signature gives the same numbers from a whole layer."""
    calls = []

    def mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None,
        seq_idx=None, cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, float("inf")),
        return_final_states=False, return_varlen_states=False,
    ):  # fmt: skip
        calls.append((chunk_size, z, dt_softplus, dt_limit))
        assert A.dtype == D.dtype == dt_bias.dtype == torch.float32
        y = reference_ssd(x, step_sizes(dt, dt_bias, dt_limit, torch.float32), A, B, C)
        return y + D[:, None] * x

    layer, x = Mamba2(16, d_state=4, headdim=8, dt_limit=(0.0, 0.5)), torch.randn(2, 9, 16)
    expected = layer(x)
    monkeypatch.setattr(module, "mamba2_kernel", lambda: mamba_chunk_scan_combined)
    monkeypatch.setattr(module, "resolve_backend", lambda *_: "mamba_ssm")
    found = layer(x)
    assert calls == [(256, None, True, (0.0, 0.5))]
    torch.testing.assert_close(found, expected)


def test_parameters_are_those_of_mamba_ssm():
    shapes = {name: tuple(value.shape) for name, value in Mamba2(512).state_dict().items()}
    assert shapes == {
        "dt_bias": (16,),
        "A_log": (16,),
        "D": (16,),
        "in_proj.weight": (2 * 1024 + 2 * 128 + 16, 512),
        "conv1d.weight": (1024 + 2 * 128, 1, 4),
        "conv1d.bias": (1024 + 2 * 128,),
        "norm.weight": (1024,),
        "out_proj.weight": (512, 1024),
    }
    options = {"bias": True, "conv_bias": False, "rmsnorm": False, "D_has_hdim": True}
    assert {name for name, _ in Mamba2(64, ngroups=2, **options).named_parameters()} == {
        "dt_bias", "A_log", "D", "conv1d.weight",
        "in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias",
    }  # fmt: skip
    assert Mamba2(64, **options).D.shape == (128,)


def test_initial_values_are_those_of_mamba_ssm():
    layer = Mamba2(512, headdim=2)
    decay = layer.A_log.exp()
    assert 1 <= decay.min() < 1.5
    assert 15.5 < decay.max() <= 16.0001
    assert decay.mean().item() == pytest.approx(8.5, rel=0.1)  # uniform
    step = F.softplus(layer.dt_bias)
    assert step.min() >= 0.00099
    assert step.max() <= 0.1001
    assert step.median().item() == pytest.approx(0.01, rel=0.4)  # log-uniform
    assert layer.D.eq(1).all()
    assert layer.norm.weight.eq(1).all()
    floor = Mamba2(64, dt_min=1e-6, dt_max=1e-5, dt_init_floor=1e-4)
    torch.testing.assert_close(F.softplus(floor.dt_bias), torch.full((2,), 1e-4))


def written_out(layer, x):
    """Compute the layer with torch's own convolution, the recurrence and the norm in words."""
    inner, maps = layer.d_inner, layer.ngroups * layer.d_state
    z, xBC, dt = (x @ layer.in_proj.weight.T).split([inner, inner + 2 * maps, layer.nheads], -1)
    xBC = F.silu(layer.conv1d(xBC.mT)[..., : x.shape[1]]).mT
    u, B, C = xBC.split([inner, maps, maps], -1)
    B, C = (v.unflatten(-1, (layer.ngroups, layer.d_state)) for v in (B, C))
    u = u.unflatten(-1, (layer.nheads, layer.headdim))
    y = scalar_loop(u, dt, -layer.A_log.exp(), B, C, layer.D, layer.dt_bias).flatten(2)
    y = (y * F.silu(z)).unflatten(-1, (layer.ngroups, -1))
    y = (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(2) * layer.norm.weight
    return y @ layer.out_proj.weight.T


@pytest.mark.parametrize("tokens", [1, 3, 11])
def test_layer_equals_its_equations(tokens):
    torch.manual_seed(tokens)
    layer = Mamba2(8, d_state=3, headdim=4, ngroups=2, chunk_size=4).double()
    with torch.no_grad():
        layer.norm.weight.uniform_(0.5, 2)
        layer.D.uniform_(0.5, 2)
    x = torch.randn(2, tokens, 8, dtype=torch.float64)
    parameters = list(layer.parameters())
    results = []
    for forward in (layer, partial(written_out, layer)):
        y = forward(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), parameters, allow_unused=True)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(
            a, torch.zeros_like(a) if b is None else b, rtol=1e-9, atol=1e-11
        )


def test_layer_is_causal():
    layer, x = Mamba2(8, headdim=4, chunk_size=2), torch.randn(2, 9, 8)
    changed = x.clone()
    changed[:, 5:] = 0
    before, after = layer(x), layer(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_gated_norm():
    x, z = 20 * torch.randn(2, 3, 6), 2 + torch.rand(2, 3, 6)
    norm = GatedRMSNorm(6, 3)
    y = norm(x, z).unflatten(-1, (2, 3))
    torch.testing.assert_close(y.square().mean(-1), torch.ones(2, 3, 2), rtol=1e-3, atol=1e-3)
    before = GatedRMSNorm(6, 6, norm_before_gate=True)
    torch.testing.assert_close(before(x, z), F.rms_norm(x, (6,), eps=1e-5) * F.silu(z))
    assert norm(x.bfloat16(), z.bfloat16()).dtype == torch.bfloat16


def test_without_the_norm_the_output_is_gated_alone():
    layer, x = Mamba2(8, headdim=4, rmsnorm=False), torch.randn(2, 5, 8)
    with torch.no_grad():
        layer.in_proj.weight[: layer.d_inner] = 0  # silu(0) closes every gate
    assert layer(x).eq(0).all()


def test_head_widths():
    found = {width: default_headdim(width) for width in (2048, 1024, 512, 128, 24, 12, 9)}
    assert found == {2048: 64, 1024: 64, 512: 64, 128: 16, 24: 2, 12: 1, 9: 1}
    with pytest.raises(ConfigError, match=r"model:headdim: 3 .* 16\. Use a divisor of it\."):
        Mamba2(8, headdim=3)
    with pytest.raises(ConfigError, match="model:ngroups: 3 does not divide the number of heads"):
        Mamba2(8, headdim=4, ngroups=3)
    with pytest.raises(ConfigError, match="model:d_state"):
        Mamba2(8, d_state=0)


def test_layer_compiles_without_graph_breaks():
    torch.manual_seed(0)
    layer, x = Mamba2(8, d_state=3, headdim=4, chunk_size=4), torch.randn(2, 9, 8)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    parameters = list(layer.parameters())
    results = []
    for forward in (layer, compiled):
        y = forward(x)
        results.append([y, *torch.autograd.grad(y.sin().sum(), parameters)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


TOKENS = {"cls_width": 7, "n_cls": 2, "patch_width": 5, "n_patches": 6}
OPTIONS = {"d_model": 16, "d_state": 3, "block": "mamba2"}
ENCODERS = {
    "dual": partial(
        DualStreamEncoder, **TOKENS, **OPTIONS, d_gate=5, direction="alternate", readout="spatial"
    ),
    "one stream": partial(OneStreamMamba, **TOKENS, **OPTIONS, blocks=2),
    "published": partial(PublishedEncoder, **TOKENS, **OPTIONS, dropout=0.0),
}


@pytest.fixture
def tokens():
    return torch.randn(3, 2, 7), torch.randn(3, 6, 5)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name, tokens):
    encoder = ENCODERS[name](n_parcels=4).eval()
    layers = [layer for layer in encoder.modules() if isinstance(layer, Mamba2)]
    assert layers
    assert {layer.nheads for layer in layers} == {8}
    assert encoder.title.endswith("(Mamba-2)")
    encoder(*tokens).parcels.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layers[-1].parameters())
    with pytest.raises(ConfigError, match="model:headdim: 5 does not divide"):
        ENCODERS[name](n_parcels=4, headdim=5)


@pytest.mark.parametrize("name", ["dual", "one stream"])
def test_adapters_beside_mamba2_layers(name, tokens):
    encoder = ENCODERS[name](n_parcels=4).eval()
    before = encoder(*tokens).parcels
    names = list(encoder.state_dict())
    add_lora(encoder, rank=2, alpha=2.0)
    torch.testing.assert_close(encoder(*tokens).parcels, before)
    wrapped = {n: p for n, p in encoder.named_parameters() if "lora_B" in n and ".mamba." in n}
    assert wrapped
    encoder(*tokens).parcels.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in wrapped.values())
    with torch.no_grad():
        for value in wrapped.values():
            value.normal_()
    moved = encoder(*tokens).parcels
    assert not torch.allclose(moved, before, rtol=1e-3, atol=1e-3)
    merge_lora(encoder)
    torch.testing.assert_close(encoder(*tokens).parcels, moved, rtol=1e-4, atol=1e-5)
    assert list(encoder.state_dict()) == names


def test_stage2(tokens):
    decoder = MambaVAE(
        **TOKENS, **OPTIONS, parcellation=sequential(20, 5), encoder_blocks=1, decoder_blocks=1,
        d_patch=4, d_latent=3, d_variational=4, n_queries=2, d_hidden=6, d_residual=5,
        d_amplitude=4,
    ).eval()  # fmt: skip
    output = decoder(*tokens, torch.randn(3, 4))
    assert output.voxels.shape == (3, 20)
    output.voxels.square().sum().backward()
    layers = [layer for layer in decoder.modules() if isinstance(layer, Mamba2)]
    assert len(layers) == 2
    assert all(p.grad.isfinite().all() for layer in layers for p in layer.parameters())


def test_hooks_and_sites_see_mamba2_blocks(tokens):
    encoder = ENCODERS["dual"](n_parcels=4).eval()
    plain = DualStreamEncoder(**TOKENS, n_parcels=4, d_model=16, d_gate=5, readout="spatial")
    assert list(sites_of(encoder)) == list(sites_of(plain))
    seen = []
    handles = [
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(output.shape))
        for layer in encoder.modules()
        if isinstance(layer, Mamba2 | nn.Conv1d)
    ]
    encoder(*tokens)
    assert seen == [(3, 2, 16)] * 2 + [(3, 6, 16)] * 4
    for handle in handles:
        handle.remove()
