"""What MLX computes on, and what of it decides the bits of a result."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import mlx.core as mx

from d2c_mlx.blas import loaded_blas
from d2c_mlx.errors import ConfigError

__all__ = ["arithmetic", "use_device"]


def use_device() -> None:
    """Compute on the CPU, in float32, if `$D2C_MLX_DEVICE` says `cpu`.

    Raises:
        ConfigError: it says anything else.
    """
    wish = os.environ.get("D2C_MLX_DEVICE")
    if wish not in (None, "", "cpu"):
        raise ConfigError(f"D2C_MLX_DEVICE: found {wish!r}, expected cpu, or nothing for the GPU")
    if wish:
        mx.set_default_device(mx.cpu)


def arithmetic() -> list[str | None]:
    """What decides the bits of a result beside model and engine: MLX, its device, and a BLAS.

    On a Mac Metal's kernels come with the system, and newer GPUs have others for float32.
    """
    info = mx.device_info()
    found = [version("mlx"), str(info.get("device_name")), str(mx.default_device()), loaded_blas()]
    if mac := platform.mac_ver()[0]:
        tf32 = os.environ.get("MLX_ENABLE_TF32")
        found += [mac, str(info.get("architecture")), tf32]
    return found
