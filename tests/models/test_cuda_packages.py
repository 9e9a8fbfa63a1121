"""Which CUDA kernels are there: every way in which mamba_ssm and causal_conv1d can be missing."""

import sys
from types import ModuleType

import pytest
import torch

from chasm.models.cuda_packages import (
    explain,
    mamba1_kernel,
    mamba1_layer,
    mamba2_kernel,
    optional_module,
)

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
NAMES = (
    "mamba_ssm",
    "mamba_ssm.ops",
    "mamba_ssm.ops.triton",
    "mamba_ssm.ops.triton.ssd_combined",
    "mamba_ssm.ops.selective_scan_interface",
    "selective_scan_cuda",
    "causal_conv1d",
)


class Failing:
    """A finder whose modules raise what they are told to when they are imported."""

    def __init__(self, errors):
        self.errors = errors

    def find_spec(self, name, path=None, target=None):
        if name in self.errors:
            raise self.errors[name]


@pytest.fixture
def installed(monkeypatch):
    """Install look-alikes of all packages, all but `absent`, some of which fail to import."""

    def install(absent=(), failing=()):
        errors = dict(failing)
        errors |= {name: ModuleNotFoundError(f"No module named {name!r}", name=name)
                   for name in absent}  # fmt: skip
        for name in NAMES:
            monkeypatch.delitem(sys.modules, name, raising=False)
            if name not in errors:
                package = ModuleType(name)
                package.__path__ = []
                monkeypatch.setitem(sys.modules, name, package)
        finders = [finder for finder in sys.meta_path if not isinstance(finder, Failing)]
        monkeypatch.setattr(sys, "meta_path", [Failing(errors), *finders])
        for name, attribute in (
            ("mamba_ssm.ops.selective_scan_interface", "mamba_inner_fn"),
            ("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"),
        ):
            if name in sys.modules:
                setattr(sys.modules[name], attribute, object())
        optional_module.cache_clear()

    yield install
    optional_module.cache_clear()


def kernels():
    return [kernel() is not None for kernel in (mamba1_kernel, mamba1_layer, mamba2_kernel)]


def test_everything_installed(installed):
    installed()
    assert kernels() == [True, True, True]
    assert explain(CUDA, "mamba_ssm") == "mamba_ssm and CUDA are there, so its scan kernel runs"
    assert "Mamba-2 scan kernel runs" in explain(CUDA, "mamba_ssm", "mamba2")
    assert explain(CUDA, "torch").startswith("the torch scan was chosen")
    expected = "mamba_ssm's kernels need CUDA, so the numba scan runs on cpu"
    assert explain(CPU, "numba") == expected
    for device in (CPU, CUDA):  # no device runs it unless it is told to
        assert explain(device, "reference") == "the reference scan was chosen"


def test_nothing_installed(installed):
    installed(absent=NAMES)
    assert kernels() == [False, False, False]
    expected = 'mamba_ssm is not installed (pip install "chasm-fmri[cuda]"), so the torch '
    assert explain(CUDA) == expected + "scan runs"
    assert explain(CUDA, block="mamba2") == expected + "Mamba-2 scan runs"


def test_wheel_without_the_mamba1_kernel(installed):
    installed(absent=["selective_scan_cuda"])
    assert kernels() == [False, False, True]
    assert explain(CUDA) == (
        "mamba_ssm is installed without its Mamba-1 kernel (build it with "
        "MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation --no-cache-dir mamba-ssm), "
        "so the torch scan runs"
    )


def test_release_that_cannot_be_imported_without_the_mamba1_kernel(installed):
    error = ModuleNotFoundError("No module named 'selective_scan_cuda'", name="selective_scan_cuda")
    installed(failing=dict.fromkeys([*NAMES[:5], "selective_scan_cuda"], error))
    assert kernels() == [False, False, False]
    for block in ("mamba", "mamba2"):
        assert "without its Mamba-1 kernel (build it with" in explain(CUDA, block=block)


def test_import_that_fails_gives_the_first_line_of_its_reason(installed):
    error = OSError("libcudart.so.12: cannot open\nand more")
    installed(failing=dict.fromkeys(NAMES[:5], error))
    assert explain(CUDA) == (
        "mamba_ssm cannot be imported (libcudart.so.12: cannot open), so the torch scan runs"
    )
    installed(failing={"selective_scan_cuda": ImportError("undefined symbol: _ZN3c10")})
    assert kernels() == [False, False, True]
    assert "selective_scan_cuda cannot be imported (undefined symbol: _ZN3c10)" in explain(CUDA)
    installed(failing={NAMES[3]: RuntimeError("0 active drivers")})
    assert kernels() == [True, True, False]
    assert "ssd_combined cannot be imported (0 active drivers), so the torch Mamba-2" in explain(
        CUDA, block="mamba2"
    )
    error = ModuleNotFoundError("No module named 'einops'", name="einops")
    installed(failing=dict.fromkeys(NAMES[:5], error))
    assert "mamba_ssm cannot be imported (No module named 'einops')" in explain(CUDA)


def test_scan_kernel_without_the_fused_layer(installed):
    installed(absent=["causal_conv1d"])
    assert kernels() == [True, False, True]
    assert explain(CUDA, "mamba_ssm") == (
        "mamba_ssm's scan kernel runs, without the fused layer: causal_conv1d is not installed "
        '(pip install "chasm-fmri[cuda]")'
    )


def test_a_module_is_imported_once(installed, monkeypatch):
    installed(absent=["causal_conv1d"])
    assert optional_module("causal_conv1d") is None
    monkeypatch.setitem(sys.modules, "causal_conv1d", ModuleType("causal_conv1d"))
    assert optional_module("causal_conv1d") is None
    optional_module.cache_clear()
    assert optional_module("causal_conv1d") is sys.modules["causal_conv1d"]
