"""The threads of the preloaded OpenBLAS."""

import os
import platform
import subprocess
import sys

import pytest

from d2c_mlx.utils import environment as blas


def test_all_cores_are_no_more_than_openblas_was_told(monkeypatch):
    if not blas.blas_build() or not hasattr(os, "sched_getaffinity"):
        pytest.skip("no OpenBLAS here, or cores that cannot be counted")
    threads = blas._controller().get_num_threads
    before, n_cores = threads(), len(os.sched_getaffinity(0))
    for told, expected in ((None, n_cores), ("1", 1), ("900", n_cores), ("all", n_cores)):
        with monkeypatch.context() as patch:
            patch.delenv("OPENBLAS_NUM_THREADS", raising=False)
            if told:
                patch.setenv("OPENBLAS_NUM_THREADS", told)
            with blas.all_cores():
                assert threads() == expected
        assert threads() == before


def test_kernels_count_among_what_decides_bits():
    """OpenBLAS takes those of the processor, and their sums differ in the last bits."""
    code = "import d2c_mlx; from d2c_mlx.utils.device import arithmetic; print(arithmetic())"
    if blas.blas_build() is None or platform.machine() != "x86_64":
        pytest.skip("no OpenBLAS here, or none whose kernels can be named")
    found = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                       env={**os.environ, "OPENBLAS_CORETYPE": kernels}).stdout
        for kernels in ("Haswell", "Nehalem")
    }  # fmt: skip
    assert len(found) == 2
