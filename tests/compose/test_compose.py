"""The command: what it writes, what it refuses, and what it leaves out on a capped base."""

import json
import shutil

import numpy as np
import pytest
from helpers.tiny import peft_adapter, task, tiny_model, write_jsonl

from d2c_mlx import load_pack, read_adapter
from d2c_mlx.compose.compose import compose_adapter
from d2c_mlx.compose.methods import METHODS, NewTask, find_method
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.scorer import LossCache, Scorer
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import load_task
from d2c_mlx.plugins import COMPOSE_METHODS, names
from d2c_mlx.refine.refine import TrainOptions
from d2c_mlx.utils.errors import D2CError, InputWarning, ModelError


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
def test_from_rows_to_an_adapter_of_a_pack(command, argv, paths, tmp_path):
    pack, output = tmp_path / "run" / "pack", tmp_path / "made" / "new"
    rows = ["--model", paths.model, "--tasks", paths.tasks]
    options = ["--adapters", paths.adapters, "--budget", 2, "--output", tmp_path / "run"]
    assert command("run", "--until", "pack", *rows, *options)[0] == 0
    assert command("route", pack, *rows)[0] == 0
    far = peft_adapter(tmp_path, "far", alpha=4000, seed=2)
    code, out, err = command(*argv(**{"from": far}, method="best"))
    assert (code, out) == (1, "") and not output.exists()
    assert "the base model alone is better than best, by " in err and "--anyway" in err
    code, out, err = command(*argv(), "--dry-run", "--json")
    work = json.loads(out)
    assert code == 0 and not err and not output.exists()
    assert {"best", "fresh-library"} < {*work["methods"]} and work["seconds"] > 0
    code, out, _ = command(*argv(method="best"), "--dry-run", "--json")
    assert json.loads(out)["methods"] == ["best"] and json.loads(out)["tokens"] < work["tokens"] / 4
    # The router of the pack tells which tasks are near.
    words = argv(**{"from": tmp_path / "run"}, method="retrieve") + ["--anyway"]
    code, out, err = command(*words)
    assert code == 0, err
    assert "retrieve is ahead by" in out and "\nbase " in out and "\nfresh " not in out
    about = json.loads((output / "compose.json").read_text())
    assert about["method"] == "retrieve" and about["rows"] == 5
    assert out.count(", which is as good") == len(about["as_good"])
    assert sorted("+".join(about["library"]).split("+")) == ["a", "b", "c"]
    # Another time the bytes are the same.
    written = read_adapter(output)
    code, out, err = command(*words, "--json")
    assert code == 0 and {*json.loads(out)["candidates"]} == {"base", "best", "retrieve"}
    assert read_adapter(output).digest == written.digest
    code, out, _ = command("add", pack, output, "--model", paths.model, "--budget", 3)
    assert code == 0 and "new: an adapter of its own" in out
    assert load_pack(pack).load("new").digest == written.digest


def test_what_is_refused(command, argv, paths, tmp_path):
    out = tmp_path / "made" / "new"

    def refused(**options):
        code, stdout, err = command(*argv(**options))
        assert (code, stdout) == (2, "") and not (out / "adapters.safetensors").exists()
        return err.splitlines()

    # All at once.
    wrong = {"from": tmp_path / "nothing", "task": tmp_path / "none", "method": "lorahubs"}
    method, source, task = refused(**wrong)
    assert "method: found 'lorahubs', expected one of auto, best, uniform," in method
    assert "no such directory and no Hugging Face id; --from is" in source
    assert f"{tmp_path / 'none' / 'probe.jsonl'}: missing" in task
    row = write_jsonl(tmp_path / "row" / "probe.jsonl", [{"prompt": "a", "completion": "b"}])
    for options, words in (
        ({"task": tmp_path / "tasks"}, f"give {tmp_path / 'tasks' / 'new'}"),
        ({"method": "retrieve"}, "method: retrieve compares prompts"),
        ({"task": row.parent}, "found one row, expected two or more"),
    ):
        (line,) = refused(**options)
        assert words in line
    out.mkdir(parents=True)
    (out / "mine.txt").write_text("mine")
    (line,) = refused()
    assert "mine.txt" in line and (out / "mine.txt").read_text() == "mine"


@pytest.mark.slow
def test_in_the_adapters_folder_what_was_made_before_is_not_mixed_in(
    command, argv, paths, tmp_path
):
    folder = shutil.copytree(paths.adapters, tmp_path / "loras")
    arguments = argv(**{"from": folder}, output=folder / "new", method="uniform")
    digests = []
    for _ in range(2):
        code, out, err = command(*arguments, "--json")
        assert code == 0 and json.loads(out)["library"] == ["a", "b", "c"], err
        digests.append(read_adapter(folder / "new").digest)
    assert digests[0] == digests[1]
    alone = argv(**{"from": folder / "new"}, output=folder / "new")
    assert "no adapter but the output itself" in command(*alone)[2]


# A base model that caps its logits: nothing can be trained on it, the rest is compared

CAPPED = "scales or caps its logits"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("capped")
    tiny_model(root / "model", model_type="gemma2", head_dim=8, num_key_value_heads=2,
               final_logit_softcapping=2.0)  # fmt: skip
    for seed, name in enumerate("ab"):
        peft_adapter(root / "adapters", name, alpha=40, seed=seed)
    task(root / "tasks", "new", n_probe=5)
    return root


def test_methods_that_train_are_left_out(command, root, tmp_path):
    left_out = "fresh, fresh-scaled, fresh-library, best-trained"
    with pytest.warns(InputWarning, match=f"^method: .* {CAPPED}, .*; left out: {left_out}$"):
        code, out, err = command(
            "compose", "--from", root / "adapters", "--task", root / "tasks" / "new", "--model",
            root / "model", "--output", tmp_path / "new", "--json", "--anyway",
        )  # fmt: skip
    assert code == 0, err
    about = json.loads(out)
    assert about["candidates"].keys() == {"base", "best", "uniform", "top"}
    assert set(about["as_good"]) <= {"base", "best"}


@pytest.fixture(scope="module")
def capped_task(root):
    base = Model(str(root / "model"))
    library = [read_adapter(root / "adapters" / name, base.module_shapes) for name in "ab"]
    scorer = Scorer(Engine(base), LossCache())
    return NewTask("new", base, scorer, library, np.ones(2), TrainOptions(1, 0.0))


@pytest.mark.parametrize("name", [*METHODS, *names(COMPOSE_METHODS)])
def test_what_is_refused_is_what_trains(root, capped_task, name, monkeypatch):
    rows = capped_task.base.encode("new", load_task(root / "tasks" / "new", tests=False).probe)
    method, trains = find_method(name), False
    try:
        method(capped_task, rows, (method.choices or [0])[0])
    except D2CError as error:
        trains = CAPPED in str(error)
    # It is refused before anything is evaluated.
    monkeypatch.setattr("d2c_mlx.compose.compose.cross_validate", lambda *args: {}["stop"])
    pytest.raises(ModelError if trains else KeyError, compose_adapter, capped_task, rows, name)
