"""The threads of the preloaded OpenBLAS."""

import os

import pytest

from d2c_mlx.utils import blas


def test_all_cores_are_no_more_than_openblas_was_told(monkeypatch):
    threads = getattr(blas._library, "openblas_get_num_threads", None)
    if threads is None or not hasattr(os, "sched_getaffinity"):
        pytest.skip("no OpenBLAS here, or cores that cannot be counted")
    before, n_cores = threads(), len(os.sched_getaffinity(0))
    for told, expected in ((None, n_cores), ("1", 1), ("900", n_cores), ("all", n_cores)):
        with monkeypatch.context() as patch:
            patch.delenv("OPENBLAS_NUM_THREADS", raising=False)
            if told:
                patch.setenv("OPENBLAS_NUM_THREADS", told)
            with blas.all_cores():
                assert threads() == expected
        assert threads() == before
