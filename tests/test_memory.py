"""What malloc does with freed memory, in a process of its own."""

import subprocess
import sys

import pytest

CODE = """
import resource, sys
import numpy as np
from chasm.memory import keep_freed_memory

def faults():
    for _ in range(4):
        np.ones(12_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(12_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before, done = faults(), keep_freed_memory()
sys.stdout.write(f"{before} {done} {faults()}")
"""


def run(**environment):
    environment = {"NUMPY_MADVISE_HUGEPAGE": "0", **environment}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True
    )
    before, took_effect, after = done.stdout.split()
    return int(before), took_effect == "True", int(after)


@pytest.mark.skipif(sys.platform != "linux", reason="malloc of glibc is on Linux only")
def test_freed_memory_is_used_again_without_asking_the_system():
    before, took_effect, after = run()
    if not took_effect:
        pytest.skip("this Linux has another libc than glibc")
    assert before > 20_000
    assert after < 1_000


def test_a_setting_of_the_environment_stays():
    assert run(MALLOC_MMAP_MAX_="100")[1] is False
