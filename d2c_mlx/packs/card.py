"""The model card of a pack: what was merged, what is kept, licences, how to load it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2c_mlx.adapters.checks import read_config
from d2c_mlx.compress.compact_file import read_index
from d2c_mlx.models.resolve import EMBEDDED
from d2c_mlx.packs.pack import COMPACT, MANIFEST, Pack
from d2c_mlx.utils.errors import ConfigError, PackError
from d2c_mlx.utils.files import hash_file, read_text
from d2c_mlx.utils.hub import parse_hub_id
from d2c_mlx.utils.parsing import json_or_none, parse_json
from d2c_mlx.utils.templates import templates_of

__all__ = ["CardOptions", "read_bench", "render_card"]

Json = dict[str, Any]

_HUB_NAMES = {EMBEDDED: f"HuggingFaceTB/{EMBEDDED}"}


@dataclass(frozen=True)
class CardOptions:
    """Options of a model card.

    Attributes:
        base: the base model's id on the hub; None where the pack names it.
        license: an id as the hub names licences, or "other".
        revision: the branch that the card is for; None is the default one.
        bench: `bench.json` of the run that made the pack; None looks beside the pack.
    """

    base: str | None = None
    license: str = "other"
    revision: str | None = None
    bench: Path | None = None


def render_card(pack: Pack, repo: str, options: CardOptions, bench: Json | None = None) -> str:
    """README.md of a model repository: YAML front matter and Markdown.

    It holds nothing of this machine. How each adapter was made comes from `merges.json` or
    `plan.json` of the run directory, where the pack is in one and was made from that very file.

    Args:
        pack: what `load_pack` verified.
        repo: `owner/name` of the repository.
        options: see `CardOptions`.
        bench: what `read_bench` gave; None is not measured.

    Raises:
        ConfigError: the base model has no id on the hub.
        PackError: the pack stores no adapter.
    """
    from huggingface_hub import ModelCardData

    name = pack.manifest.base.model
    base = options.base or _HUB_NAMES.get(name, name)
    hub = parse_hub_id(base)
    if hub is None or hub.revision:
        raise ConfigError(
            f"base: {base!r} is no Hugging Face id (owner/name), which a card needs; pass --base"
        )
    adapters = _adapters(pack, bench)
    if not adapters:
        raise PackError(f"{pack.path}: the base model serves every task; there is nothing to push")
    front = ModelCardData(
        base_model=base,
        base_model_relation="adapter",
        library_name="mlx",
        license=options.license,
        pipeline_tag="text-generation",
        tags=["lora", "mlx", "mlx-lm", "peft", "merge", "d2c-mlx"],
    )
    text = (
        templates_of("d2c_mlx.packs")
        .get_template("card.md.jinja")
        .render(
            repo=repo,
            base=base,
            license=options.license,
            at=f" --revision {shlex.quote(options.revision)}" if options.revision else "",
            storage=pack.storage,
            nbytes=pack.nbytes,
            tasks=sorted(pack.tasks),
            left=sorted(task for task, adapter in pack.tasks.items() if adapter is None),
            adapters=adapters,
            **_sources(pack),
            # The embedded model is not the hub's files, and found by its name.
            model_option="" if name == EMBEDDED else f" --model {base}",
            example=adapters[0]["name"],
            example_task=adapters[0]["tasks"][0],
            bench=bench,
        )
    )
    return f"---\n{front.to_yaml()}\n---\n\n{text}"


def read_bench(pack: Pack, path: Path | None) -> Json | None:
    """The measurements for a card, from the `bench.json` of the run that made a pack.

    Args:
        pack: that was measured.
        path: None looks beside the pack, as in a run directory.

    Returns:
        None where nothing lies beside the pack.

    Raises:
        ConfigError: it is not readable, or of another pack.
    """
    beside = pack.path.resolve().parent / "bench.json"
    if path is None and not beside.is_file():
        return None
    path = path or beside
    bench, stated = _json(path), pack.manifest.base.model_dump()
    try:
        methods, about = bench["methods"], bench["provenance"]
        packed, base = methods["pack"], about["base"]
        rows = [_losses(methods, task) for task in sorted(pack.tasks)]
        measured = {
            "rows": [*rows, _losses(methods, None)],
            "n_rows": int(about["config"]["test_examples"]),
            "dtype": str(about["compute_dtype"]),
            "refined": bool(about["config"]["refine"]),
        }
        same = (
            about["pack"]["manifest_sha256"] == hash_file(pack.path / MANIFEST)
            and packed["nbytes"] == pack.nbytes
            and packed["tasks"].keys() == pack.tasks.keys()
            and base == {key: stated[key] for key in base}
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        same = False
    if not same:
        raise ConfigError(_other_pack(path, pack, bench))
    return measured


def _other_pack(path: Path, pack: Pack, bench: Any) -> str:  # noqa: ANN401  JSON is any
    """The line for a `bench.json` of another pack: a run measures only the pack that it made."""
    about = bench.get("provenance") if isinstance(bench, dict) else None
    if isinstance(about, dict) and "pack" not in about:
        return (
            f"{path}: does not say which pack it is of, as those of older versions; delete it and"
            f" run d2c-mlx run --output {path.parent} again, if that run made {pack.path}"
        )
    return (
        f"{path}: is no bench.json of {pack.path} (its manifest, tasks, bytes or base model"
        " differ, as after d2c-mlx add, remove or route); name that of the run that made this very"
        " pack with --bench, or move this one away: the card then says that nothing was measured"
    )


def _losses(methods: Json, task: str | None) -> Json:
    """A row of the table; the task None is the mean over tasks."""
    found = {name: methods[name] if task is None else methods[name]["tasks"][task]
             for name in ("base", "individual", "pack")}  # fmt: skip
    retention = found["pack"]["retention"]
    return {
        "task": "mean" if task is None else task,
        "retention": None if retention is None else float(retention),
        **{name: float(entry["loss"]) for name, entry in found.items()},
    }


def _json(path: Path) -> Any:  # noqa: ANN401  JSON is any
    try:
        return parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error})") from None


def _recorded(pack: Pack, bench: Json | None) -> dict[frozenset[str], tuple[str, object]]:
    """Map tasks that share an adapter to how it was made and its scale, by the run directory."""
    path = pack.path.resolve().parent / ("merges.json" if pack.storage == "plain" else "plan.json")
    content = _json(path) if path.is_file() else []
    refined = _refined(path.with_name("refines.json")) if bench and bench["refined"] else set()
    found: dict[frozenset[str], tuple[str, object]] = {}
    try:
        for entry in content["units"] if isinstance(content, dict) else content:
            tasks = frozenset(entry.get("members") or entry["tasks"])
            how = entry.get("method", "merge") if len(tasks) > 1 else "its own adapter"
            found[tasks] = (how + ", refined" * (tasks in refined), entry["scale"])
            if type(entry["scale"]) not in (int, float):
                raise TypeError
    except (AttributeError, KeyError, TypeError):
        raise ConfigError(f"{path}: no run wrote it; remove it, or copy the pack away") from None
    return found if _made_from(path) else {}


def _refined(path: Path) -> set[frozenset[str]]:
    """Tasks of every adapter that training changed; empty for a pack that was copied away."""
    if not path.is_file():
        return set()
    try:
        return {frozenset(one["members"]) for one in _json(path) if one["refined"]}
    except (KeyError, TypeError):
        raise ConfigError(f"{path}: no run wrote it; remove it, or copy the pack away") from None


def _made_from(path: Path) -> bool:
    """True if the pack beside this file was made from it, and no later stage wrote it anew."""
    record = json_or_none(path.parent / ".stages" / "pack.json")
    read = record.get("read") if isinstance(record, dict) else None
    return isinstance(read, dict) and path.is_file() and read.get(path.name) == hash_file(path)


def _adapters(pack: Pack, bench: Json | None) -> list[Json]:
    """One row per stored adapter, named as `export` names it."""
    recorded = _recorded(pack, bench)
    rows = []
    for k, tasks in pack.adapters.items():
        name = f"cluster-{k}" if isinstance(k, int) else k.removesuffix(".gguf")
        method, scale = recorded.get(frozenset(tasks), ("not recorded", "-"))
        if pack.storage == "gguf":
            stored = f"GGUF, {pack.manifest.files[str(k)].nbytes:,} bytes"
        else:
            stored = _plain(pack, name) if pack.storage == "plain" else _compact(pack, int(k))
        rows.append(
            {"name": name, "tasks": tasks, "method": method, "scale": scale, "stored": stored}
        )
    return rows


def _plain(pack: Pack, name: str) -> str:
    nbytes = sum(pack.files_of(name).values())
    parameters: Any = read_config(pack.path / name)["lora_parameters"]
    return f"rank {parameters['rank']}, {nbytes:,} bytes"


def _compact(pack: Pack, k: int) -> str:
    index = read_index(pack.path / COMPACT)
    counts = index.counts[k].sum(axis=0)
    parts = [f"{int(n)} at {bits} bit" for bits, n in zip(index.bits, counts) if n]
    return f"components: {', '.join(parts) or 'none'}"


def _sources(pack: Pack) -> Json:
    """The origins of the adapters, and of removed ones that are in a merge still."""
    names = sorted({*pack.tasks, *pack.origins})
    bare = [key for key in pack.tasks.values() if key is None]
    origins = {task: parse_hub_id(str(pack.origins.get(task))) for task in names}
    return {
        "origins": {task: hub for task, hub in origins.items() if hub},
        "local": [task for task, hub in origins.items() if hub is None],
        "unnamed": max(0, sum(map(pack.merged, pack.adapters)) - len(names) + len(bare)),
    }
