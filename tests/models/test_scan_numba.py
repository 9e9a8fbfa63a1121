"""What only the compiled scan has: threads, odd sizes, values that are not finite, its cache."""

import multiprocessing
import subprocess
import sys

import pytest
import torch

from chasm.models import numba_kernels, numba_scan
from chasm.models.numba_kernels import LANES
from chasm.models.numba_scan import NumbaScan
from chasm.models.scan import selective_scan
from chasm.models.scan_arguments import ScanArguments


def make_arguments(batch=2, channels=LANES + 6, states=5, time=20, dtype=torch.float32):
    generator = torch.Generator().manual_seed(channels)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return ScanArguments(
        u=normal(batch, time, channels).mT,
        delta=normal(batch, time, channels).mT,
        A=-normal(channels, states).exp(),
        B=normal(batch, time, states).mT,
        C=normal(batch, time, states).mT,
        D=normal(channels),
        z=normal(batch, time, channels).mT,
        delta_bias=normal(channels),
        delta_softplus=True,
    )


def all_of(x):
    y, kept = NumbaScan().forward(x, keep=True)
    return y, *NumbaScan().backward(x, kept, torch.cos(y))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("batch", "channels", "states", "time"),
    [
        (1, 1, 1, 2),
        (1, LANES, 16, 17),
        (3, LANES + 1, 4, 5),
        (1, 5 * LANES + 3, 3, 30),
        (40, 3, 2, 4),
    ],
)
def test_any_size_equals_the_torch_kernel(batch, channels, states, time):
    x = make_arguments(batch, channels, states, time)
    wide = x._replace(
        **{k: v.double() for k, v in x._asdict().items() if isinstance(v, torch.Tensor)}
    )
    leaves = [value.requires_grad_() for value in wide[:8]]
    y = selective_scan(*leaves, delta_softplus=True, backend="torch")
    expected = [y, *torch.autograd.grad(y, leaves, torch.cos(y.detach()))]
    for found, value in zip(all_of(x), expected, strict=True):
        assert found.shape == value.shape
        assert float((found - value.detach()).norm()) < 1e-5 * float(value.detach().norm())


def test_the_number_of_threads_changes_no_bit(threads):
    x = make_arguments(batch=3, channels=4 * LANES)
    threads(1)
    one = all_of(x)
    threads(4)
    for alone, shared in zip(one, all_of(x), strict=True):
        assert torch.equal(alone, shared)


def test_a_forked_process_has_threads_of_its_own(threads):
    threads(2)
    x = make_arguments()
    expected = NumbaScan().forward(x, keep=False)[0]
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        found = pool.apply_async(NumbaScan().forward, (x, False)).get(timeout=60)[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "z"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(name, value):
    x = make_arguments(batch=1, channels=3)
    broken = getattr(x, name).clone()
    broken.select(0, 0)[0, ...] = value
    y = NumbaScan().forward(x._replace(**{name: broken}), keep=False)[0]
    expected = selective_scan(**x._replace(**{name: broken})._asdict(), backend="reference")
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


@pytest.mark.parametrize("layout", ["time side by side", "rows in wider rows"])
def test_any_layout_gives_the_same_bits(layout):
    x = make_arguments()

    def lay(values):
        if layout == "time side by side":
            return values.contiguous()
        wider = torch.full((*values.mT.shape[:2], 3 * values.shape[1]), float("nan"))
        wider[..., values.shape[1] : 2 * values.shape[1]] = values.mT
        return wider[..., values.shape[1] : 2 * values.shape[1]].mT

    sequences = {name: lay(getattr(x, name)) for name in ("u", "delta", "B", "C", "z")}
    same = all_of(x._replace(**sequences))
    assert all(torch.equal(a, b) for a, b in zip(same, all_of(x), strict=True))


def test_decays_are_exact_to_the_last_bits_of_float32():
    # One state, set to 1 by the first step and left alone by the second but for its decay.
    exponents = torch.cat(
        [torch.zeros(1), -torch.logspace(-6, 1.9, 500), torch.logspace(-6, 1, 99)]
    )
    n = len(exponents)
    x = ScanArguments(
        u=torch.tensor([1.0, 0.0]).expand(1, n, 2),
        delta=torch.ones(1, n, 2),
        A=exponents[:, None],
        B=torch.ones(1, 1, 2),
        C=torch.ones(1, 1, 2),
        D=None,
        z=None,
        delta_bias=None,
        delta_softplus=False,
    )
    found = NumbaScan().forward(x, keep=False)[0][0, :, 1]
    exact = exponents.double().exp()
    # Half an ulp of the exponent times log2 e is in what the kernel is given already.
    allowed = 3e-7 + exponents.abs().double() * 1.2e-7
    assert ((found / exact - 1).abs() <= allowed).all()
    assert found[0] == 1


def test_growing_states_overflow_as_elsewhere():
    x = make_arguments(batch=1, channels=2, time=8)
    x = x._replace(A=x.A.abs() * 400, delta=x.delta.abs() + 1)
    y = NumbaScan().forward(x, keep=False)[0]
    expected = selective_scan(**x._asdict(), backend="reference")
    assert not expected.isfinite().all()
    assert torch.equal(y.isfinite(), expected.isfinite())


def test_a_second_process_reads_the_compiled_kernel():
    all_of(make_arguments())
    code = (
        "import torch; from chasm.models.numba_scan import compiled;"
        "kernel = compiled('forward', torch.float32);"
        "assert sum(kernel.stats.cache_hits.values()) == 1, kernel.stats"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_a_folder_for_the_cache_it_still_compiles(monkeypatch):
    tried = []

    def njit(signature, **options):
        tried.append(options.get("cache", False))
        if tried[-1]:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(numba_scan, "njit", njit)
    kernel = numba_scan.compiled.__wrapped__("forward", torch.float32)
    assert kernel is numba_kernels.forward
    assert tried == [True, False]
