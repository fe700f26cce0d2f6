"""The system message of a task's rows, where a request or a prompt has none."""

import json

import pytest
from helpers.runs import config_of
from helpers.served import client, serving
from helpers.tiny import CHAT_TEMPLATE, library, task, tiny_tokenizer

from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import load_task
from d2c_mlx.packs.add import add_from_path
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.packs.write import opened, remove_tasks
from d2c_mlx.pipeline import run
from d2c_mlx.serve.router import load_router, route_prompts

ASKED = "Who is it? Answer 2"
ROLES = ("system", "user", "assistant")
BOTH = {"a": "", "b": "The quick fox"}
OTHER = "The other foxes are watching the lazy dog."


def spoken(root, systems):
    """A library as SmolLM2's template has it: rows of a task begin with its system message."""
    paths = library(root, list("ab"))
    tokenizer = tiny_tokenizer()
    default = f"<|im_start|>system\\n{OTHER}<|im_end|>\\n"
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}{{ '" + default + "' }}{% endif %}" + CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(paths.model)
    for name, words in (("a", "Write the number"), ("b", "Who is it? Answer")):
        rows = []
        for i in range(8):
            texts = zip(ROLES, (systems[name], f"{words} {i}", "x"))
            rows.append({"messages": [{"role": role, "content": text} for role, text in texts]})
        task(paths.tasks, name, rows=rows)
    run(config_of(paths, root / "made", budget="1", baselines=()), until="pack", quiet=True)
    return paths, root / "made"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Rows of `a` begin with an empty system message, those of `b` with one."""
    return spoken(tmp_path_factory.mktemp("two"), BOTH)


def test_a_request_without_one_gets_that_of_the_rows(two, command):
    """And so does `generate`."""
    paths, path = two
    route_prompts(path, [], tasks=paths.tasks, model=str(paths.model))
    pack = load_pack(path)
    base = Model(str(paths.model))
    asked = [{"role": "user", "content": ASKED}]
    with serving(pack, str(paths.model)) as server:
        api = client(server)

        def reply(model, *before):
            messages = [*({"role": "system", "content": system} for system in before), *asked]
            tokens = base.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            chat = api.chat.completions.create(model=model, messages=messages, max_tokens=6)
            return chat.model, chat.choices[0].message.content, chat.usage.prompt_tokens, tokens

        for task, system in BOTH.items():
            *answered, without = reply(task)
            *expected, tokens = reply(task, system)
            assert answered == expected and answered[2] == len(tokens) != len(without)
            words = ["generate", path, "--model", paths.model, "--max-tokens", 6, "--task", task]
            for more in ((), ("--system", system)):
                text = json.loads(command(*words, ASKED, "--json", *more)[1])["answer"]
                assert text == (answered[1] or "")
            *other, tokens = reply(task, "The lazy dog is watching")
            assert other[2] == len(tokens)
        # The base model has no rows; the router chooses first, then the task's own goes before.
        *answered, tokens = reply("model")
        assert answered[2] == len(tokens)
        *auto, _ = reply("auto")
        *named, _ = reply(auto[0])
        assert auto == named


def test_packs_that_change_keep_them(two):
    paths, path = two
    assert load_pack(path).manifest.systems == BOTH
    for tasks, systems in ((None, {"a": ""}), (paths.tasks, BOTH)):
        with opened(path) as pack:
            assert remove_tasks(pack, ["b"]).manifest.systems == {"a": ""}
        after = add_from_path(path, str(paths.adapters / "b"), model=str(paths.model), tasks=tasks)
        assert after.pack.manifest.systems == systems


def test_a_prompt_alone_is_routed_as_the_rows_were(tmp_path, command):
    """And a template that refuses a system message says so."""
    paths, path = spoken(tmp_path, {"a": "", "b": ""})
    rows = [row for n in "ab" for row in load_task(paths.tasks / n).probe]
    prompts = [row["messages"][1]["content"] for row in rows]
    rows = route_prompts(path, prompts, tasks=paths.tasks, model=str(paths.model))
    assert [row["task"] for row in rows] == [*"aaaabbbb"]
    assert load_router(load_pack(path)).system == ""
    asks = ["generate", path, "--task", "a", "--model", paths.model, "--max-tokens", 2, "Who?"]
    refuse = "{{ raise_exception('No') }}"
    system = f"{{% if messages[0]['content'] %}}{refuse}{{% endif %}}{CHAT_TEMPLATE}"
    for template, field, words in ((system, "system", ["--system", "Be brief"]),
                                   (refuse, "prompt", [])):  # fmt: skip
        (paths.model / "chat_template.jinja").write_text(template)
        code, out, err = command(*asks, *words)
        assert (code, out) == (2, "") and err.startswith(f"error: {field}: ")
        assert "No" in err and err.count("\n") == 1
