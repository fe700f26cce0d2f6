"""Files of adapters, GGUF and safetensors: every bit is read, and what is refused by name."""

import json
import struct
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFType
from gguf.quants import dequantize, quantize
from helpers.adapters import DTYPES, adapter_of
from helpers.gguf_files import gguf_name, write_lora
from helpers.loras import assert_close
from helpers.processes import no_room
from helpers.tiny import ALL, tiny_model
from safetensors import safe_open

from d2c_mlx import Adapter, LoRA, read_adapter
from d2c_mlx.adapters.gguf_format import save_gguf
from d2c_mlx.adapters.peft_format import PEFT_WEIGHTS, save_peft
from d2c_mlx.adapters.tensor_file import open_tensors, read_tensors
from d2c_mlx.utils.errors import AdapterError, PackError


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    model = tiny_model(tmp_path_factory.mktemp("gguf_lora") / "model")
    return json.loads((model / "config.json").read_text())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mixed", [False, True])
def test_there_and_back_is_exact(tmp_path, config, dtype, mixed):
    """Ranks stay; bfloat16 is written as float16, and scales that differ are folded in."""
    adapter = adapter_of("one", dtype=dtype, mixed=mixed)
    save_gguf(adapter, tmp_path / "one.gguf", config)
    again = read_adapter(tmp_path / "one.gguf", ALL, config)
    assert again.name == "one" and again.modules.keys() == adapter.modules.keys()
    assert again.digest == adapter.digest or mixed or dtype == mx.bfloat16
    for path, lora in again.modules.items():
        expected = adapter.modules[path].delta()
        assert lora.rank == adapter.modules[path].rank
        # Half a unit in the last place of float16.
        rtol = 2**-11 if mixed and dtype != mx.float32 else 1e-6
        assert_close(lora.delta(), expected, np.linalg.norm(expected), rtol)


def test_a_scale_that_float16_cannot_take_in_is_kept(tmp_path, config):
    adapter = adapter_of("one", mixed=True)
    path, lora = next(iter(adapter.modules.items()))
    large = LoRA(lora.a * 1e-3, mx.full(lora.b.shape, 3e4, mx.float16), 16.0)
    adapter = replace(adapter, modules={**adapter.modules, path: large})
    save_gguf(adapter, tmp_path / "one.gguf", config)
    again = read_adapter(tmp_path / "one.gguf", ALL, config).modules
    assert np.allclose(again[path].delta(), large.delta(), rtol=1e-5)
    assert {lora.b.dtype for name, lora in again.items() if name != path} == {mx.float16}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("alpha, scale", [(6.0, 2.0), (None, 1.0), (0.0, 1.0)])
def test_a_file_of_llama_cpp_s_converter(tmp_path, config, alpha, scale, kind):
    """alpha / rank is the scale, and no alpha a scale of 1, as llama.cpp reads it."""
    dtype = {"F16": mx.float16, "BF16": mx.bfloat16}.get(kind, mx.float32)
    quant = None if kind in ("F32", "F16") else GGMLQuantizationType[kind]
    changes = {"alpha": alpha, "quant": quant, "dtype": np.float16 if kind == "F16" else np.float32}
    adapter = adapter_of("one", dtype=dtype)
    again = read_adapter(write_lora(tmp_path / "own.gguf", adapter, **changes), ALL, config)
    assert again.name == "own"
    for module, lora in again.modules.items():
        a, b = adapter.modules[module].a, adapter.modules[module].b
        if kind.startswith("Q"):
            codes = quantize(np.ascontiguousarray(np.array(a).T), quant)
            a = mx.array(dequantize(codes, quant).T)
        assert lora.scale == scale and lora.a.dtype == lora.b.dtype == dtype
        assert mx.array_equal(lora.a, a) and mx.array_equal(lora.b, b)


def test_components_that_are_zero_take_no_bytes(tmp_path, config):
    """Padding to one rank is left out, and with it modules that are nothing but padding."""
    adapter = adapter_of("one", mixed=True)
    first, lora = next(iter(adapter.modules.items()))
    nothing = {first: LoRA(lora.a, 0 * lora.b)}
    padded = replace(adapter, modules=adapter.modules | nothing).uniform(mx.float16)
    save_gguf(padded, tmp_path / "one.gguf", config)
    again = read_adapter(tmp_path / "one.gguf", ALL, config)
    ranks = {path: lora.rank for path, lora in adapter.modules.items() if path != first}
    assert {path: lora.rank for path, lora in again.modules.items()} == ranks
    assert len({(lora.rank, lora.scale) for lora in padded.modules.values()}) == 1
    for path, lora in again.modules.items():
        np.testing.assert_allclose(lora.delta(), padded.modules[path].delta(), atol=1e-6)
        np.testing.assert_allclose(lora.delta(), adapter.modules[path].delta(), 2e-3, 1e-3)
    save_gguf(Adapter("x", nothing), tmp_path / "x.gguf", config)
    assert read_adapter(tmp_path / "x.gguf", ALL, config).modules.keys() == nothing.keys()


def test_what_is_not_understood_or_does_not_fit_the_base_is_one_line(tmp_path, config):
    adapter = adapter_of("one")

    def refused(match, shapes=ALL, config=config, path=None, **changes):
        path = path or write_lora(tmp_path / "x.gguf", adapter, **changes)
        with pytest.raises(AdapterError, match=match) as caught:
            read_adapter(path, shapes, config)
        (line,) = caught.value.problems
        assert line.startswith(f"{path}: ")

    row = np.ones((3, 32), np.float32)
    refused("general.type is 'model', expected 'adapter'", type=GGUFType.MODEL)
    refused("is 'qwen2', expected 'llama'", arch="qwen2")
    refused("14 tensors.* of type Q5_0", quant=GGMLQuantizationType.Q5_0)
    refused("28 tensors.* of type I32", dtype=np.int32)
    refused("adapter.lora.alpha is nan", alpha=float("nan"))
    refused("alora.invocation_tokens is", tokens=[1, 2])
    refused("1 of 29 tensors.*first: token_embd", extra={"token_embd.weight.lora_a": row})
    refused(r"first: a\\n\\x1b\[2J", extra={"a\n\x1b[2J": row})
    refused("model_type is None", config=None)
    refused("model_type is 'mamba'.* expected one of gemma2", config={"model_type": "mamba"})
    wide = {module: (2 * shape[0], shape[1]) for module, shape in ALL.items()}
    refused("shape of another base model; .*expected", shapes=wide)
    first, second, *_ = adapter.modules
    lora = adapter.modules[first]
    extra = {f"{gguf_name(second)}.lora_a": np.ones((3, 32), np.float32)}
    half = write_lora(tmp_path / "h.gguf", Adapter("h", {first: lora}), extra=extra)
    refused("lora_b of shape None", path=half)
    nan = Adapter("n", {first: LoRA(lora.a * float("nan"), lora.b)})
    refused("1 tensors hold NaN", path=write_lora(tmp_path / "n.gguf", nan))
    # An array longer than the file: the `gguf` package would read on until the memory is full.
    path = write_lora(tmp_path / "x.gguf", adapter)
    content, place = path.read_bytes(), b"adapter.type" + (8).to_bytes(4, "little")
    for kind in (0, 5, 8, 9):
        array = b"".join(n.to_bytes(size, "little") for n, size in ((9, 4), (kind, 4), (2**62, 8)))
        path.write_bytes(content.replace(place, place[:-4] + array))
        refused("truncated, or not readable as GGUF", path=path)


# The one reader of safetensors headers, and what it refuses that safetensors takes

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
        pytest.raises(AdapterError, read, path).match("the key 'a' is there twice")
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
        with pytest.raises(AdapterError, match=f"^{path}: .*truncated or not a safetensors file"):
            read(path)
    for length in (0, 1, 1 << 40, (1 << 64) - 1):
        path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
        pytest.raises(AdapterError, header_of, path).match("copy it again")
    path.unlink()
    pytest.raises(AdapterError, header_of, path).match("missing")
