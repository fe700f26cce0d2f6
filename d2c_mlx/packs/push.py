"""A pack as a repository of the Hugging Face hub: itself, plain adapters, and a model card.

The repository is the pack with plain adapters beside it, not a folder of either: one address serves
programs that read packs and those that do not, and of a plain pack no file is there twice.
"""

import shlex
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from d2c_mlx.compress.compact_file import COMPACT
from d2c_mlx.models.resolve import EMBEDDED
from d2c_mlx.packs.export import adapter_name, write_adapters
from d2c_mlx.packs.manifest import MANIFEST
from d2c_mlx.packs.overwrite import MARKER, check_output, mark
from d2c_mlx.packs.pack import Pack, load_pack
from d2c_mlx.utils.errors import ConfigError, PackError
from d2c_mlx.utils.files import copy_file, hash_file, read_text, write_dir, write_text
from d2c_mlx.utils.hub import parse_hub_id, upload
from d2c_mlx.utils.parsing import parse_json
from d2c_mlx.utils.templates import templates_of

CARD = "README.md"
# Files that an earlier push may have left there and that this one may lack.
# The router's name is repeated here: packs know nothing of serving.
_OURS = ("cluster-*", COMPACT, "router.safetensors")


def push(
    pack: Pack,
    repo: str,
    base: str | None = None,
    license: str = "other",
    revision: str | None = None,
    private: bool = False,
    output: Path | None = None,
) -> str | None:
    """Upload a pack, plain adapters and a model card, in one commit; or write them to a folder.

    The folder holds the pack (its manifest and files), plain adapters with `tasks.json` as `export`
    to `mlx` writes them, which for a plain pack are the same files, and README.md.

    Args:
        pack: what `load_pack` verified.
        repo: `owner/name`, created if need be.
        base: the base model's id on the hub; None where the pack names it.
        license: an id as the hub names licences, or "other".
        revision: the branch that is uploaded to, made if need be; None is the default one.
        private: see `hub.upload`.
        output: replaced as a whole by the folder, without any network; None uploads it.

    Returns:
        The address of the commit, or None.

    Raises:
        InputError: a wrong id, what `render_card`, `read_bench` and `export` raise; nothing is
            written or sent.
        D2CError: the hub does not take it, see `hub.upload`.
    """
    with tempfile.TemporaryDirectory() as root:
        folder = output or Path(root) / "repository"
        check = partial(check_output, folder, "push", [("pack", pack.path)])
        check()
        card = render_card(pack, repo, base, license, revision)
        with write_dir(folder, lambda _: check()) as temporary, pack.reading():
            write_adapters(pack, temporary)
            names = (name for name in pack.manifest.files if not (temporary / name).exists())
            pack.copy_all(names, temporary)
            copy_file(pack.path / MANIFEST, temporary / MANIFEST)
            write_text(temporary / CARD, card)
            load_pack(temporary)
            mark(temporary, "push")
        if output:
            return None
        # It speaks of a directory on this machine.
        (folder / MARKER).unlink()
        return upload(folder, repo, private, revision, _OURS)


def render_card(
    pack: Pack,
    repo: str,
    base: str | None = None,
    license: str = "other",
    revision: str | None = None,
) -> str:
    """README.md of a model repository, with the numbers of `read_bench`; see `push`.

    Raises:
        ConfigError: the repository or the base model has no id on the hub, see also `read_bench`.
        PackError: the pack stores no adapter.
    """
    from huggingface_hub import ModelCardData

    name = pack.manifest.model
    base = base or (f"HuggingFaceTB/{EMBEDDED}" if name == EMBEDDED else name)
    for field, text in (("repo", repo), ("base", base)):
        if (hub := parse_hub_id(text)) is None or hub.revision:
            raise ConfigError(f"{field}: {text!r}, expected a Hugging Face id, owner/name")
    if not pack.adapters:
        raise PackError(f"{pack.path}: the base model serves every task; there is nothing to push")
    front = ModelCardData(
        base_model=base,
        base_model_relation="adapter",
        library_name="mlx",
        license=license,
        pipeline_tag="text-generation",
        tags=["lora", "mlx", "mlx-lm", "peft", "merge", "d2c-mlx"],
    )
    bench = read_bench(pack)
    served = [(task, adapter_name(key)) for key, tasks in pack.adapters.items() for task in tasks]
    left = sorted(task for task, key in pack.tasks.items() if key is None)
    rows = [*served, *((task, "the base model") for task in left)]
    # Adapters of removed tasks that are in a merge still are named as far as they are known.
    origins = {task: parse_hub_id(text) for task, text in pack.manifest.origins.items()}
    origins = {task: hub for task, hub in origins.items() if hub}
    names = {*pack.tasks, *origins}
    template = templates_of("d2c_mlx.packs").get_template("card.md.jinja")
    text = template.render(
        repo=repo,
        base=base,
        license=license,
        at=f" --revision {shlex.quote(revision)}" if revision else "",
        pack=pack,
        adapters=len(pack.adapters),
        example=served[0],
        left=left,
        rows=rows,
        bench=bench,
        origins=dict(sorted(origins.items())),
        local=sorted(names - origins.keys()),
        unnamed=max(0, sum(map(pack.merged, pack.adapters)) - len(names) + len(left)),
        # The embedded model is not the hub's files, and found by its name.
        model_option="" if name == EMBEDDED else f" --model {base}",
    )
    return f"---\n{front.to_yaml()}\n---\n\n{text}"


def read_bench(pack: Pack) -> dict[str, Any] | None:
    """The measurements for a card, from the `bench.json` beside a pack in a run directory.

    Returns:
        `losses`: task, or None for the mean -> losses of `base`, `individual` and `pack`, and
        `kept`; `n_rows` and `dtype`. None where nothing lies beside the pack.

    Raises:
        ConfigError: it is not readable, or of another pack.
    """
    path = pack.path.resolve().parent / "bench.json"
    if not path.is_file():
        return None
    try:
        bench = parse_json(read_text(path))
        about = bench["provenance"]
        # Its hash stands for tasks, bytes and base model.
        if about["pack"]["manifest_sha256"] != hash_file(pack.path / MANIFEST):
            raise ValueError("of another manifest")
        losses = {}
        for task in (*pack.tasks, None):
            methods = {name: bench["methods"][name] for name in ("base", "individual", "pack")}
            if task is not None:
                methods = {name: entry["tasks"][task] for name, entry in methods.items()}
            kept = methods["pack"]["kept"]
            row = {name: float(entry["loss"]) for name, entry in methods.items()}
            losses[task] = {**row, "kept": None if kept is None else float(kept)}
        n_rows, dtype = max(map(len, bench["rows"].values())), str(about["compute_dtype"])
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: is no bench.json of {pack.path} ({error}), as after d2c-mlx add, remove or"
            " route; move it away: the card then says that nothing was measured"
        ) from None
    return {"losses": losses, "n_rows": n_rows, "dtype": dtype}
