"""Plain mlx-lm adapters from a pack of any storage."""

from __future__ import annotations

import shutil
from pathlib import Path

from d2c_mlx.errors import PackError
from d2c_mlx.files import write_dir, write_json
from d2c_mlx.pack import Pack

__all__ = ["unpack"]


def unpack(pack: Pack, directory: Path) -> dict[str, str | None]:
    """Write plain mlx-lm adapters of either storage: `cluster-<k>/` and `tasks.json`.

    Args:
        pack: what `load_pack` verified.
        directory: replaced as a whole.

    Returns:
        What `tasks.json` holds: task -> directory, null for the base model.

    Raises:
        PackError: `directory` holds the pack, or an adapter cannot be read; nothing is written.
    """
    if pack.path.resolve().is_relative_to(directory.resolve()):
        raise PackError(f"output: {directory} would replace the pack; name another")
    tasks: dict[str, str | None] = {}
    with write_dir(directory) as temporary:
        for k in sorted({k for k in pack.tasks.values() if k is not None}, key=str):
            name = f"cluster-{k}" if isinstance(k, int) else k
            served = [task for task, adapter in pack.tasks.items() if adapter == k]
            adapter = pack.load(served[0])
            if adapter:
                if isinstance(k, int):
                    adapter.save(temporary / name, pack.manifest["base"]["n_layers"])
                else:
                    (temporary / name).mkdir()
                    # What the manifest verified, and nothing that lies beside it.
                    for file in pack.manifest["files"]:
                        if file.startswith(f"{name}/"):
                            shutil.copyfile(pack.path / file, temporary / file)
            tasks |= dict.fromkeys(served, name if adapter else None)
        tasks |= {task: None for task, adapter in pack.tasks.items() if adapter is None}
        tasks = dict(sorted(tasks.items()))
        write_json(temporary / "tasks.json", tasks)
    return tasks
