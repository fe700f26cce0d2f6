"""From two PEFT folders to a pack that mlx-lm generates with.

    python examples/two_adapters.py [OUTPUT]      # default: runs/two

The two adapters of SmolLM2-135M become one of the same size; nothing is downloaded.
"""

import json
import shutil
import sys
from pathlib import Path

from d2c_mlx import RunConfig, load_pack, run_pipeline

import mlx.core as mx  # isort: skip  (after d2c_mlx, which loads a fast BLAS first)
from mlx_lm import generate, load

DEMO = Path(__file__).parent / "demo"
TASKS = ("date-en", "num-en")


def main(output: Path) -> None:
    """Merge, pack, and answer a held-out prompt of each task with mlx-lm."""
    for name in TASKS:
        shutil.copytree(DEMO / "adapters" / name, output / "peft" / name, dirs_exist_ok=True)

    # One adapter's room for two; a budget in bytes ("12.5%", "2MB") would be planned instead.
    config = RunConfig(
        adapters=str(output / "peft"),
        tasks=str(DEMO / "tasks"),
        budget="1",
        output=str(output / "run"),
        probe_examples=4,
        test_examples=4,
        baselines=(),
    )
    session = run_pipeline(config)
    pack = load_pack(session.path("pack"))
    losses = {name: row["loss"] for name, row in session.read("bench.json")["methods"].items()}
    print(
        f"{pack.nbytes:,} bytes; loss {losses['pack']:.3f}, base model {losses['base']:.3f},"
        f" two adapters {losses['individual']:.3f}"
    )

    for name in TASKS:
        base, adapter = session.library.base.path, pack.path / pack.tasks[name]
        model, tokenizer = load(str(base), adapter_path=str(adapter))
        if mx.default_device() == mx.Device(mx.cpu):
            model.set_dtype(mx.float32)  # MLX's CPU backend is slow in 16 bit
        row = json.loads((DEMO / "tasks" / name / "test.jsonl").read_text().splitlines()[0])
        *chat, expected = row["messages"]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
        answer = generate(model, tokenizer, prompt, max_tokens=16)
        print(f"{name}: {chat[-1]['content']}")
        print(f"  expected {expected['content']!r}")
        print(f"  answered {answer!r}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/two"))
