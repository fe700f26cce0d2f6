"""Results of `bench PACK` as Markdown: one of them, or two side by side. Measures nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from d2c_mlx.evaluate.answers import METRIC_NAMES, METRICS
from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.files import hash_file

__all__ = ["FORMAT", "compare_phones", "read_phone", "render_phone"]

Json = dict[str, Any]
FORMAT = "d2c-mlx-phone"
# What must be the same in two results that are compared: words, and where it is.
_SAME = {
    "base model (sha256 of its files)": ("model", "source_sha256"),
    "bits of the base": ("model", "bits"),
    "pack (sha256 of its manifest)": ("pack", "manifest_sha256"),
    "contexts": ("options", "contexts"),
    "decoded tokens": ("options", "decode"),
}

# What a result has besides, to be shown or compared; * is any key or number.
_PARTS = {
    "": ("time", "quality"),
    "model.": ("name", "compute_dtype"),
    "pack.": ("n_tasks",),
    "device.": ("name", "memory", "memory_source", "storage_source"),
    "options.": ("runs",),
    "methods.pack.storage.": ("nbytes", "limit", "margin", "fits"),
    "methods.*.": ("nbytes",),
    "methods.*.contexts.*.": ("context", "first_token_seconds", "prompt_tokens_per_second",
                              "decode_tokens_per_second"),
    "methods.*.memory.*.": ("context", "weights", "adapter", "kv_cache", "rest", "peak", "limit",
                            "margin", "fits"),
    "switch.": ("ratio", "ratio_before_token"),
    "switch.pack.": ("read_seconds", "attach_seconds", "token_seconds", "seconds"),
    "switch.stock.": ("reload_seconds", "token_seconds", "seconds"),
    "provenance.": ("includes", "versions"),
    "provenance.machine.": ("device", "system", "backend"),
}  # fmt: skip
_QUALITY = {
    "": ("n_rows", "float_dtype", "float_weights", "kept_gain"),
    "gain.": ("float", "device"),
    "float.*.": ("loss", "excess", "retention"),
    "device.*.": ("loss", "excess", "retention"),
    "device.pack.": ("loss",),
}


def render_phone(result: Json) -> str:
    """The answer, speed, memory, switching and quality of one result."""
    model, device = result["model"], result["device"]
    bits = f"{model['bits']} bit" if model["bits"] else "not quantized"
    parts = [
        f"# {result['pack']['n_tasks']} tasks on {model['name']} ({bits}), as on {device['name']}",
        _verdict(result),
        _table(
            ("method", "adapter files", "context", "first token", "prompt tok/s", "decode tok/s"),
            [
                (name, _mb(method["nbytes"]), str(one["context"]),
                 _ms(one["first_token_seconds"]), f"{one['prompt_tokens_per_second']:.1f}",
                 f"{one['decode_tokens_per_second']:.1f}")
                for name, method in result["methods"].items() for one in method["contexts"]
            ],
        ),
        _table(
            ("method", "context", "weights", "adapter", "KV cache", "rest", "peak", "margin"),
            [
                (name, str(one["context"]),
                 *(_mb(one[key]) for key in ("weights", "adapter", "kv_cache", "rest", "peak",
                                             "margin")))
                for name, method in result["methods"].items() for one in method["memory"]
            ],
        ),
        _switch(result["switch"]),
        *([_quality(result["quality"])] if result["quality"] else []),
        _provenance(result),
    ]  # fmt: skip
    return "\n\n".join(parts)


def _verdict(result: Json) -> str:
    pack, device = result["methods"]["pack"], result["device"]
    worst = min(pack["memory"], key=lambda one: one["margin"])
    return "\n".join(
        f"- {what}: **{'fits' if fit['fits'] else 'does not fit'}** {_mb(fit['limit'])}, margin"
        f" {_mb(fit['margin'])} ({about}; limit: {' '.join(source.split())})"
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
        f" float base ({quality['float_weights']} weights), {gain['device']:.4f} on the"
        f" device's{verdict}."
    )


def _metrics(method: Json) -> list[str]:
    """Of the answers, in percent; dashes where nothing was answered."""
    found = method.get("metrics")
    return [_one(found[key]) if found else "-" for key in METRICS]


def _provenance(result: Json) -> str:
    provenance = result["provenance"]
    machine = provenance["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    options = result["options"]
    return (
        f"Times of this machine, not of the device: {machine['device']} ({machine['system']}), MLX"
        f" backend {machine['backend']}, in {result['model']['compute_dtype']}; timed runs:"
        f" {options['runs']}, tokens decoded: {options['decode']}. {versions}. Included:"
        f" {provenance['includes']}."
    )


def read_phone(path: Path, of: Path | None = None) -> Json:
    """Read a result; of a history file the last line.

    Args:
        path: of the file.
        of: a pack that it must be of.

    Raises:
        PackError: no such file, no result of `bench PACK`, or one of another pack.
    """
    if not path.is_file():
        raise PackError(f"{path}: no such file; write one with d2c-mlx bench PACK --json > {path}")
    text = path.read_text(encoding="utf-8").strip()
    for candidate in (text, text.split("\n")[-1]):
        try:
            result = json.loads(candidate)
        except ValueError:
            continue
        if isinstance(result, dict) and result.get("format") == FORMAT:
            break
    else:
        raise PackError(f"{path}: no result of d2c-mlx bench PACK --json, nor a history of them")
    if missing := _missing(result):
        more = f" and {len(missing) - 3} fields more" if len(missing) > 3 else ""
        raise PackError(
            f"{path}: has no {', '.join(missing[:3])}{more}, expected a whole result of d2c-mlx"
            " bench PACK --json; write it again"
        )
    if of and result["pack"]["manifest_sha256"] != hash_file(of / "manifest.json"):
        raise PackError(
            f"{path}: it is of another pack than {of}; measure this one with d2c-mlx bench {of}"
            f" --device {result['device']['name']} --json > {path}, or delete the file"
        )
    return result


def _missing(result: Json) -> list[str]:
    """Dotted names of all fields that a result lacks."""
    paths = [".".join(one) for one in _SAME.values()]
    paths += [start + key for start, keys in _PARTS.items() for key in keys]
    if result.get("quality") is not None:
        paths += [f"quality.{start}{key}" for start, keys in _QUALITY.items() for key in keys]
    return list(dict.fromkeys(gap for path in paths for gap in _gaps(result, path)))


def _gaps(value: object, path: str) -> Iterator[str]:
    """Where a path leads nowhere: up to the first key that is not there."""
    key, _, rest = path.partition(".")
    items = dict(enumerate(value)) if isinstance(value, list) else value
    if not isinstance(items, dict) or (key != "*" and key not in items) or not items:
        yield key
        return
    for name in items if key == "*" else [key]:
        yield from (f"{name}.{gap}" for gap in (_gaps(items[name], rest) if rest else ()))


def compare_phones(first: Json, second: Json) -> str:
    """Two results side by side as Markdown: what differs in the set-up, then every measure.

    Raises:
        PackError: they measure something else: another model, pack or contexts; one line each.
    """
    problems = [
        f"compare: {words}: found {second[part][key]}, expected {first[part][key]} as in the first"
        " result; measure both with the same"
        for words, (part, key) in _SAME.items()
        if first[part][key] != second[part][key]
    ]
    if problems:
        raise PackError(problems)
    both = first, second
    setup = [
        ("device", *(one["device"]["name"] for one in both)),
        ("machine", *(one["provenance"]["machine"]["device"] for one in both)),
        ("system", *(one["provenance"]["machine"]["system"] for one in both)),
        ("backend", *(one["provenance"]["machine"]["backend"] for one in both)),
        *(
            (name, *(one["provenance"]["versions"].get(name, "-") for one in both))
            for name in first["provenance"]["versions"]
        ),
        ("time", *(one["time"] for one in both)),
        ("methods", *(", ".join(one["methods"]) for one in both)),
        ("held-out rows", *(_rows(one) for one in both)),
    ]
    return "\n\n".join(
        (
            _table(("set-up", "A", "B", ""), [(*row, _mark(row)) for row in setup]),
            _table(("measure", "A", "B", "B / A"), _measures(first, second)),
        )
    )


def _rows(result: Json) -> str:
    return str(sum(result["quality"]["n_rows"])) if result["quality"] else "-"


def _mark(row: Sequence[str]) -> str:
    return "" if row[1] == row[2] else "differs"


def _measures(first: Json, second: Json) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name in [name for name in first["methods"] if name in second["methods"]]:
        found = [one["methods"][name] for one in (first, second)]
        rows_of = [[{**times, **memory} for times, memory in zip(one["contexts"], one["memory"])]
                   for one in found]  # fmt: skip
        for a, b in zip(*rows_of):
            about = f"{name}, {a['context']} tokens"
            for words, key, unit in (
                ("first token", "first_token_seconds", _ms),
                ("prompt tok/s", "prompt_tokens_per_second", _one),
                ("decode tok/s", "decode_tokens_per_second", _one),
                ("peak", "peak", _mb),
            ):
                rows.append(
                    (f"{about}: {words}", unit(a[key]), unit(b[key]), _ratio(a[key], b[key]))
                )
    both = first, second
    for kind in ("pack", "stock"):
        a, b = (one["switch"][kind]["seconds"] for one in both)
        rows.append((f"change of adapter, {kind}", _ms(a), _ms(b), _ratio(a, b)))
    if first["quality"] and second["quality"] and _rows(first) == _rows(second):
        a, b = (one["quality"]["device"]["pack"]["loss"] for one in both)
        rows.append(("loss of the pack", f"{a:.4f}", f"{b:.4f}", _ratio(a, b)))
        found = [_metrics(one["quality"]["device"]["pack"]) for one in both]
        rows += [(f"{name} of the pack", *pair, "") for name, *pair in zip(METRIC_NAMES, *found)]
    return rows


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Numbers to the right, all columns but the first."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.2f} MB"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"


def _one(value: float) -> str:
    return f"{value:,.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _ratio(a: float, b: float) -> str:
    return f"{b / a:.2f}" if a else "-"
