"""A pack as a repository of the Hugging Face hub: itself, plain adapters, and a model card.

The repository is the pack with plain adapters beside it, not a folder of either: one address serves
programs that read packs and those that do not, and of a plain pack no file is there twice.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from d2c_mlx.packs.card import CardOptions, read_bench, render_card
from d2c_mlx.packs.export import write_plain
from d2c_mlx.packs.overwrite import MARKER, check_output, mark
from d2c_mlx.packs.pack import COMPACT, MANIFEST, Pack, load_pack
from d2c_mlx.utils.errors import ConfigError, PackError
from d2c_mlx.utils.files import write_dir, write_text
from d2c_mlx.utils.hub import parse_hub_id, upload

__all__ = ["CARD", "push", "write_repository"]

CARD = "README.md"
# Files that an earlier push may have left there and that this one may lack.
# The router's name is repeated here: packs know nothing of serving.
_OURS = ("cluster-*", COMPACT, "router.safetensors")


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
    check = partial(check_output, directory, [("pack", pack.path)], error=PackError)
    check()
    card = render_card(pack, repo, options, read_bench(pack, options.bench))
    with write_dir(directory, lambda _: check()) as temporary, pack.reading():
        write_plain(pack, temporary)
        for file in (*pack.manifest.files, MANIFEST):
            if not (temporary / file).exists():
                pack.copy(file, temporary / file)
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
