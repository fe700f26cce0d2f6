"""Errors that nobody expected, closed standard streams, and memory that does not suffice."""

import json
import os
import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers.command import problems_of
from helpers.processes import MAIN
from helpers.tiny import ALL, LAYERS, library, peft_adapter

from d2c_mlx import read_adapter
from d2c_mlx.compress.compact_file import Index, expand_modules, read_index
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.write import write_pack
from d2c_mlx.utils.errors import AdapterError, PackError


@pytest.fixture
def pack(tmp_path):
    adapter = replace(read_adapter(peft_adapter(tmp_path / "loras", "a"), ALL), sources=("a",))
    info = Manifest(model="tiny/llama", config_hash="0" * 64, n_layers=LAYERS)
    return write_pack(tmp_path / "pack", [adapter], info)


def test_closed_streams_make_no_good_pack_truncated(pack):
    """The first file that is opened gets the number 0, which MLX takes for none."""
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "verify", pack.path], capture_output=True, text=True,
        preexec_fn=lambda: [os.close(number) for number in (0, 1, 2)],
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("error, line", [
    (MemoryError(), "the memory does not suffice"),
    (RuntimeError("[malloc] Unable to allocate 9 bytes.\nx"), "the memory does not suffice"),
    (TypeError("odd\nthing"), "unexpected TypeError: odd; set D2C_MLX_DEBUG=1"),
])  # fmt: skip
def test_an_error_that_nobody_expected_is_one_line(command, monkeypatch, error, line):
    def fail(directory):
        raise error

    # `update` first: imported under the patch, it would keep `fail` for later tests.
    monkeypatch.setattr("d2c_mlx.packs.write.load_pack", fail)
    monkeypatch.setattr("d2c_mlx.packs.pack.load_pack", fail)
    pytest.raises(type(error), command, "list", "pack")
    code, out, problem = command("list", "pack", D2C_MLX_DEBUG="0")
    assert (code, out, problem.count("\n")) == (1, "", 1)
    assert problem.startswith(f"error: {line}")


def test_pipes_devices_and_3_gb_in_place_of_files(pack, tmp_path, command):
    def large(path):
        path.touch()
        os.truncate(path, 3 << 30)

    paths = library(tmp_path / "library", ["a"])
    convert = ["convert", "--model", paths.model, "--adapters", paths.adapters, "--output",
               tmp_path / "out"]  # fmt: skip
    places = {
        pack.path / "manifest.json": ["verify", pack.path],
        tmp_path / "options.yaml": ["run", tmp_path / "options.yaml"],
        paths.adapters / "a" / "adapter_config.json": convert,
        paths.adapters / "a" / "adapter_model.safetensors": convert,
        paths.model / "config.json": convert,
        tmp_path / "phone.yaml": ["phone", pack.path, "--device", tmp_path / "phone.yaml"],
    }
    for path, argv in places.items():
        before = path.read_bytes() if path.exists() else None
        for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), large):
            path.unlink(missing_ok=True)
            make(path)
            code, _, problem = command(*argv)
            assert (code, problem.count("\n")) == (2, 1) and path.name in problem, problem
            assert make is not large or " bytes" in problem or path.suffix == ".safetensors"
        path.unlink()
        if before is not None:
            path.write_bytes(before)
    assert not (tmp_path / "out").exists()


def header(path, tensors, **metadata):
    text = json.dumps({**({"__metadata__": metadata} if metadata else {}), **tensors}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    return path


def test_tens_of_thousands_of_empty_tensors(tmp_path):
    """Each of them was looked for in a list of all, and had a line of its own."""
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {
        "rank": 4, "scale": 1.0, "dropout": 0.0, "keys": ["q"]}}  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    entry = {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]}
    path = header(tmp_path / "adapters.safetensors", {f"t{i}": entry for i in range(40_000)})
    pytest.raises(AdapterError, read_adapter, tmp_path, ALL).match("40,000 tensors")
    header(path, {f"t{i}": entry for i in range(300)})
    lines = problems_of(read_adapter, tmp_path, ALL)
    assert len(lines) == 201 and lines[-1] == "and 100 problems more"
    with open(path, "r+b") as file:
        file.write(struct.pack("<Q", 90 << 20))
        file.truncate(91 << 20)
    with pytest.raises(AdapterError, match="a header of more than 16,777,216 bytes"):
        read_adapter(tmp_path, ALL)


@pytest.mark.parametrize("modules, shape", [
    (["model.layers.*." + "*" * 80_000, 64, 64, "0-9999"], [1, 10_000, 1]),
    (["model.layers.*.q", 64, 64, "0-999999999"], [0, 1_000_000_000, 1]),
    (["model.layers.0.q", 1 << 40, 64, ""], [1, 1, 1]),
    (["model.layers.0.q", 0, 64, ""], [1, 1, 1]),
])  # fmt: skip
def test_an_index_that_would_fill_the_memory(tmp_path, modules, shape):
    """A pattern of 80 KB for ten thousand blocks makes 2.7 GB of paths."""
    about = {"base": None, "names": ["a"] * shape[0], "bits": [4], "group_size": 64,
             "modules": [modules]}  # fmt: skip
    n = int(np.prod(shape))
    entry = {"dtype": "U8", "shape": shape, "data_offsets": [0, n]}
    path = header(tmp_path / "compact.safetensors", {"counts": entry},
                  format="d2c-mlx-compact", version="1", index=json.dumps(about))  # fmt: skip
    with open(path, "ab") as file:
        file.write(bytes(n))
    pytest.raises(PackError, read_index, path).match("its tensors are not those of its index")


def test_rows_of_as_many_widths_as_modules():
    """One pass over the modules for every width would take minutes."""
    n = 30_000
    modules = expand_modules([[f"m{i}", 2 * i + 1, 2 * i + 2, ""] for i in range(n)], n)
    counts = np.zeros((2, n, 2), np.uint8)
    counts[1, ::1000] = [3, 0]
    index = Index(("a", "b"), None, modules, (8, 4), counts)
    rows = index.rows()
    assert {key: n.tolist() for key, n in rows.items()} == {
        (8, 2 * i + k): [0, 3] for i in range(0, n, 1000) for k in (1, 2)
    }
    assert list(rows) == sorted(rows, reverse=True)
