"""The command that uploads a pack to the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path

import click

from .help import Command
from .paths import PackPath, UserPath
from .say import say, say_json, warn_of_idle

_PATH = UserPath(path_type=Path)


@click.command(cls=Command)
@click.argument("pack", type=PackPath(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="make a new repository private; refuse a public one")
@click.option("--revision", metavar="BRANCH", help="made if need be  [default: main]")
@click.option("--base", metavar="ID", help="the base model on the hub  [default: what the pack"
              " names]")  # fmt: skip
@click.option("--license", default="other", show_default=True, metavar="ID", help="as the hub names"
              " it; that of base and training data decides")  # fmt: skip
@click.option("--bench", type=_PATH, metavar="FILE", help="bench.json of the pack's run  [default:"
              " the one beside the pack, if any]")  # fmt: skip
@click.option("--output", type=_PATH, metavar="DIR", help="write the folder there, upload nothing")
@click.option("--dry-run", is_flag=True, help="print the model card, upload nothing")
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
def push(
    pack: Path,
    repo: str,
    private: bool,
    revision: str | None,
    base: str | None,
    license: str,
    bench: Path | None,
    output: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Upload a pack with a model card to the Hugging Face hub.

    The pack, plain adapters that mlx-lm loads, tasks.json and README.md go up in one commit.

    Examples:
      d2c-mlx push runs/first/pack org/name --private
      d2c-mlx push runs/first/pack org/name --dry-run            # print the card
      d2c-mlx push runs/first/pack org/name --output folder      # to look at; no upload
    """
    import tempfile

    from d2c_mlx.packs.card import CardOptions
    from d2c_mlx.packs.pack import load_pack
    from d2c_mlx.packs.push import CARD, write_repository
    from d2c_mlx.packs.push import push as push_pack
    from d2c_mlx.utils.files import visible_files

    if output is not None:
        warn_of_idle("with --output, which uploads nothing", "private")
    found = load_pack(pack)
    options = CardOptions(base, license, revision, bench)
    if output is None and not dry_run:
        url = push_pack(found, repo, options, private=private)
        say(json.dumps({"repo": repo, "commit": url}) if as_json else f"pushed: {url}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = output or Path(temporary) / "repository"
        write_repository(found, repo, folder, options)
        files = [path.relative_to(folder).as_posix() for path in visible_files(folder)]
        card = (folder / CARD).read_text(encoding="utf-8")
    if as_json:
        where = str(output) if output else None
        say_json({"repo": repo, "folder": where, "files": files})
    else:
        say(card if dry_run else f"wrote {len(files)} files to {output}; nothing was sent")
