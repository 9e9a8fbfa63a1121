"""Scan back ends against a loop over scalars in float64, with autograd."""

import sys
from types import ModuleType

import pytest
import torch

from chasm.errors import ConfigError
from chasm.models import cuda_packages, scan
from chasm.models.scan import BACKENDS, resolve_backend, selective_scan
from chasm.models.scan_arguments import ScanArguments

OWN_BACKENDS = ["reference", "torch", "numba"]
KERNELS = ["torch", "numba"]


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


@pytest.mark.parametrize("backend", KERNELS)
def test_long_scan_float32_gradients(backend):
    """Paper length: 256 steps with the steps and decays of a freshly made Mamba layer."""
    inputs = make_inputs(256, channels=24, states=16)
    inputs["A"] = -torch.arange(1.0, 17.0, dtype=torch.float64).repeat(24, 1)
    inputs["delta_bias"] = inputs["delta_bias"] - 4
    expected = outputs_and_gradients(
        selective_scan, inputs, delta_softplus=True, backend="reference"
    )
    narrow = {name: value.float() for name, value in inputs.items()}
    found = outputs_and_gradients(selective_scan, narrow, delta_softplus=True, backend=backend)
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


@pytest.mark.parametrize("backend", KERNELS)
def test_only_what_needs_gradients_gets_them(backend):
    inputs = make_inputs(6)
    inputs["A"].requires_grad_()
    selective_scan(**inputs, backend=backend).sum().backward()
    assert inputs["A"].grad is not None
    assert inputs["u"].grad is None


@pytest.mark.parametrize("backend", KERNELS)
def test_inference_keeps_no_states(backend):
    inputs = make_inputs(6)
    expected = scalar_loop(**inputs)
    with torch.no_grad():
        y = selective_scan(**inputs, backend=backend)
    assert y.grad_fn is None
    assert relative_error(y, expected) < 1e-12


@pytest.mark.parametrize("backend", KERNELS)
def test_saved_states_grow_with_the_root_of_time(backend):
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
            selective_scan(**inputs, delta_softplus=True, backend=backend)
        saved[time] = max(sizes)
    state = 2 * 5 * 3
    assert saved[64] <= 2 * 8 * state
    assert saved[256] <= 2 * 16 * state


@pytest.mark.parametrize("backend", KERNELS)
def test_expanded_inputs(backend):
    inputs = make_inputs(7)
    inputs["B"] = inputs["B"][:1].expand(2, -1, -1)
    expected = scalar_loop(**inputs)
    assert relative_error(selective_scan(**inputs, backend=backend), expected) < 1e-12


def test_environment_chooses_the_back_end(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv("CHASM_SCAN", raising=False)
    assert resolve_backend(cpu) == "numba"
    assert resolve_backend(torch.device("mps")) == "torch"
    monkeypatch.setenv("CHASM_SCAN", "reference")
    assert resolve_backend(cpu) == "reference"
    assert resolve_backend(cpu, "torch") == "torch"
    monkeypatch.setenv("CHASM_SCAN", "fast")
    with pytest.raises(ConfigError, match=r"CHASM_SCAN: found 'fast', .*auto, mamba_ssm, numba"):
        selective_scan(**make_inputs(3))
    with pytest.raises(ConfigError, match="scan:backend: 'mamba_ssm' cannot run on cpu") as caught:
        resolve_backend(cpu, "mamba_ssm")
    assert "so the numba scan runs on cpu" in str(caught.value)
    with pytest.raises(ConfigError, match="'numba' cannot run on mps: it needs a CPU"):
        resolve_backend(torch.device("mps"), "numba")


def test_without_numba_torch_runs_and_says_so(monkeypatch, caplog):
    monkeypatch.delenv("CHASM_SCAN", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    cuda_packages.optional_module.cache_clear()
    scan._say_once.cache_clear()
    try:
        with caplog.at_level("INFO", logger="chasm"):
            assert resolve_backend(torch.device("cpu")) == "torch"
            assert resolve_backend(torch.device("cpu")) == "torch"
    finally:
        cuda_packages.optional_module.cache_clear()
        scan._say_once.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "selective scan: the torch scan runs: numba is not installed"
    ]


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
    cuda_packages.optional_module.cache_clear()
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    try:
        assert resolve_backend(cuda) == "torch"
        with pytest.raises(ConfigError, match="MAMBA_KEEP_CUDA_BUILD=TRUE"):
            resolve_backend(cuda, "mamba_ssm")
        monkeypatch.setitem(sys.modules, "selective_scan_cuda", ModuleType("selective_scan_cuda"))
        cuda_packages.optional_module.cache_clear()
        assert resolve_backend(cuda) == "mamba_ssm"
        assert resolve_backend(cuda, "torch") == "torch"
        assert resolve_backend(torch.device("cpu")) == "numba"
        inputs = make_inputs(4)
        found = BACKENDS["mamba_ssm"].scan(ScanArguments(**inputs, delta_softplus=True))
    finally:
        cuda_packages.optional_module.cache_clear()
    assert len(calls) == 1
    assert relative_error(found, scalar_loop(**inputs, delta_softplus=True)) < 1e-12


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("gated", [True, False])
def test_operator_is_what_torch_expects_of_one(backend, gated):
    inputs = {name: value.requires_grad_() for name, value in make_inputs(5, gated).items()}
    arguments = ScanArguments(
        **{"D": None, "z": None, "delta_bias": None, **inputs}, delta_softplus=gated
    )
    operator = torch.ops.chasm.selective_scan.default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, (*arguments, backend, True), test_utils=checks)
    assert torch.autograd.gradcheck(
        lambda *values: selective_scan(*values, delta_softplus=gated, backend=backend),
        tuple(arguments[:8]),
    )


@pytest.mark.parametrize("backend", KERNELS)
def test_compiled_without_a_graph_break(backend):
    inputs = make_inputs(9)
    expected = outputs_and_gradients(selective_scan, inputs, delta_softplus=True, backend=backend)
    compiled = torch.compile(selective_scan, backend="aot_eager", fullgraph=True)
    found = outputs_and_gradients(compiled, inputs, delta_softplus=True, backend=backend)
    for name, value in expected.items():
        assert relative_error(found[name], value) < 1e-14, name


def test_second_derivatives_are_refused():
    inputs = make_inputs(4)
    u = inputs["u"].requires_grad_()
    y = selective_scan(**inputs)
    (gradient,) = torch.autograd.grad(y.sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", OWN_BACKENDS)
def test_float16_has_no_nan_where_float16_states_do(backend):
    """The published clamp hides what happens here: a state overflows, its decay underflows."""
    time = 300
    inputs = {
        "u": torch.full((1, 1, time), 300.0),
        "delta": torch.ones(1, 1, time),
        "A": torch.full((1, 1), -1e-3),
        "B": torch.ones(1, 1, time),
        "C": torch.full((1, 1, time), 0.01),
    }
    inputs["delta"][..., 280] = 6e4  # a step so large that it forgets everything before
    half = {name: value.half() for name, value in inputs.items()}
    state, naive = torch.zeros(1, dtype=torch.float16), []
    for t in range(time):
        step = half["delta"][0, 0, t]
        state = (
            torch.exp(step * half["A"][0]) * state + step * half["u"][0, 0, t] * half["B"][0, 0, t]
        )
        naive.append(state * half["C"][0, 0, t])
    assert torch.stack(naive).isnan().any()
    found = selective_scan(**half, backend=backend)
    exact = selective_scan(**{k: v.double() for k, v in half.items()}, backend="reference")
    assert not found.isnan().any()
    fits = exact.abs() < 6e4
    assert relative_error(found[fits], exact[fits]) < 1e-3


def test_shapes_are_checked():
    inputs = make_inputs(4)
    with pytest.raises(ValueError, match=r"B has shape \(2, 5, 4\), expected \(2, 3, 4\)"):
        selective_scan(**{**inputs, "B": inputs["u"]})
    with pytest.raises(ValueError, match="channels, time"):
        selective_scan(**{**inputs, "u": inputs["u"][0]})
