"""Provenance of a result: everything that is needed to repeat it."""

from __future__ import annotations

from typing import Any

from d2c_mlx.run.inputs import Inputs
from d2c_mlx.utils.device import environment

__all__ = ["provenance"]


def provenance(inputs: Inputs) -> dict[str, Any]:
    """Options, versions, machine, and hashes of the inputs of a run, as a JSON value."""
    base, capacity = inputs.base, inputs.capacity
    return {
        "config": inputs.config.to_dict(),
        "base": {"model": base.name, "config_sha256": base.config_hash},
        "compute_dtype": str(base.compute_dtype).split(".")[-1],
        "budget": {
            "text": capacity.budget.text,
            "nbytes": capacity.max_bytes,
            "input_nbytes": capacity.total,
        },
        "inputs": {
            adapter.name: {
                "adapter": adapter.digest,
                "probe": probe.digest,
                "test": test.digest,
                **({"origin": adapter.origin} if adapter.origin else {}),
            }
            for adapter, probe, test in zip(inputs.adapters, inputs.probes, inputs.tests)
        },
        **environment(),
    }
