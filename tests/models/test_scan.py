"""Scan back ends against a loop over scalars in float64, with autograd."""

import sys
from types import ModuleType

import pytest
import torch

from chasm.errors import ConfigError
from chasm.models import scan
from chasm.models.scan import BACKENDS, resolve_backend, selective_scan

OWN_BACKENDS = ["reference", "torch"]


def scalar_loop(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """Follow the recurrence one channel and one state at a time."""
    batch, channels, time = u.shape
    rows = []
    for b in range(batch):
        for d in range(channels):
            states = [u.new_zeros(()) for _ in range(A.shape[1])]
            outputs = []
            for t in range(time):
                step = delta[b, d, t] + (0 if delta_bias is None else delta_bias[d])
                step = torch.log(1 + torch.exp(step)) if delta_softplus else step
                y = u.new_zeros(()) if D is None else D[d] * u[b, d, t]
                for n in range(len(states)):
                    states[n] = torch.exp(step * A[d, n]) * states[n]
                    states[n] = states[n] + step * B[b, n, t] * u[b, d, t]
                    y = y + C[b, n, t] * states[n]
                if z is not None:
                    y = y * z[b, d, t] / (1 + torch.exp(-z[b, d, t]))
                outputs.append(y)
            rows.append(torch.stack(outputs))
    return torch.stack(rows).reshape(batch, channels, time)


def make_inputs(time, optional=True, batch=2, channels=5, states=3, time_last=False):
    generator = torch.Generator().manual_seed(time)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def sequence(width):
        values = normal(batch, time, width).mT
        return values.contiguous() if time_last else values

    inputs = {
        "u": sequence(channels),
        "delta": sequence(channels) - 1 if optional else sequence(channels).abs() * 0.3,
        "A": -torch.exp(normal(channels, states)),
        "B": sequence(states),
        "C": sequence(states),
    }
    if optional:
        inputs |= {"D": normal(channels), "z": sequence(channels), "delta_bias": normal(channels)}
    return inputs


def outputs_and_gradients(function, inputs, **options):
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    y = function(**leaves, **options)
    weights = torch.cos(torch.arange(y.numel())).bfloat16().reshape(y.shape)
    gradients = torch.autograd.grad(y, list(leaves.values()), weights.to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-12))


@pytest.mark.parametrize("backend", OWN_BACKENDS)
@pytest.mark.parametrize("optional", [True, False], ids=["gated", "bare"])
@pytest.mark.parametrize("time", [1, 2, 3, 16, 21])
def test_float64_equals_the_scalar_loop(backend, optional, time):
    inputs = make_inputs(time, optional)
    expected = outputs_and_gradients(scalar_loop, inputs, delta_softplus=optional)
    found = outputs_and_gradients(selective_scan, inputs, delta_softplus=optional, backend=backend)
    for name, value in expected.items():
        assert relative_error(found[name], value) < 1e-12, name


@pytest.mark.parametrize("backend", OWN_BACKENDS)
@pytest.mark.parametrize("time_last", [False, True])
def test_float32_gradients_are_within_1e_5_of_float64(backend, time_last):
    inputs = make_inputs(19, batch=2, channels=6, states=4, time_last=time_last)
    expected = outputs_and_gradients(scalar_loop, inputs, delta_softplus=True)
    narrow = {name: value.float() for name, value in inputs.items()}
    found = outputs_and_gradients(selective_scan, narrow, delta_softplus=True, backend=backend)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert relative_error(found[name], value) < 1e-5, name


def test_long_scan_float32_gradients():
    """Paper length: 256 steps with the steps and decays of a freshly made Mamba layer."""
    inputs = make_inputs(256, channels=24, states=16)
    inputs["A"] = -torch.arange(1.0, 17.0, dtype=torch.float64).repeat(24, 1)
    inputs["delta_bias"] = inputs["delta_bias"] - 4
    expected = outputs_and_gradients(
        selective_scan, inputs, delta_softplus=True, backend="reference"
    )
    narrow = {name: value.float() for name, value in inputs.items()}
    found = outputs_and_gradients(selective_scan, narrow, delta_softplus=True, backend="torch")
    for name, value in expected.items():
        assert relative_error(found[name], value) < 1e-5, name


@pytest.mark.parametrize("backend", OWN_BACKENDS)
@pytest.mark.parametrize("time", [1, 9])
def test_narrow_inputs_accumulate_in_float32(backend, time):
    inputs = {name: value.bfloat16() for name, value in make_inputs(time).items()}
    wide = {name: value.double() for name, value in inputs.items()}
    expected = outputs_and_gradients(scalar_loop, wide, delta_softplus=True)
    scan_under_autocast = torch.autocast("cpu", torch.bfloat16)(selective_scan)
    found = outputs_and_gradients(scan_under_autocast, inputs, delta_softplus=True, backend=backend)
    for name, value in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert relative_error(found[name], value) < 4e-3, name  # one rounding to 8 bits


def test_only_what_needs_gradients_gets_them():
    inputs = make_inputs(6)
    inputs["A"].requires_grad_()
    selective_scan(**inputs, backend="torch").sum().backward()
    assert inputs["A"].grad is not None
    assert inputs["u"].grad is None


def test_inference_keeps_no_states():
    inputs = make_inputs(6)
    expected = scalar_loop(**inputs)
    with torch.no_grad():
        y = selective_scan(**inputs, backend="torch")
    assert y.grad_fn is None
    assert relative_error(y, expected) < 1e-12


def test_saved_states_grow_with_the_root_of_time():
    saved = {}
    for time in (64, 256):
        sizes = []
        inputs = {k: v.requires_grad_() for k, v in make_inputs(time).items()}
        own = {id(value) for value in inputs.values()}

        def pack(tensor, sizes=sizes, own=own):
            if id(tensor) not in own:
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            selective_scan(**inputs, delta_softplus=True, backend="torch")
        saved[time] = max(sizes)
    state = 2 * 5 * 3
    assert saved[64] <= 2 * 8 * state
    assert saved[256] <= 2 * 16 * state


def test_expanded_inputs():
    inputs = make_inputs(7)
    inputs["B"] = inputs["B"][:1].expand(2, -1, -1)
    expected = scalar_loop(**inputs)
    assert relative_error(selective_scan(**inputs, backend="torch"), expected) < 1e-12


def test_environment_chooses_the_back_end(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv("CHASM_SCAN", raising=False)
    assert resolve_backend(cpu) == "torch"
    monkeypatch.setenv("CHASM_SCAN", "reference")
    assert resolve_backend(cpu) == "reference"
    assert resolve_backend(cpu, "torch") == "torch"
    monkeypatch.setenv("CHASM_SCAN", "fast")
    with pytest.raises(ConfigError, match=r"CHASM_SCAN: found 'fast', .*auto, reference, torch"):
        selective_scan(**make_inputs(3))
    with pytest.raises(ConfigError, match="scan:backend: 'mamba_ssm' cannot run on cpu"):
        resolve_backend(cpu, "mamba_ssm")


def test_kernel_is_used_on_cuda_when_importable(monkeypatch):
    calls = []

    def selective_scan_fn(*arguments):
        calls.append(arguments)
        return scan.reference_scan(*arguments)

    interface = ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = selective_scan_fn
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.delenv("CHASM_SCAN", raising=False)
    cuda = torch.device("cuda", 0)
    scan.optional_module.cache_clear()
    assert resolve_backend(cuda) == "torch"
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    scan.optional_module.cache_clear()
    try:
        assert resolve_backend(cuda) == "mamba_ssm"
        assert resolve_backend(cuda, "torch") == "torch"
        assert resolve_backend(torch.device("cpu")) == "torch"
        inputs = make_inputs(4)
        found = BACKENDS["mamba_ssm"].scan(**inputs, delta_softplus=True)
    finally:
        scan.optional_module.cache_clear()
    assert len(calls) == 1
    assert relative_error(found, scalar_loop(**inputs, delta_softplus=True)) < 1e-12


def test_shapes_are_checked():
    inputs = make_inputs(4)
    with pytest.raises(ValueError, match=r"B has shape \(2, 5, 4\), expected \(2, 3, 4\)"):
        selective_scan(**{**inputs, "B": inputs["u"]})
    with pytest.raises(ValueError, match="channels, time"):
        selective_scan(**{**inputs, "u": inputs["u"][0]})
