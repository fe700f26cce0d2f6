"""From ten rows of a new task to an adapter in a pack that `d2c-mlx serve` answers with.

    python examples/new_task.py [OUTPUT] [LIBRARY] [NEW] [MODEL]

By default num-es of examples/demo is the new task; its own adapter is left out. Nothing is
downloaded. A few minutes, nearly all of it for training.
"""

import json
import shutil
import sys
from pathlib import Path

from d2c_mlx import RunConfig, run_pipeline
from d2c_mlx.compose.compose import compose
from d2c_mlx.packs.add import add_from_path
from d2c_mlx.serve.load import answer

DEMO = Path(__file__).parent / "demo"


def main(output: Path, library: Path, new: str, model: str | None) -> None:
    """Pack the other adapters, compose the missing one, add it, and answer."""
    names = [folder.name for folder in (library / "adapters").iterdir() if folder.name != new]
    for name in names:
        source = library / "adapters" / name
        shutil.copytree(source, output / "loras" / name, dirs_exist_ok=True)
    others, tasks = output / "loras", library / "tasks"
    config = RunConfig(adapters=str(others), tasks=str(tasks), model=model, budget=str(len(names)),
                       output=str(output / "run"), probe_examples=4)  # fmt: skip
    pack = run_pipeline(config, until="pack").path("pack")

    result = compose(str(others), tasks / new, output / "made" / new, tasks=tasks, model=model)
    loss, bare = (result["candidates"][name]["loss"] for name in (result["method"], "base"))
    print(f"{result['method']}: loss {loss:.3f}, base model {bare:.3f}")
    print(f"as good: {', '.join(result['as_good']) or 'neither base model, best nor fresh LoRA'}")

    room = str(len(names) + 1)
    added = add_from_path(pack, str(output / "made" / new), model=model, budget=room).pack
    row = json.loads((tasks / new / "test.jsonl").read_text().splitlines()[0])
    chat = row.get("messages") or [{"content": row["prompt"]}, {"content": row["completion"]}]
    prompt = chat[-2]["content"]
    pieces = answer(added, new, prompt, str(added.base_directory(model)), max_tokens=16)
    print(f"{new}: {prompt}")
    print(f"  expected {chat[-1]['content']!r}")
    print(f"  answered {''.join(pieces)!r}")
    print(f"d2c-mlx serve {pack}")


if __name__ == "__main__":
    given = [*sys.argv[1:], *[None] * 4]
    main(Path(given[0] or "runs/new-task"), Path(given[1] or DEMO), given[2] or "num-es", given[3])
