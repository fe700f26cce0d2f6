"""The one reader of safetensors headers, and what it refuses that safetensors takes."""

import struct

import mlx.core as mx
import pytest
from helpers.exported import adapter_of
from helpers.full import no_room
from safetensors import safe_open

from d2c_mlx.adapters.peft_format import PEFT_WEIGHTS, save_peft
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.adapters.tensor_file import open_tensors, read_tensors
from d2c_mlx.utils.errors import AdapterError, PackError

ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def write(path, header, body=bytes(4)):
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + body)
    return path


def header_of(path):
    with open_tensors(path) as file:
        return file.header


def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    """MLX alone has another, without a reason."""
    adapter = adapter_of("one", dtype=mx.bfloat16)
    save_peft(adapter, tmp_path / "peft")
    assert read_adapter(tmp_path / "peft").digest == adapter.digest
    size = (tmp_path / "peft" / PEFT_WEIGHTS).stat().st_size
    for nbytes in (0, 1_000, size - 1):
        with pytest.raises(OSError, match="File too large"), no_room(nbytes):
            save_peft(adapter, tmp_path / "full")


def test_two_tensors_of_one_name(tmp_path):
    """Readers differ in which of them they take; safetensors takes the last."""
    path = write(tmp_path / "twice.safetensors", f'{{"a":{ENTRY},"a":{ENTRY}}}')
    with safe_open(path, framework="numpy") as file:
        assert list(file.keys()) == ["a"]
    for read in (header_of, read_tensors):
        with pytest.raises(AdapterError, match="the key 'a' is there twice"):
            read(path)
    with pytest.raises(PackError, match="copy it again"), open_tensors(path, PackError):
        pass


@pytest.mark.parametrize(
    "header, body",
    [
        (f'{{"a":{ENTRY}}}', bytes(3)),
        (f'{{"a":{ENTRY}}}', bytes(5)),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', bytes(4)),
        (f'{{"a":{ENTRY},"b":{ENTRY}}}', bytes(4)),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', bytes(8)),
        ('{"a":{"dtype":"X32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        ("[]", b""),
        ("", b""),
    ],
)
def test_a_header_that_does_not_fit_its_file(tmp_path, header, body):
    path = write(tmp_path / "bad.safetensors", header, body)
    for read in (header_of, read_tensors):
        with pytest.raises(AdapterError, match="truncated or not a safetensors file") as caught:
            read(path)
        (line,) = caught.value.problems
        assert line.startswith(str(path))
    for length in (0, 1, 1 << 40, (1 << 64) - 1):
        path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
        with pytest.raises(AdapterError, match="copy it again"):
            header_of(path)
    path.unlink()
    with pytest.raises(AdapterError, match="missing"):
        header_of(path)
