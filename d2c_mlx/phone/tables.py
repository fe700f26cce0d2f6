"""A result of the phone benchmark as Markdown. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from d2c_mlx.evaluate.metrics import METRIC_NAMES, METRICS
from d2c_mlx.utils.templates import markdown

__all__ = ["render_phone"]

Json = dict[str, Any]


def render_phone(result: Json) -> str:
    """A result as Markdown: whether it fits, then speed, memory, change of adapter, quality.

    Args:
        result: from `benchmark.bench_phone` or `result.read_phone`.
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
        (name, _mb(method["nbytes"]), str(one["context"]), _ms(one["first_token_seconds"]),
         f"{one['prompt_tokens_per_second']:.1f}", f"{one['decode_tokens_per_second']:.1f}")
        for name, method in methods.items() for one in method["contexts"]
    ]  # fmt: skip
    header = "method", "adapter files", "context", "first token", "prompt tok/s", "decode tok/s"
    return _table(header, rows)


def _memory(methods: Json) -> str:
    keys = "weights", "adapter", "kv_cache", "rest", "peak", "margin"
    rows = [
        (name, str(one["context"]), *(_mb(one[key]) for key in keys))
        for name, method in methods.items() for one in method["memory"]
    ]  # fmt: skip
    header = "method", "context", "weights", "adapter", "KV cache", "rest", "peak", "margin"
    return _table(header, rows)


def _verdict(result: Json) -> str:
    pack, device = result["methods"]["pack"], result["device"]
    worst = min(pack["memory"], key=lambda one: one["margin"])
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
        [(*row, _ms(one["token_seconds"]), _ms(one["seconds"]))
         for row, one in zip(rows, (ours, stock))],
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
