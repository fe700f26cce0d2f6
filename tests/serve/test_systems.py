"""The system message of a task's rows, where a request or a prompt has none."""

from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from d2c_mlx_cli.main import cli
from helpers.served import client, serving
from helpers.tiny import CHAT_TEMPLATE, LAYERS, library, tiny_tokenizer, write_jsonl

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.models.examples import encode_prompts
from d2c_mlx.models.model import Model
from d2c_mlx.models.rows import read_rows
from d2c_mlx.models.tasks import common_system, load_task
from d2c_mlx.packs.add import add_from_path
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.packs.write import opened, remove_tasks, write_pack
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig
from d2c_mlx.serve.router import load_router, route_prompts

ASKED = "Who is it? Answer 2"


@pytest.fixture
def spoken(tmp_path):
    """As SmolLM2's template: a system message of its own, rows have an empty one."""
    paths = library(tmp_path, list("ab"))
    tokenizer = tiny_tokenizer()
    default = "<|im_start|>system\nThe other foxes are watching the lazy dog.<|im_end|>\n"
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}{{ '" + default.replace("\n", "\\n") + "' }}"
        "{% endif %}" + CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(paths.model)
    for name, words in (("a", "Write the number"), ("b", "Who is it? Answer")):
        rows = [
            {"messages": [{"role": role, "content": said} for role, said in
                          (("system", ""), ("user", f"{words} {i}"), ("assistant", "x"))]}
            for i in range(8)
        ]  # fmt: skip
        write_jsonl(paths.tasks / name / "probe.jsonl", rows[:4])
        write_jsonl(paths.tasks / name / "test.jsonl", rows[4:])
    base = Model(str(paths.model))
    found = [replace(read_adapter(paths.adapters / n, base.module_shapes), sources=(n,))
             for n in "ab"]  # fmt: skip
    about = {"model": base.name, "config_hash": base.config_hash, "n_layers": LAYERS}
    return paths, write_pack(tmp_path / "run" / "pack", found, Manifest(**about, budget="3"))


@pytest.fixture
def run_of_two(spoken, tmp_path):
    """A run of two tasks: rows of `a` begin with an empty system message, those of `b` with one."""
    paths, _ = spoken
    for file in (paths.tasks / "b").iterdir():
        rows = read_rows(file, "")
        for row in rows:
            row["messages"][0]["content"] = "The quick fox"
        write_jsonl(file, rows)
    config = RunConfig(
        model=str(paths.model), adapters=str(paths.adapters), tasks=str(paths.tasks), budget="1",
        output=str(tmp_path / "made"), probe_examples=2, test_examples=2, baselines=(),
    )  # fmt: skip
    run(config, until="pack", quiet=True)
    return paths, tmp_path / "made"


def test_a_request_without_one_gets_that_of_the_rows(run_of_two):
    paths, made = run_of_two
    route_prompts(made, [], tasks=paths.tasks, model=str(paths.model))
    pack = load_pack(made)
    base = Model(str(paths.model))
    asked = [{"role": "user", "content": ASKED}]
    with serving(pack, str(paths.model)) as server:
        api = client(server)

        def reply(model, *before):
            messages = [*({"role": "system", "content": said} for said in before), *asked]
            tokens = base.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            found = api.chat.completions.create(model=model, messages=messages, max_tokens=6)
            return found.model, found.choices[0].message.content, found.usage.prompt_tokens, tokens

        for task, system in (("a", ""), ("b", "The quick fox")):
            *found, without = reply(task)
            *expected, tokens = reply(task, system)
            assert found == expected and found[2] == len(tokens) != len(without)
            *other, tokens = reply(task, "The lazy dog is watching")
            assert other[2] == len(tokens)
        # The base model has no rows; the router chooses first, then the task's own goes before.
        *found, tokens = reply("model")
        assert found[2] == len(tokens)
        *auto, _ = reply("auto")
        *named, _ = reply(auto[0])
        assert auto == named


def test_generate_takes_that_of_the_rows(run_of_two):
    paths, made = run_of_two
    asks = ["generate", str(made), "--model", str(paths.model), "--max-tokens", "6", ASKED]

    def ask(*more):
        return CliRunner().invoke(cli, [*asks, *more], catch_exceptions=False).output

    for task, system in (("a", ""), ("b", "The quick fox")):
        assert ask("--task", task) == ask("--task", task, "--system", system)
    assert load_pack(made).messages("a", "Who?", "x")[0] == {"role": "system", "content": "x"}


def test_packs_that_change_keep_them(run_of_two):
    paths, made = run_of_two
    assert load_pack(made).manifest.systems == {"a": "", "b": "The quick fox"}
    with opened(made) as pack:
        left = remove_tasks(pack, ["b"])
    assert left.manifest.systems == {"a": ""}
    options = {"model": str(paths.model), "tasks": paths.tasks}
    found = add_from_path(made, str(paths.adapters / "b"), **options).pack
    assert found.manifest.systems == {"a": "", "b": "The quick fox"}
    with opened(made) as pack:
        remove_tasks(pack, ["b"])
    found = add_from_path(made, str(paths.adapters / "b"), model=str(paths.model)).pack
    assert found.manifest.systems == {"a": ""}


def test_a_prompt_alone_is_routed_as_the_rows_were(spoken):
    paths, pack = spoken
    rows = [row for n in "ab" for row in load_task(paths.tasks / n).probe]
    prompts = [row["messages"][1]["content"] for row in rows]
    found = route_prompts(pack.path, prompts, tasks=paths.tasks, model=str(paths.model))
    assert [one["task"] for one in found] == [*"aaaabbbb"]
    again = load_router(load_pack(pack.path))
    assert again.system == ""
    base = Model(str(paths.model))
    with_it, without = (encode_prompts(base.tokenizer, prompts, s) for s in ("", None))
    own = [base.encode(n, load_task(paths.tasks / n).probe).examples for n in "ab"]
    assert with_it == [row.prompt_tokens for rows in own for row in rows] != without
    own, other = (again.states(base.model, prompts) for prompts in (with_it, without))
    assert np.abs(own - other).max() > 1e-3


def test_a_template_that_refuses_a_system_message_says_so(command, spoken):
    paths, pack = spoken
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
        + CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(paths.model)
    asks = ["generate", pack.path, "--task", "a", "--model", paths.model, "--max-tokens", 2, "Who?"]
    assert command(*asks)[0] == 0
    code, out, err = command(*asks, "--system", "Be brief")
    assert (code, out) == (2, "")
    assert err.startswith("error: system: ") and "No system role" in err and err.count("\n") == 1
    tokenizer.chat_template = "{{ raise_exception('Not today') }}"
    tokenizer.save_pretrained(paths.model)
    assert command(*asks)[2].startswith("error: prompt: ")


def test_rows_with_several_system_messages_have_none_in_common(spoken):
    paths, _ = spoken
    first, second = (load_task(paths.tasks / n) for n in "ab")
    assert common_system([first, second]) == ""
    rows = [{"messages": row["messages"][1:]} for row in second.probe]
    assert common_system([first, replace(second, probe=tuple(rows))]) is None
    assert common_system([replace(second, probe=tuple(rows))]) is None
    assert common_system([replace(first, probe=({"prompt": "a", "completion": "b"},))]) is None
