"""A result of the phone benchmark: read from its file, and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from d2c_mlx.evaluate.answers import METRIC_NAMES, METRICS
from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.files import hash_file, read_text
from d2c_mlx.utils.templates import markdown, percent

__all__ = ["FORMAT", "VERSION", "read_phone", "render_phone"]

FORMAT, VERSION = "d2c-mlx-phone", 2

Json = dict[str, Any]


def read_phone(path: Path, of: Path | None = None) -> Json:
    """Read a result that `d2c-mlx phone --json` printed, to put it into a report.

    Args:
        path: file of the result.
        of: directory of the pack that was measured; None takes the result of any pack.

    Raises:
        PackError: no such file, no result of this version, or one of another pack.
    """
    command = f"d2c-mlx phone {of or 'PACK'} --json > {path}"
    if not path.is_file():
        raise PackError(f"{path}: no such file; write one with {command}")
    try:
        result: Json = json.loads(read_text(path))
        if (result["format"], result["version"]) != (FORMAT, VERSION):
            raise ValueError
    except (ValueError, LookupError, TypeError):
        raise PackError(
            f"{path}: expected a result of this version of d2c-mlx phone; write it with {command}"
        ) from None
    if of and result["pack"]["manifest_sha256"] != hash_file(of / "manifest.json"):
        raise PackError(
            f"{path}: it is of another pack than {of}; measure this one with {command}, or delete"
            " the file"
        )
    return result


def render_phone(result: Json) -> str:
    """A result as Markdown: whether it fits, then speed, memory, change of adapter, quality.

    Args:
        result: from `benchmark.bench_phone` or `read_phone`.
    """
    model, device, methods = result["model"], result["device"], result["methods"].items()
    bits = f"{model['bits']} bit" if model["bits"] else "not quantized"
    speed = [
        (name, _mb(method["nbytes"]), context["context"], _ms(context["first_token_seconds"]),
         f"{context['prompt_tokens_per_second']:.1f}", f"{context['decode_tokens_per_second']:.1f}")
        for name, method in methods for context in method["contexts"]
    ]  # fmt: skip
    parts = ("weights", "adapter", "kv_cache", "rest", "peak", "margin")
    memory = [
        (name, context["context"], *(_mb(context[part]) for part in parts))
        for name, method in methods
        for context in method["memory"]
    ]
    ours, stock = result["switch"]["pack"], result["switch"]["stock"]
    switch = [
        ("pack", _ms(ours["read_seconds"]), _ms(ours["attach_seconds"]),
         _ms(ours["token_seconds"]), _ms(ours["seconds"])),
        ("stock mlx-lm", "-", _ms(stock["reload_seconds"]),
         _ms(stock["token_seconds"]), _ms(stock["seconds"])),
    ]  # fmt: skip
    return "\n\n".join([
        f"# {result['pack']['n_tasks']} tasks on {markdown(model['name'])} ({bits}), as on"
        f" {markdown(device['name'])}",
        _verdict(result["methods"]["pack"], device),
        _table("method|adapter files|context|first token|prompt tok/s|decode tok/s", speed),
        _table("method|context|weights|adapter|KV cache|rest|peak|margin", memory),
        _table("change of adapter|read|attach or reload|one token|whole", switch)
        + f"\n\nThe pack changes adapters {result['switch']['ratio']:.1f} times faster.",
        *([_quality(result["quality"])] if result["quality"] else []),
        _provenance(result),
    ])  # fmt: skip


def _verdict(pack: Json, device: Json) -> str:
    """The device's two limits: whether base and pack fit, and by how much."""
    worst = min(pack["memory"], key=lambda context: context["margin"])
    peak = f"peak {_mb(worst['peak'])} at {worst['context']} tokens"
    stored = f"base and pack {_mb(pack['storage']['nbytes'])}"
    return "\n".join(
        f"- {what}: **{'fits' if fit['fits'] else 'does not fit'}** {_mb(fit['limit'])}, margin"
        f" {_mb(fit['margin'])} ({about}; limit:"
        f" {markdown(' '.join(device[f'{what}_source'].split()))})"
        for what, fit, about in (("memory", worst, peak), ("storage", pack["storage"], stored))
    )


def _quality(quality: Json) -> str:
    """Losses and scores on the quantized and on the float base, and what is left of the gain."""
    rows = [
        (label, name, f"{method['loss']:.4f}",
         "-" if method["excess"] is None else f"{method['excess']:.4f}",
         percent(method["retention"]),
         *(f"{method['metrics'][key]:,.1f}" for key in METRICS))
        for label, key in (("device", "device"), (f"float ({quality['float_dtype']})", "float"))
        for name, method in quality[key].items()
    ]  # fmt: skip
    gain, kept = quality["gain"], quality["kept_gain"]
    verdict = ""
    if kept is not None:
        verdict = (
            f": {percent(kept)} of it is left" if kept > 0 else ": the device's base undoes it"
        )
    return (
        _table("|".join(("base", "method", "loss", "excess", "kept", *METRIC_NAMES)), rows)
        + f"\n\nThe pack's gain over its base, in nats per target token: {gain['float']:.4f} on the"
        f" float base ({markdown(quality['float_weights'])} weights), {gain['device']:.4f} on the"
        f" device's{verdict}."
    )


def _provenance(result: Json) -> str:
    provenance, options = result["provenance"], result["options"]
    machine = provenance["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    return markdown(
        f"Times of this machine, not of the device: {machine['device']} ({machine['system']}), MLX"
        f" backend {machine['backend']}, in {result['model']['compute_dtype']}; timed runs:"
        f" {options['runs']}, tokens decoded: {options['decode']}. {versions}. Included:"
        f" {provenance['includes']}."
    )


def _table(header: str, rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table whose columns are aligned right, all but the first."""
    names = header.split("|")
    lines = [names, ["---", *["--:"] * (len(names) - 1)]]
    lines += [[markdown(str(cell)) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.2f} MB"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"
