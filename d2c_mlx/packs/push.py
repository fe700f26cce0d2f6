"""A pack as a repository of the Hugging Face hub: itself, plain adapters, and a model card."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from d2c_mlx.packs.card import read_bench, render_card
from d2c_mlx.packs.pack import MANIFEST, Pack, load_pack
from d2c_mlx.packs.unpack import unpack
from d2c_mlx.run.overwrite import check_output
from d2c_mlx.utils.errors import ConfigError, PackError
from d2c_mlx.utils.files import write_dir, write_text
from d2c_mlx.utils.hub import parse_hub_id, upload

__all__ = ["CARD", "push", "write_repository"]

CARD = "README.md"
# What an earlier push may have left there, and this one not have.
_OURS = ("cluster-*", "compact.safetensors")


def write_repository(
    pack: Pack,
    repo: str,
    directory: Path,
    *,
    base: str | None = None,
    license: str = "other",
    revision: str | None = None,
    bench: Path | None = None,
) -> None:
    """Write the folder that `push` uploads. Needs no network.

    It is the pack (its manifest and files) and plain adapters with `tasks.json`, as `unpack` writes
    them, which for a plain pack are the same files, and README.md.

    Args:
        pack: what `load_pack` verified.
        repo: `owner/name`, for the card.
        directory: replaced as a whole.
        base: see `render_card`.
        license: see `render_card`.
        revision: see `render_card`.
        bench: see `read_bench`.

    Raises:
        InputError: a wrong id, what `render_card`, `read_bench` and `unpack` raise; nothing is
            written.
    """
    hub = parse_hub_id(repo)
    if hub is None or hub.revision:
        raise ConfigError(f"repo: {repo!r}, expected a Hugging Face id, owner/name")
    check_output(directory, [("pack", pack.path)], error=PackError)
    measured = read_bench(pack, bench)
    card = render_card(pack, repo, base=base, license=license, revision=revision, bench=measured)
    with write_dir(directory) as temporary:
        unpack(pack, temporary)
        for file in (*pack.manifest["files"], MANIFEST):
            if not (temporary / file).exists():
                shutil.copyfile(pack.path / file, temporary / file)
        write_text(temporary / CARD, card)
        load_pack(temporary)


def push(
    pack: Pack,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    base: str | None = None,
    license: str = "other",
    bench: Path | None = None,
) -> str:
    """Upload what `write_repository` writes, in one commit.

    Args:
        pack: what `load_pack` verified.
        repo: `owner/name`, created if need be.
        private: see `hub.upload`.
        revision: a branch, made if need be; None is the default one.
        base: see `render_card`.
        license: see `render_card`.
        bench: see `read_bench`.

    Returns:
        The address of the commit.

    Raises:
        InputError: as `write_repository`; nothing is sent.
        D2CError: the hub does not take it, see `hub.upload`.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "repository"
        write_repository(
            pack, repo, folder, base=base, license=license, revision=revision, bench=bench
        )
        return upload(folder, repo, private, revision, _OURS)
