"""The sweep: bytes of every pack at every bit width and context, against every device's limits."""

import csv
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from d2c_mlx.phone.memory import MemoryModel, estimate

Json = dict[str, Any]


def sweep(
    bases: Mapping[str, Json],
    nbytes: Mapping[str, int],
    sizes: Mapping[str, Sequence[int]],
    memory: MemoryModel,
    contexts: Iterable[int],
    size: int,
) -> list[Json]:
    """Estimate every combination of bit width, pack, context, KV cache and loaded adapters.

    Args:
        bases: bits -> facts of `quantized_model`.
        nbytes: pack -> bytes of its files.
        sizes: pack -> bytes of each of its adapters as it is loaded, falling.
        memory: of the base model, the same at any bits.
        contexts: in tokens.
        size: bytes of a number that is not quantized, on the device.
    """
    rows = []
    beside = {(n, kv): estimate(memory, n, kv, size) for n in contexts for kv in memory}
    for (bits, base), (name, held) in itertools.product(bases.items(), sizes.items()):
        counts = sorted({min(n, len(held)) for n in (1, 4, len(held))})
        disk = base["file_nbytes"] + nbytes[name]
        for ((context, kv_bits), working), n in itertools.product(beside.items(), counts):
            row = {"bits": bits, "pack": name, "context": context, "kv_bits": kv_bits}
            peak = base["weights_nbytes"] + sum(held[:n]) + working
            rows.append({**row, "resident": n, "disk": disk, "peak": peak})
    return rows


def judge(rows: Iterable[Json], limits: Mapping[str, Any], quality: Mapping[str, Json]) -> Json:
    """Which pack is best on a device, and which do not fit, by how many bytes.

    With one loaded adapter and a KV cache that is not quantized: no loss is known with another.

    Args:
        rows: from `sweep`.
        limits: `memory` and `storage` of the device, in bytes.
        quality: bits -> pack -> its `loss`; {} if there are no rows.

    Returns:
        `best`: per context the pack and bits with the lowest loss of those that fit; None if
        nothing fits, or without losses. `refused`: those that do not fit, task adapters too. All
        with `memory_margin` and `storage_margin`, below 0 by the bytes that are too many.
    """
    rows = [row for row in rows if row["resident"] <= 1 and row["kv_bits"] == 16]
    rows = [{**row, **_against(row, limits, quality)} for row in rows]
    best = []
    for context in dict.fromkeys(row["context"] for row in rows):
        fitting = [row for row in rows if row["context"] == context and row["fits"]]
        packs = [row for row in fitting if row["pack"] != "individual"]
        best.append(min(packs, key=lambda row: row["loss"]) if packs and quality else None)
    return {"best": best, "refused": [row for row in rows if not row["fits"]]}


def _against(row: Json, limits: Mapping[str, Any], quality: Mapping[str, Json]) -> Json:
    """The bytes that a row of `sweep` leaves of a device's limits, and its loss."""
    memory, storage = limits["memory"] - row["peak"], limits["storage"] - row["disk"]
    return {
        "memory_margin": memory,
        "storage_margin": storage,
        "fits": min(memory, storage) >= 0,
        "loss": quality[row["bits"]][row["pack"]]["loss"] if quality else None,
    }


def csv_text(result: Json) -> str:
    """Every combination against every device as CSV, a row each.

    Args:
        result: from `benchmark.bench_phone` or `read_phone`.
    """
    rows = [
        {"device": device, **row, **_against(row, limits, result["quality"])}
        for device, limits in result["devices"].items()
        for row in result["sweep"]
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
