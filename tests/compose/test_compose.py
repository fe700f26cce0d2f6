"""The command: what it writes and says, what it refuses, and what a pack makes of it."""

import json
import shutil

import pytest
from helpers.served import client, serving
from helpers.tiny import peft_adapter, task, write_jsonl

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.packs.pack import load_pack


@pytest.fixture
def argv(paths, tmp_path):
    """`argv(**options)`: of a compose of the tiny library for a task called "new"."""
    task(tmp_path / "tasks", "new", n_probe=5)

    def make(**options):
        given = {"from": paths.adapters, "model": paths.model, "task": tmp_path / "tasks" / "new",
                 "output": tmp_path / "made" / "new", **options}  # fmt: skip
        return ["compose", *(part for k, v in given.items() if v for part in (f"--{k}", str(v)))]

    return make


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:router")
def test_from_rows_to_an_adapter_that_a_pack_answers_with(command, argv, paths, tmp_path):
    pack = tmp_path / "run" / "pack"
    options = {"model": paths.model, "adapters": paths.adapters, "tasks": paths.tasks,
               "budget": 2, "output": tmp_path / "run"}  # fmt: skip
    pairs = [part for k, v in options.items() for part in (f"--{k}", v)]
    assert command("run", "--until", "pack", *pairs)[0] == 0
    assert command("route", pack, "--model", paths.model, "--tasks", paths.tasks)[0] == 0
    far = peft_adapter(tmp_path, "far", alpha=4000, seed=2)
    code, out, err = command(*argv(**{"from": far}, method="best"))
    assert (code, out) == (1, "") and not (tmp_path / "made").exists()
    assert "the base model alone is better than best, by " in err and "--anyway" in err
    # The router of the pack tells which tasks are near.
    words = argv(**{"from": tmp_path / "run"}, method="retrieve") + ["--anyway"]
    code, out, err = command(*words)
    assert code == 0, err
    assert "retrieve is ahead by" in out and "\nbase " in out and "\nfresh " not in out
    about = json.loads((tmp_path / "made" / "new" / "compose.json").read_text())
    assert about["method"] == "retrieve" and about["rows"] == 5
    assert out.count(", which is as good") == len(about["as_good"])
    assert sorted("+".join(about["library"]).split("+")) == ["a", "b", "c"]
    written = read_adapter(tmp_path / "made" / "new")
    # Another time the bytes are the same.
    code, out, err = command(*words, "--json")
    assert code == 0 and json.loads(out)["candidates"].keys() == {
        "base", "best", "retrieve"
    }  # fmt: skip
    assert read_adapter(tmp_path / "made" / "new").digest == written.digest
    code, out, _ = command("add", pack, tmp_path / "made" / "new", "--model", paths.model,
                           "--budget", 3)  # fmt: skip
    assert code == 0 and "new: an adapter of its own" in out
    assert load_pack(pack).load("new").digest == written.digest
    said = command("generate", pack, "What is new?", "--task", "new", "--model", paths.model,
                   "--max-tokens", 4)[1]  # fmt: skip
    with serving(load_pack(pack), paths.model) as server, client(server) as api:
        messages = [{"role": "user", "content": "What is new?"}]
        found = api.chat.completions.create(
            model="new", messages=messages, max_tokens=4, temperature=0
        )
    assert found.choices[0].message.content.strip() == said.strip()


def refused(command, argv, tmp_path):
    code, out, err = command(*argv)
    assert (code, out) == (2, "") and not (
        tmp_path / "made" / "new" / "adapters.safetensors"
    ).exists()
    return [line.removeprefix("error: ") for line in err.splitlines()]


def test_what_is_refused(command, argv, paths, tmp_path):
    # All at once.
    wrong = {"from": tmp_path / "nothing", "task": tmp_path / "none", "method": "lorahubs"}
    method, source, task = refused(command, argv(**wrong), tmp_path)
    assert method.startswith("method: found 'lorahubs', expected one of auto, best, uniform,")
    assert "no such directory and no Hugging Face id; --from is" in source
    assert task.startswith(f"{tmp_path / 'none' / 'probe.jsonl'}: missing")
    (line,) = refused(command, argv(task=tmp_path / "tasks"), tmp_path)
    assert line.endswith(f"give {tmp_path / 'tasks' / 'new'}")
    (line,) = refused(command, argv(method="retrieve"), tmp_path)
    assert line.startswith("method: retrieve compares prompts") and "--tasks DIR" in line
    one = write_jsonl(tmp_path / "one" / "probe.jsonl", [{"prompt": "a", "completion": "b"}])
    (line,) = refused(command, argv(task=one.parent), tmp_path)
    assert line.endswith("found one row, expected two or more; about ten are best")
    mine = tmp_path / "made" / "new" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    (line,) = refused(command, argv(), tmp_path)
    assert str(mine) in line and mine.read_text() == "mine"


@pytest.mark.slow
def test_in_the_adapters_folder_what_was_made_before_is_not_mixed_in(
    command, argv, paths, tmp_path
):
    folder = shutil.copytree(paths.adapters, tmp_path / "loras")
    made = argv(**{"from": folder}, output=folder / "new", method="uniform")
    digests = []
    for _ in range(2):
        code, out, err = command(*made, "--json")
        assert code == 0 and json.loads(out)["library"] == ["a", "b", "c"], err
        digests.append(read_adapter(folder / "new").digest)
    assert digests[0] == digests[1]
    alone = argv(**{"from": folder / "new"}, output=folder / "new")
    assert "no adapter but the output itself" in command(*alone)[2]
