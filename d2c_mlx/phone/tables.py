"""A result of the phone benchmark: read from its file, and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2c_mlx.evaluate.answers import METRIC_NAMES, METRICS
from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.files import hash_file, read_text
from d2c_mlx.utils.templates import markdown

__all__ = ["FORMAT", "read_phone", "render_phone"]

FORMAT = "d2c-mlx-phone"
_COMMAND = "d2c-mlx phone PACK --json"

Json = dict[str, Any]


def read_phone(path: Path, of: Path | None = None) -> Json:
    """Read a result that `d2c-mlx phone --json` printed, to put it into a report.

    Args:
        path: file of the result.
        of: directory of the pack that was measured; None takes the result of any pack.

    Raises:
        PackError: no such file, no result that can be shown, or one of another pack.
    """
    if not path.is_file():
        raise PackError(f"{path}: no such file; write one with {_COMMAND} > {path}")
    try:
        result = json.loads(read_text(path))
        if result["format"] != FORMAT:
            raise ValueError
    except (ValueError, LookupError, TypeError):
        raise PackError(f"{path}: no result of {_COMMAND}") from None
    try:
        render_phone(result)
        measured, device = result["pack"]["manifest_sha256"], result["device"]["name"]
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        part = f"{error} is missing" if isinstance(error, KeyError) else error
        raise PackError(f"{path}: not a whole result ({part}); write it again") from None
    if of and measured != hash_file(of / "manifest.json"):
        raise PackError(
            f"{path}: it is of another pack than {of}; measure this one with d2c-mlx phone {of}"
            f" --device {device} --json > {path}, or delete the file"
        )
    return result


def render_phone(result: Json) -> str:
    """A result as Markdown: whether it fits, then speed, memory, change of adapter, quality.

    Args:
        result: from `benchmark.bench_phone` or `read_phone`.
    """
    model, device = result["model"], result["device"]
    bits = f"{model['bits']} bit" if model["bits"] else "not quantized"
    parts = [
        f"# {result['pack']['n_tasks']} tasks on {markdown(model['name'])} ({bits}), as on"
        f" {markdown(device['name'])}",
        _verdict(result),
        _speed(result["methods"]),
        _memory(result["methods"]),
        _switch(result["switch"]),
        *([_quality(result["quality"])] if result["quality"] else []),
        _provenance(result),
    ]
    return "\n\n".join(parts)


def _speed(methods: Json) -> str:
    rows = [
        (name, _mb(method["nbytes"]), str(context["context"]), _ms(context["first_token_seconds"]),
         f"{context['prompt_tokens_per_second']:.1f}", f"{context['decode_tokens_per_second']:.1f}")
        for name, method in methods.items() for context in method["contexts"]
    ]  # fmt: skip
    header = "method", "adapter files", "context", "first token", "prompt tok/s", "decode tok/s"
    return _table(header, rows)


def _memory(methods: Json) -> str:
    keys = "weights", "adapter", "kv_cache", "rest", "peak", "margin"
    rows = [
        (name, str(context["context"]), *(_mb(context[key]) for key in keys))
        for name, method in methods.items() for context in method["memory"]
    ]  # fmt: skip
    header = "method", "context", "weights", "adapter", "KV cache", "rest", "peak", "margin"
    return _table(header, rows)


def _verdict(result: Json) -> str:
    pack, device = result["methods"]["pack"], result["device"]
    worst = min(pack["memory"], key=lambda context: context["margin"])
    return "\n".join(
        f"- {what}: **{'fits' if fit['fits'] else 'does not fit'}** {_mb(fit['limit'])}, margin"
        f" {_mb(fit['margin'])} ({about}; limit: {markdown(' '.join(source.split()))})"
        for what, fit, about, source in (
            ("memory", worst, f"peak {_mb(worst['peak'])} at {worst['context']} tokens",
             device["memory_source"]),
            ("storage", pack["storage"], f"base and pack {_mb(pack['storage']['nbytes'])}",
             device["storage_source"]),
        )
    )  # fmt: skip


def _switch(switch: Json) -> str:
    ours, stock = switch["pack"], switch["stock"]
    rows = [
        ("pack", _ms(ours["read_seconds"]), _ms(ours["attach_seconds"])),
        ("stock mlx-lm", "-", _ms(stock["reload_seconds"])),
    ]
    table = _table(
        ("change of adapter", "read", "attach or reload", "one token", "whole"),
        [(*row, _ms(change["token_seconds"]), _ms(change["seconds"]))
         for row, change in zip(rows, (ours, stock))],
    )  # fmt: skip
    return (
        f"{table}\n\nThe pack changes adapters {switch['ratio']:.1f} times faster up to the next"
        f" token, {switch['ratio_before_token']:.1f} times without that token."
    )


def _quality(quality: Json) -> str:
    rows = []
    for label, key in (("device", "device"), (f"float ({quality['float_dtype']})", "float")):
        for name, method in quality[key].items():
            rows.append((label, name, f"{method['loss']:.4f}", _number(method["excess"]),
                         _percent(method["retention"]), *_metrics(method)))  # fmt: skip
    gain, kept = quality["gain"], quality["kept_gain"]
    verdict = ""
    if kept is not None:
        verdict = (
            f": {_percent(kept)} of it is left" if kept > 0 else ": the device's base undoes it"
        )
    return (
        _table(("base", "method", "loss", "excess", "retention", *METRIC_NAMES), rows)
        + f"\n\nThe pack's gain over its base, in nats per target token: {gain['float']:.4f} on the"
        f" float base ({markdown(quality['float_weights'])} weights), {gain['device']:.4f} on the"
        f" device's{verdict}."
    )


def _metrics(method: Json) -> list[str]:
    """Scores of the answers in percent, dashes where nothing was answered."""
    scores = method.get("metrics")
    return [f"{scores[key]:,.1f}" if scores else "-" for key in METRICS]


def _provenance(result: Json) -> str:
    provenance = result["provenance"]
    machine = provenance["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    options = result["options"]
    return markdown(
        f"Times of this machine, not of the device: {machine['device']} ({machine['system']}), MLX"
        f" backend {machine['backend']}, in {result['model']['compute_dtype']}; timed runs:"
        f" {options['runs']}, tokens decoded: {options['decode']}. {versions}. Included:"
        f" {provenance['includes']}."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned right, all but the first."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)]]
    lines += [[markdown(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.2f} MB"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"
