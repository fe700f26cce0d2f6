"""A pack as a repository of the Hugging Face hub: itself, plain adapters, and a model card.

The repository is the pack with plain adapters beside it, not a folder of either: one address serves
programs that read packs and those that do not, and of a plain pack no file is there twice.
"""

from __future__ import annotations

import shlex
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from d2c_mlx.adapters.checks import read_config
from d2c_mlx.compress.compact_file import read_index
from d2c_mlx.models.resolve import EMBEDDED
from d2c_mlx.packs.export import adapter_name, write_adapters
from d2c_mlx.packs.manifest import COMPACT, MANIFEST
from d2c_mlx.packs.overwrite import MARKER, check_output, mark
from d2c_mlx.packs.pack import Pack, load_pack
from d2c_mlx.utils.errors import ConfigError, PackError
from d2c_mlx.utils.files import hash_file, read_text, write_dir, write_text
from d2c_mlx.utils.hub import parse_hub_id, upload
from d2c_mlx.utils.parsing import json_or_none, parse_json
from d2c_mlx.utils.templates import templates_of

__all__ = ["CARD", "CardOptions", "push", "read_bench", "render_card", "write_repository"]

Json = dict[str, Any]
CARD = "README.md"
# Files that an earlier push may have left there and that this one may lack.
# The router's name is repeated here: packs know nothing of serving.
_OURS = ("cluster-*", COMPACT, "router.safetensors")
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


def write_repository(
    pack: Pack, repo: str, directory: Path, options: CardOptions | None = None
) -> None:
    """Write the folder that `push` uploads. Needs no network.

    It holds the pack (its manifest and files), plain adapters with `tasks.json` as `export` to
    `mlx` writes them, which for a plain pack are the same files, and README.md.

    Args:
        pack: what `load_pack` verified.
        repo: `owner/name`, for the card.
        directory: replaced as a whole.
        options: of the card.

    Raises:
        InputError: a wrong id, what `render_card`, `read_bench` and `export` raise; nothing is
            written.
    """
    options = options or CardOptions()
    hub = parse_hub_id(repo)
    if hub is None or hub.revision:
        raise ConfigError(f"repo: {repo!r}, expected a Hugging Face id, owner/name")
    check = partial(check_output, directory, "push", [("pack", pack.path)])
    check()
    card = render_card(pack, repo, options, read_bench(pack, options.bench))
    with write_dir(directory, lambda _: check()) as temporary, pack.reading():
        write_adapters(pack, temporary)
        names = (*pack.manifest.files, MANIFEST)
        pack.copy_all((name for name in names if not (temporary / name).exists()), temporary)
        write_text(temporary / CARD, card)
        load_pack(temporary)
        mark(temporary, "push")


def push(
    pack: Pack, repo: str, options: CardOptions | None = None, *, private: bool = False
) -> str:
    """Upload what `write_repository` writes, in one commit.

    Args:
        pack: what `load_pack` verified.
        repo: `owner/name`, created if need be.
        options: of the card; its `revision` is the branch that is uploaded to, made if need be.
        private: see `hub.upload`.

    Returns:
        The address of the commit.

    Raises:
        InputError: as `write_repository`; nothing is sent.
        D2CError: the hub does not take it, see `hub.upload`.
    """
    options = options or CardOptions()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "repository"
        write_repository(pack, repo, folder, options)
        # It speaks of a directory on this machine.
        (folder / MARKER).unlink()
        return upload(folder, repo, private, options.revision, _OURS)


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

    name = pack.manifest.model
    base = options.base or _HUB_NAMES.get(name, name)
    hub = parse_hub_id(base)
    if hub is None or hub.revision:
        raise ConfigError(
            f"base: {base!r} is no Hugging Face id (owner/name), which a card needs; pass --base"
        )
    if not pack.adapters:
        raise PackError(f"{pack.path}: the base model serves every task; there is nothing to push")
    front = ModelCardData(
        base_model=base,
        base_model_relation="adapter",
        library_name="mlx",
        license=options.license,
        pipeline_tag="text-generation",
        tags=["lora", "mlx", "mlx-lm", "peft", "merge", "d2c-mlx"],
    )
    # Adapters of removed tasks that are in a merge still are named as far as they are known.
    origins = pack.manifest.origins
    names = sorted({*pack.tasks, *origins})
    hubs = {task: parse_hub_id(origins.get(task, "")) for task in names}
    left = sorted(task for task, key in pack.tasks.items() if key is None)
    text = templates_of("d2c_mlx.packs").get_template("card.md.jinja").render(
        repo=repo,
        base=base,
        license=options.license,
        at=f" --revision {shlex.quote(options.revision)}" if options.revision else "",
        storage=pack.storage,
        nbytes=pack.nbytes,
        tasks=sorted(pack.tasks),
        left=left,
        adapters=_rows(pack, bench),
        origins={task: hub for task, hub in hubs.items() if hub},
        local=[task for task, hub in hubs.items() if hub is None],
        unnamed=max(0, sum(map(pack.merged, pack.adapters)) - len(names) + len(left)),
        # The embedded model is not the hub's files, and found by its name.
        model_option="" if name == EMBEDDED else f" --model {base}",
        bench=bench,
    )  # fmt: skip
    return f"---\n{front.to_yaml()}\n---\n\n{text}"


def _rows(pack: Pack, bench: Json | None) -> list[Json]:
    """A row for each adapter, named as by `export`: its tasks, how it was made and is stored."""
    recorded = _recorded(pack, bench)
    rows = []
    for key, tasks in pack.adapters.items():
        nbytes = sum(pack.files_of(str(key)).values())
        if pack.storage == "compact":
            index = read_index(pack.path / COMPACT)
            counts = zip(index.bits, index.counts[int(key)].sum(axis=0))
            parts = [f"{int(n)} at {bits} bit" for bits, n in counts if n]
            stored = f"components: {', '.join(parts) or 'none'}"
        elif pack.storage == "gguf":
            stored = f"GGUF, {nbytes:,} bytes"
        else:
            parameters: Any = read_config(pack.path / str(key))["lora_parameters"]
            stored = f"rank {parameters['rank']}, {nbytes:,} bytes"
        method, scale = recorded.get(frozenset(tasks), ("not recorded", "-"))
        row = {"name": adapter_name(key), "tasks": tasks, "method": method, "scale": scale}
        rows.append({**row, "stored": stored})
    return rows


def _recorded(pack: Pack, bench: Json | None) -> dict[frozenset[str], tuple[str, object]]:
    """Map tasks that share an adapter to how it was made and its scale, by the run directory."""
    run = pack.path.resolve().parent
    path = run / ("merges.json" if pack.storage == "plain" else "plan.json")
    methods: dict[frozenset[str], tuple[str, object]] = {}
    try:
        content = _json(path) if path.is_file() else []
        refined: set[frozenset[str]] = set()
        if bench and bench["refined"] and (path := run / "refines.json").is_file():
            refined = {frozenset(entry["members"]) for entry in _json(path) if entry["refined"]}
        for entry in content["units"] if isinstance(content, dict) else content:
            tasks = frozenset(entry.get("members") or entry["tasks"])
            how = entry.get("method", "merge") if len(tasks) > 1 else "its own adapter"
            methods[tasks] = (how + ", refined" * (tasks in refined), entry["scale"])
            if type(entry["scale"]) not in (int, float):
                raise TypeError
    except (AttributeError, KeyError, TypeError):
        raise ConfigError(f"{path}: no run wrote it; remove it, or copy the pack away") from None
    # A later stage may have written the file anew.
    record = json_or_none(run / ".stages" / "pack.json")
    read = record.get("read") if isinstance(record, dict) else None
    path = run / ("merges.json" if pack.storage == "plain" else "plan.json")
    same = isinstance(read, dict) and path.is_file() and read.get(path.name) == hash_file(path)
    return methods if same else {}


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
    bench = _json(path)
    try:
        about = bench["provenance"]
        # Its hash stands for tasks, bytes and base model.
        if about["pack"]["manifest_sha256"] != hash_file(pack.path / MANIFEST):
            raise ValueError
        methods = {name: bench["methods"][name] for name in ("base", "individual", "pack")}
        rows = []
        for task in [*sorted(pack.tasks), None]:
            row = {name: entry if task is None else entry["tasks"][task]
                   for name, entry in methods.items()}  # fmt: skip
            retention = row["pack"]["retention"]
            rows.append({
                "task": "mean" if task is None else task,
                "retention": None if retention is None else float(retention),
                **{name: float(entry["loss"]) for name, entry in row.items()},
            })  # fmt: skip
        config = about["config"]
        return {
            "rows": rows,
            "n_rows": int(config["test_examples"]),
            "dtype": str(about["compute_dtype"]),
            "refined": bool(config["refine"]),
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ConfigError(
            f"{path}: is no bench.json of {pack.path} (its manifest differs, as after d2c-mlx add,"
            " remove or route); name that of the run that made this very pack with --bench, or move"
            " this one away: the card then says that nothing was measured"
        ) from None


def _json(path: Path) -> Any:  # noqa: ANN401  JSON is any
    try:
        return parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error})") from None
