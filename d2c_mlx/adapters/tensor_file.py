"""Reading safetensors files of strangers: the header is checked before any number is used.

Every reader of this package goes through `open_tensors`: adapters, compact packs and routers.
`left_in_file` leaves the numbers of an adapter in its file, so that many adapters take no memory.
safetensors checks the header, but its NumPy slices have no bfloat16; so MLX reads whole files, and
single modules are read at the offsets that safetensors has checked.
"""

import contextlib
import shutil
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from d2c_mlx.adapters.adapter import WEIGHTS, Adapter, LazyModules, LoRA
from d2c_mlx.utils.errors import AdapterError, InputError
from d2c_mlx.utils.files import file_state, open_file
from d2c_mlx.utils.parsing import parse_json

# Most tensors of a file and bytes of its header: ten times those of the largest adapters.
_MOST_TENSORS, _MOST_HEADER = 20_000, 16 << 20
# NumPy's dtype of a file's numbers; it has no bfloat16, whose bits are read as integers.
FLOATS = {"F16": "<f2", "BF16": "<u2", "F32": "<f4"}
PEFT_WEIGHTS = "adapter_model.safetensors"
# Names of the two factors of a module, `{}` its path; PEFT stores them transposed.
MLX_NAMES = "{}.lora_a", "{}.lora_b"
PEFT_NAMES = "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"


@dataclass(frozen=True)
class TensorFile:
    """An open safetensors file.

    Attributes:
        header: name -> (dtype as safetensors names it, shape) of every tensor.
        places: name -> the bytes of the file at which its numbers begin and end.
        metadata: strings by name; empty without any.
        handle: of `safetensors.safe_open`, for `get_tensor` and `get_slice` (NumPy arrays).
    """

    header: dict[str, tuple[str, tuple[int, ...]]]
    places: dict[str, tuple[int, int]]
    metadata: dict[str, str]
    handle: Any


@contextlib.contextmanager
def open_tensors(path: Path, error: type[InputError] = AdapterError) -> Iterator[TensorFile]:
    """Open a safetensors file whose header fits the file; nothing but the header is read.

    Use it to look at names, dtypes and shapes, or to read some of the tensors; `read_tensors` reads
    all numbers of an adapter as MLX arrays.

    Raises:
        InputError: `error`, also by reads inside the block, for a file that is missing, truncated
            or longer than its header says, whose tensors overlap or do not have the size of their
            shape, or that has two of one name (of which MLX and Swift need not take the same).
    """
    try:
        with open_file(path) as file:
            nbytes = int.from_bytes(file.read(8), "little")
            text = file.read(min(nbytes, _MOST_HEADER + 1))
        if len(text) > _MOST_HEADER:
            raise SafetensorError(f"a header of more than {_MOST_HEADER:,} bytes")
        # safe_open checks offsets, sizes and dtypes against the file; mx.load alone is lazy.
        with safe_open(str(path), framework="numpy") as handle:
            try:
                entries = parse_json(text.decode())
            except ValueError as reason:
                raise SafetensorError(str(reason)) from None
            entries.pop("__metadata__", None)
            if len(entries) > _MOST_TENSORS:
                raise SafetensorError(f"{len(entries):,} tensors, expected {_MOST_TENSORS:,}")
            header, places = {}, {}
            for name, x in entries.items():
                header[name] = x["dtype"], tuple(x["shape"])
                start, stop = x["data_offsets"]
                places[name] = 8 + nbytes + start, 8 + nbytes + stop
            yield TensorFile(header, places, handle.metadata() or {}, handle)
    except (SafetensorError, OSError) as caught:
        first = str(caught).splitlines()[0]
        raise error(
            f"{path}: missing, truncated or not a safetensors file ({first}); copy it again"
        ) from None


def read_tensors(path: Path) -> dict[str, mx.array]:
    """Read all tensors of an adapter, in the dtypes of the file.

    Raises:
        AdapterError: as `open_tensors`; or there is no tensor, or one that holds NaN, infinity or
            no floating point numbers.
    """
    with open_tensors(path) as file:
        dtypes = {name: dtype for name, (dtype, _) in file.header.items()}
    if not dtypes:
        raise AdapterError(f"{path}: holds no tensors")
    other = [name for name, dtype in dtypes.items() if dtype not in FLOATS]
    if other:
        raise AdapterError(
            f"{path}: {len(other)} tensors are not of {', '.join(FLOATS)} (first: {min(other)},"
            f" {dtypes[min(other)]}); save the adapter in one of these"
        )
    try:
        tensors: Any = mx.load(str(path))
    except (RuntimeError, OSError) as error:
        raise AdapterError(f"{path}: MLX cannot read it ({error}); copy it again") from None
    check_finite(tensors, path)
    return tensors


def check_finite(tensors: Mapping[str, mx.array], path: Path) -> None:
    """Raise an AdapterError that names `path` if tensors hold NaN or infinity."""
    # Asked for together: a GPU is waited for once, not once per tensor.
    finite = {name: mx.isfinite(x).all() for name, x in tensors.items()}
    mx.eval(finite)
    if bad := [name for name, good in finite.items() if not good.item()]:
        raise AdapterError(
            f"{path}: {len(bad)} tensors hold NaN or infinity (first: {min(bad)}); train it again"
        )


def left_in_file(adapter: Adapter, directory: Path, owner: object = None) -> Adapter:
    """The same adapter with its numbers left in the files that it was read from, not in memory.

    A module is read anew whenever it is asked for; that is an AdapterError if the file has changed
    since.

    Args:
        adapter: what `read_adapter` read.
        directory: of the adapter. One in a GGUF, made of a DoRA, or whose modules have other names
            there stays in memory.
        owner: an object with which the file ends.
    """
    names, file = MLX_NAMES, directory / WEIGHTS
    if not file.is_file():
        names, file = PEFT_NAMES, directory / PEFT_WEIGHTS
    if adapter.dora_error is not None or not file.is_file():
        return adapter
    scales = {path: lora.scale for path, lora in adapter.modules.items()}
    with open_tensors(file) as tensors:
        header, places, state = tensors.header, tensors.places, file_state(file)
    if not all(names[0].format(path) in header for path in scales):
        return adapter

    def read(path: str) -> LoRA:
        if file_state(file) != state:
            raise AdapterError(f"{file}: was changed while it was in use; run again")
        factors: list[mx.array] = []
        with open_file(file) as opened:
            for name in names:
                dtype, shape = header[name.format(path)]
                start, stop = places[name.format(path)]
                opened.seek(start)
                x = np.frombuffer(opened.read(stop - start), FLOATS[dtype]).reshape(shape)
                numbers = mx.array(np.ascontiguousarray(x.T) if names == PEFT_NAMES else x)
                factors.append(numbers.view(mx.bfloat16) if dtype == "BF16" else numbers)
        return LoRA(factors[0], factors[1], scales[path])

    return replace(adapter, modules=LazyModules(scales, read, owner or file))


class Spool:
    """Adapters that wait in files of a temporary directory, which ends with the last of them."""

    def __init__(self) -> None:
        """Make the directory, where the system has its temporary files."""
        self._directory = Path(mkdtemp(prefix="d2c-mlx-"))
        weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)

    def put(self, adapter: Adapter) -> Adapter:
        """Write an adapter, unless it is in a file; returns the same with its numbers there."""
        if isinstance(adapter.modules, LazyModules) and adapter.modules.owner:
            return adapter
        tensors = dict[str, mx.array]()
        for path, lora in adapter.modules.items():
            tensors |= {MLX_NAMES[0].format(path): lora.a, MLX_NAMES[1].format(path): lora.b}
        directory = Path(mkdtemp(dir=self._directory))
        # A full disk is an OSError, as everywhere.
        with open(directory / WEIGHTS, "wb") as file:
            mx.save_safetensors(file, tensors)
        return left_in_file(adapter, directory, owner=self)
