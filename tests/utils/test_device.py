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

from d2c_mlx.evaluate.workers import make_workers
from d2c_mlx.utils import device
from d2c_mlx.utils import environment as blas
from d2c_mlx.utils.device import (
    arithmetic,
    device_name,
    evaluation_memory,
    give_back_memory,
    machine,
    on_cpu,
    process_peak,
    wire,
)
from d2c_mlx.utils.errors import ConfigError
from d2c_mlx.utils.progress import Progress

GB = 1 << 30
# As MLX describes them: a MacBook Air of 8 GB, and any Linux.
MAC = {
    "device_name": "Apple M2", "architecture": "applegpu_g14g", "memory_size": 8 * GB,
    "max_recommended_working_set_size": 5 * GB, "max_buffer_length": 4 * GB, "resource_limit": 5,
}  # fmt: skip
LINUX = {"device_name": "AMD EPYC", "architecture": "x86_64"}


@pytest.fixture(params=["mac", "linux"])
def mac(request, monkeypatch):
    """True on a described Mac, False on a described Linux; what was wired is in `mac.wired`."""
    mac = request.param == "mac"
    found = SimpleNamespace(is_mac=mac, wired=[])
    monkeypatch.setattr(mx, "device_info", lambda: MAC if mac else LINUX)
    monkeypatch.setattr(mx.metal, "is_available", lambda: mac)
    monkeypatch.setattr(mx, "set_wired_limit", found.wired.append)
    monkeypatch.setattr(device, "_MACOS", "15.5" if mac else "")
    monkeypatch.setattr(sys, "platform", "darwin" if mac else "linux")
    monkeypatch.setattr(os, "sysconf", lambda name: 4 * GB if name.endswith("PAGES") else 2)
    if mac:
        monkeypatch.setattr(mx, "default_device", Gpu)
    return found


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


def test_a_device_is_described_and_planned_for(mac, monkeypatch):
    facts = machine()
    assert facts["backend"] == ("metal" if mac.is_mac else "cpu")
    assert (facts["memory"], facts["device"]) == (8 * GB, "Apple M2" if mac.is_mac else "AMD EPYC")
    assert device_name() == ("gpu, Apple M2" if mac.is_mac else "cpu")
    assert on_cpu() is not mac.is_mac
    bits = arithmetic()
    assert {"macOS", "architecture", "TF32"} <= bits.keys() if mac.is_mac else "macOS" not in bits
    assert evaluation_memory() == (5 * GB * 4 // 5 if mac.is_mac else 4 * GB)
    wire(2 * GB)
    wire(7 * GB)
    assert mac.wired == ([2 * GB, 5 * GB] if mac.is_mac else [])
    # One thread feeds a GPU, several a CPU; systems count the peak in bytes or in KiB.
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr("d2c_mlx.evaluate.workers.limit_blas_threads", lambda n: True)
    assert make_workers().n == (1 if mac.is_mac else 4)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=3000))
    assert process_peak() == (3000 if mac.is_mac else 3000 * 1024)


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
    for options in ({}, {"shown": True}):
        with Progress(**options).section("probe") as bar:
            bar.expect(10)
            bar.advance(10)
        assert capsys.readouterr().err == ""
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm-256color"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    with Progress(shown=True).section("probe", total=12) as bar:
        bar.expect(10)
        bar.advance(10)
        bar.expect(5)
        bar.advance(5)
    text = capsys.readouterr().err
    assert "probe" in text and "15/15 tokens" in text and "10/10" not in text
    assert "\x1b[3" not in text.replace("\x1b[3m", "")
