"""The adapters of a pack of any storage, written for other programs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.packs.pack import Pack
from d2c_mlx.run.overwrite import check_output
from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.files import write_dir, write_json

__all__ = ["unpack", "write_adapters"]


def unpack(pack: Pack, directory: Path) -> dict[str, str | None]:
    """Write plain mlx-lm adapters of either storage: `cluster-<k>/` and `tasks.json`.

    Args:
        pack: what `load_pack` verified.
        directory: replaced as a whole.

    Returns:
        What `tasks.json` holds: task -> directory, null for the base model.

    Raises:
        InputError: `directory` is not one to replace, see `check_output`, or an adapter cannot be
            read; nothing is written.
    """

    def write(adapter: Adapter, path: Path) -> None:
        if pack.storage == "compact":
            adapter.save(path, pack.manifest["base"]["n_layers"])
        else:
            path.mkdir()
            # What the manifest verified, and nothing that lies beside it.
            for file in pack.files_of(path.name):
                shutil.copyfile(pack.path / file, path.parent / file)

    return write_adapters(pack, directory, write)


def write_adapters(
    pack: Pack, directory: Path, write: Callable[[Adapter, Path], None], suffix: str = ""
) -> dict[str, str | None]:
    """Write every adapter as `cluster-<k><suffix>`, and `tasks.json`.

    Args:
        pack: what `load_pack` verified.
        directory: replaced as a whole, only once everything is in it.
        write: writes one adapter to a path that does not exist yet.
        suffix: of the written files.

    Returns:
        What `tasks.json` holds: task -> file or directory, null for the base model.

    Raises:
        InputError: `directory` is not one to replace, see `check_output`, or an adapter cannot be
            read; nothing is written.
    """
    check_output(directory, [("pack", pack.path)], error=PackError)
    tasks: dict[str, str | None] = {}
    with write_dir(directory) as temporary:
        for k, served in pack.adapters.items():
            adapter = pack.load(served[0])
            name = None
            if adapter:
                name = (f"cluster-{k}" if isinstance(k, int) else k) + suffix
                write(adapter, temporary / name)
            tasks |= dict.fromkeys(served, name)
        tasks |= {task: None for task, adapter in pack.tasks.items() if adapter is None}
        tasks = dict(sorted(tasks.items()))
        write_json(temporary / "tasks.json", tasks)
    return tasks
