"""One LoRA adapter in memory, written in the directory layout of mlx-lm and mlx-swift."""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np

from d2c_mlx.utils.errors import AdapterError

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
FLOAT16_MAX = 65504.0
# Below it float16 holds fewer bits than bfloat16 does.
_COARSE = 2.0**-17


@dataclass(frozen=True)
class LoRA:
    """The update of one linear module: `y += scale * (x @ a) @ b`.

    The scale is kept beside the factors instead of folded into `b`: so a conversion changes no bit
    of a stored factor, and MLX -> PEFT -> MLX is exact.

    Attributes:
        a: `(in, r)`.
        b: `(r, out)`.
        scale: alpha / r, or alpha / sqrt(r), as the adapter's config has it.
    """

    a: mx.array
    b: mx.array
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Number of columns of `a`."""
        return int(self.a.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """`(in, out)` of the linear module this belongs to."""
        return int(self.a.shape[0]), int(self.b.shape[1])

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """`(a, b)` as NumPy float32, the scale folded into b, so that dW^T = a @ b."""
        a, b = self.a.astype(mx.float32), self.b.astype(mx.float32)
        mx.eval(a, b)  # together: a GPU is waited for once
        return np.array(a), np.array(b) * np.float32(self.scale)

    def delta(self) -> np.ndarray:
        """Dense dW in PyTorch's orientation, `(out, in)`, float32. For tests and tiny models."""
        a, b = self.factors()
        return (a @ b).T


@dataclass(frozen=True)
class Adapter:
    """A named set of LoRA updates. A merged adapter is one with several `sources`.

    `read_adapter` reads one and checks it; `save` writes mlx-lm's layout, `save_peft` and
    `save_gguf` the others.

    Attributes:
        name: the adapter's name, which is that of its directory and of the task it serves.
        modules: module path (`model.layers.0.self_attn.q_proj`) -> LoRA.
        base: the base model's name, as its config states it.
        sources: names of the adapters it was merged from; empty for an original.
        origin: `owner/name@commit` if it was read from the Hugging Face hub.
        dora_error: of a DoRA that was taken in as a LoRA, the Frobenius norm of what its dW lost,
            relative to dW; None of a LoRA.
    """

    name: str
    modules: Mapping[str, LoRA]
    base: str | None = None
    sources: tuple[str, ...] = ()
    origin: str | None = None
    dora_error: float | None = None

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(lora.rank for lora in self.modules.values())

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of paths, shapes, dtypes, scales and values; names do not count."""
        sha = hashlib.sha256()
        for path in sorted(self.modules):
            lora = self.modules[path]
            sha.update(f"{path}|{lora.scale!r}".encode())
            for x in (lora.a, lora.b):
                sha.update(f"{x.dtype}{tuple(x.shape)}".encode())
                sha.update(np.array(x.view(mx.uint16) if x.dtype.size == 2 else x).tobytes())
        return sha.hexdigest()

    def changed(self, change: Callable[["Adapter"], "Adapter"]) -> "Adapter":
        """The adapter with each module changed, as an adapter of one, whenever it is asked for."""

        def read(path: str) -> LoRA:
            return change(replace(self, modules={path: self.modules[path]})).modules[path]

        return replace(self, modules=LazyModules(self.modules, read))

    def uniform(self, dtype: mx.Dtype | None = None) -> "Adapter":
        """The same update with one rank and one scale, as mlx-lm's layout requires.

        Where ranks differ, smaller ones are padded with zeros. Where scales differ, they are folded
        into b, and all factors are float32. For float16 see `balance_factors`; numbers that are
        then still too small become zero.

        Args:
            dtype: what factors are cast to; None keeps them exact.

        Raises:
            AdapterError: numbers that are then still too large for float16.
        """
        modules = dict(self.modules)
        if len({lora.scale for lora in modules.values()}) > 1:
            for path, lora in modules.items():
                b = lora.b.astype(mx.float32) * lora.scale
                modules[path] = LoRA(lora.a.astype(mx.float32), b)
        rank = max(lora.rank for lora in modules.values())
        for path, lora in modules.items():
            if width := rank - lora.rank:
                a, b = mx.pad(lora.a, [(0, 0), (0, width)]), mx.pad(lora.b, [(0, width), (0, 0)])
                modules[path] = LoRA(a, b, lora.scale)
        if dtype is None:
            return replace(self, modules=modules)
        peaks = {}
        for path, lora in modules.items():
            # Those that are in float16 already are within its range.
            if dtype == mx.float16 and not lora.a.dtype == lora.b.dtype == mx.float16:
                a, b = balance_factors(lora.a, lora.b)
                modules[path] = lora = LoRA(a, b, lora.scale)
                peaks[path] = mx.maximum(mx.abs(a).max(), mx.abs(b).max())
            modules[path] = LoRA(lora.a.astype(dtype), lora.b.astype(dtype), lora.scale)
        mx.eval(peaks)  # all at once
        if large := [path for path, peak in peaks.items() if (peak > FLOAT16_MAX).item()]:
            raise AdapterError(
                f"{self.name}: factors of {len(large)} modules are too large for float16, which"
                f" ends at {FLOAT16_MAX:.0f} (first: {large[0]}: up to {peaks[large[0]].item():.2g}"
                "); lower the scale or train it again"
            )
        return replace(self, modules=modules)

    def config(self, n_layers: int) -> dict[str, object]:
        """The `adapter_config.json` that mlx-lm and mlx-swift read, of a `uniform` adapter.

        Args:
            n_layers: number of transformer blocks of the base model; mlx-swift traps on -1.
        """
        scale = next(iter(self.modules.values())).scale
        keys = sorted({".".join(path.split(".layers.")[1].split(".")[1:]) for path in self.modules})
        return {
            "base_model_name_or_path": self.base,
            "fine_tune_type": "lora",
            "num_layers": n_layers,
            "lora_parameters": {"rank": self.rank, "scale": scale, "dropout": 0.0, "keys": keys},
        }

    def files(self, n_layers: int, own_ranks: bool = False) -> dict[str, bytes]:
        """File name -> content of the two files that `save` writes."""
        modules = dict(self.uniform().modules)
        tensors = dict[str, mx.array]()
        for path, lora in sorted(modules.items()):
            if own_ranks:
                used = np.array((lora.a != 0).any(axis=0) | (lora.b != 0).any(axis=1)).nonzero()[0]
                rank = int(used[-1]) + 1 if len(used) else 1
                modules[path] = lora = replace(lora, a=lora.a[:, :rank], b=lora.b[:rank])
            tensors |= {f"{path}.lora_a": lora.a, f"{path}.lora_b": lora.b}
        buffer = io.BytesIO()
        mx.save_safetensors(buffer, tensors, metadata={"format": "mlx"})
        config = json.dumps(replace(self, modules=modules).config(n_layers), indent=2) + "\n"
        return {WEIGHTS: buffer.getvalue(), CONFIG: config.encode()}

    def nbytes(self, n_layers: int) -> int:
        """Exact size in bytes of the files that `save` writes, headers and config included."""
        return sum(len(content) for content in self.files(n_layers).values())

    def save(self, directory: Path, n_layers: int, own_ranks: bool = False) -> None:
        """Write the two files of mlx-lm's layout.

        Args:
            directory: made if absent; the caller makes it atomic (`files.write_dir`).
            n_layers: number of transformer blocks of the base model.
            own_ranks: leave out the zeros that pad smaller ranks; mlx-swift loads such modules,
                mlx-lm refuses them.
        """
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files(n_layers, own_ranks).items():
            (directory / name).write_bytes(content)


class LazyModules(Mapping[str, LoRA]):
    """Modules that are read or computed whenever one is asked for, so that none is in memory.

    Hold a module no longer than it is needed. `owner`, such as a directory, lives as long as these.
    """

    def __init__(
        self, paths: Iterable[str], read: Callable[[str], LoRA], owner: object = None
    ) -> None:
        """`read` gives the module of a path."""
        self._reads, self.owner = dict.fromkeys(paths, read), owner

    def __getitem__(self, path: str) -> LoRA:
        return self._reads[path](path)

    def __contains__(self, path: object) -> bool:
        return path in self._reads

    def __iter__(self) -> Iterator[str]:
        return iter(self._reads)

    def __len__(self) -> int:
        return len(self._reads)


def balance_factors(a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
    """Bring factors into float16's range where powers of two can do it, their product unchanged.

    Call it before a cast to float16; `Adapter.uniform` does.

    Returns:
        `a (in, r)` and `b (r, out)` in float32, not yet evaluated. Where a column of `a` or its row
        of `b` is out of the range, both get one size; all others keep their bits.
    """
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    left, right = mx.abs(a).max(axis=0), mx.abs(b).max(axis=1)
    fine = [(size == 0) | ((size >= _COARSE) & (size <= FLOAT16_MAX)) for size in (left, right)]
    out_of_range = ~(fine[0] & fine[1])
    # A component with a zero on one side is none, whatever is on the other.
    alive = (left > 0) & (right > 0)
    halfway = mx.round((mx.log2(right) - mx.log2(left)) / 2)
    shift = mx.where(alive & out_of_range, mx.clip(halfway, -126, 126), 0).astype(mx.int32)
    gone = out_of_range & ~alive
    # From the bits of a float32: exact, which no device's `power` need be.
    up, down = (mx.left_shift(n + 127, mx.array(23)).view(mx.float32) for n in (shift, -shift))
    return mx.where(gone, 0, a * up), mx.where(gone[:, None], 0, b * down[:, None])
