"""What differs between Metal and a CPU, described; BLAS threads, and memory that is given back."""

import os
import re
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from helpers import ROOT
from helpers.tiny import Gpu

from d2c_mlx.evaluate import workers
from d2c_mlx.utils import device
from d2c_mlx.utils import environment as blas
from d2c_mlx.utils.device import evaluation_memory, give_back_memory
from d2c_mlx.utils.errors import ConfigError
from d2c_mlx.utils.progress import Progress

GB = 1 << 30
# As MLX describes them: a MacBook Air of 8 GB, and any Linux.
MAC = {
    "device_name": "Apple M2", "architecture": "applegpu_g14g", "memory_size": 8 * GB,
    "max_recommended_working_set_size": 5 * GB, "max_buffer_length": 4 * GB, "resource_limit": 5,
}  # fmt: skip
LINUX = {"device_name": "AMD EPYC", "architecture": "x86_64"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_goes_back_to_the_system():
    def held():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    give_back_memory()
    before = held()
    # The first raises glibc's threshold, so that the others lie in its heap; the last stays there.
    first = np.ones(3 << 20)
    del first
    many = [np.ones(1 << 20) for _ in range(32)]
    last = many.pop()
    del many
    kept = held() - before
    give_back_memory()
    assert held() - before < kept - (128 << 20) and last.nbytes == 8 << 20


@pytest.mark.parametrize("mac", [True, False])
def test_a_device_is_described_and_planned_for(monkeypatch, mac):
    blas.blas_build()  # Kept from now on: libraries are sought otherwise on a Mac.
    wired = []
    for owner, name, value in (
        (mx, "device_info", lambda: MAC if mac else LINUX),
        (mx.metal, "is_available", lambda: mac),
        (mx, "set_wired_limit", wired.append),
        (mx, "default_device", Gpu if mac else mx.default_device),
        (device, "_MACOS", "15.5" if mac else ""),
        (sys, "platform", "darwin" if mac else "linux"),
        (os, "sysconf", lambda name: 4 * GB if name.endswith("PAGES") else 2),
        (os, "cpu_count", lambda: 8),
        (workers, "limit_blas_threads", lambda n: True),
        (resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=3000)),
    ):
        monkeypatch.setattr(owner, name, value)
    facts = device.machine()
    assert facts["backend"] == ("metal" if mac else "cpu")
    assert (facts["memory"], facts["device"]) == (8 * GB, "Apple M2" if mac else "AMD EPYC")
    assert device.device_name() == ("gpu, Apple M2" if mac else "cpu")
    assert device.on_cpu() is not mac
    bits = device.arithmetic()
    assert {"macOS", "architecture", "TF32"} <= bits.keys() if mac else "macOS" not in bits
    assert evaluation_memory() == (5 * GB * 4 // 5 if mac else 4 * GB)
    device.wire(2 * GB)
    device.wire(7 * GB)
    assert wired == ([2 * GB, 5 * GB] if mac else [])
    # One thread feeds a GPU, several a CPU; systems count the peak in bytes or in KiB.
    assert workers.make_workers().n == (1 if mac else 4)
    assert device.process_peak() == (3000 if mac else 3000 * 1024)


def test_no_other_file_asks_for_the_device():
    asks = re.compile(r"default_device|device_info|DeviceType|mx\.metal|set_wired|mac_ver")
    files = [path for path in (ROOT / "d2c_mlx").rglob("*.py") if asks.search(path.read_text())]
    assert files == [ROOT / "d2c_mlx" / "utils" / "device.py"]


def test_a_limit_in_the_environment_is_the_process_s(monkeypatch):
    monkeypatch.setenv("D2C_MLX_MEMORY_LIMIT", "3GB")
    assert evaluation_memory(2) == 3_000_000_000 - device.outside_mlx()
    monkeypatch.setenv("D2C_MLX_MEMORY_LIMIT", "much")
    with pytest.raises(ConfigError, match="D2C_MLX_MEMORY_LIMIT: found 'much', expected a size"):
        evaluation_memory()


def test_all_cores_are_no_more_than_openblas_was_told(monkeypatch):
    if not blas.blas_build() or not hasattr(os, "sched_getaffinity"):
        pytest.skip("no OpenBLAS here, or cores that cannot be counted")
    threads = blas._controller().get_num_threads
    before, n_cores = threads(), len(os.sched_getaffinity(0))
    for told, expected in (("", n_cores), ("1", 1), ("900", n_cores), ("all", n_cores)):
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", told)
        with blas.all_cores():
            assert threads() == expected
        assert threads() == before


def test_a_bar_grows_with_the_work_and_shows_nothing_without_a_terminal(monkeypatch, capsys):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    texts = []
    for _ in range(2):
        with Progress(shown=True).section("probe") as bar:
            for n in (10, 5):
                bar.expect(n)
                bar.advance(n)
        texts.append(capsys.readouterr().err)
        monkeypatch.setenv("FORCE_COLOR", "1")
    assert texts[0] == "" and "probe" in texts[1] and "15/15 tokens" in texts[1]
