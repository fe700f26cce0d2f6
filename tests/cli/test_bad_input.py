"""Bad input through the real command: exit code 2, a line that names it, nothing written.

The library itself is good: what a case refuses is what it changed.
"""

import json
import shutil

import huggingface_hub.constants
import numpy as np
import pytest
from helpers.command import NAMES, Q0, edit_config, edit_tensors
from helpers.tiny import edit_json, task

from d2c_mlx.models.tasks import load_task
from d2c_mlx.utils.errors import InputWarning

A, B = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


# What is refused: changes of a directory, which is that of an adapter, its rows or the base model.


def config(**changes):
    return lambda directory: edit_config(directory, **changes)


def tensors(changes):
    """Set tensors of an adapter; None removes one, and a function changes it."""

    def rewrite(there):
        for name, value in changes.items():
            if value is None:
                del there[name]
            else:
                there[name] = value(there[name].copy()) if callable(value) else value

    return lambda directory: edit_tensors(directory, rewrite)


def file(name, content):
    """Write a file; None removes it, a number cuts it there, a text follows what is there."""

    def change(directory):
        for path in directory.glob(name) if "*" in name else [directory / name]:
            if content is None:
                path.unlink()
            elif isinstance(content, bytes):
                path.write_bytes(content)
            elif isinstance(content, str):
                path.write_text(path.read_text() + content)
            else:
                path.write_bytes(path.read_bytes()[:content])

    return change


def values(name, **changes):
    """Set values in a JSON file."""
    return lambda directory: edit_json(directory / name, **changes)


def put(value):
    def change(x):
        x[3, 1] = value
        return x

    return tensors({B: change})


def module(name, n_out=32):
    key = f"base_model.model.{name}"
    shapes = {f"{key}.lora_A.weight": (4, 32), f"{key}.lora_B.weight": (n_out, 4)}
    return tensors({name: np.ones(shape, "f2") for name, shape in shapes.items()})


ADAPTERS = [
    *((f"{CONFIG}: {field} is {value!r}", config(**{field: value})) for field, value in (
        ("use_dora", True), ("bias", "all"), ("bias", "lora_only"), ("lora_bias", True),
        ("modules_to_save", ["lm_head"]), ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]), ("fan_in_fan_out", True),
        ("layer_replication", [[0, 2], [1, 2]]), ("alora_invocation_tokens", [1, 2, 3]),
        ("init_lora_weights", "pissa"), ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"), ("use_qalora", True), ("use_bdlora", {"nblocks": 2}),
        ("frobnicate", {"by": 2}), ("peft_type", "LOHA"), ("r", None), ("r", "4"), ("r", 0),
        ("lora_alpha", None), ("lora_alpha", "4"), ("lora_alpha", True), ("lora_alpha", -1),
        ("use_rslora", "false"), ("use_rslora", 1), ("use_rslora", [True]))),
    *((f"{CONFIG}: {name}", config(**{name: value})) for name in ("rank_pattern", "alpha_pattern")
      for value in ("q_proj", [], [1], 0, False, 4, {"q_proj": "4"})),
    ("r or rank_pattern is not the rank of 4 modules", config(r=8)),
    *((CONFIG, config(lora_alpha=float(x))) for x in ("nan", "inf")),
    *((CONFIG, file(CONFIG, content)) for content in (None, b"{", b"[]", b"\xff\xfe")),
    ("(48, 32)", tensors({A: np.ones((4, 48), "f2")})),
    *((f"first: {name}", module(name)) for name in (
        "model.layers.0.self_attn.nope_proj", "model.layers.7.self_attn.q_proj")),
    ("first: lm_head", module("lm_head", 300)),
    ("NaN", put(np.nan)), (B, put(np.inf)),
    ("lora_B of shape None", tensors({B: None})),
    ("F64", tensors({B: lambda x: x.astype(np.float64)})),
    *(("truncated", file(WEIGHTS, keep)) for keep in (0, 4, 20, -10)),
    ("no tensors", lambda directory: edit_tensors(directory, lambda there: there.clear())),
    *((name, tensors({name: np.ones(shape, "f2")})) for name, shape in (
        ("base_model.model.model.embed_tokens.lora_embedding_A", (4, 300)),
        (f"{Q0}.lora_magnitude_vector", (32,)), (f"{Q0}.lora_magnitude_vector.weight", (32,)),
        (f"{Q0}.lora_B.bias", (32,)), (f"{Q0}.lora_A.default.weight", (4, 32)))),
]  # fmt: skip


def test_each_of_many_bad_adapters_is_named_in_one_line(cli, lib):
    """What is wrong with rows: models/test_tasks.py."""
    for i, (_, change) in enumerate(ADAPTERS):
        for path in (lib.adapters, lib.tasks):
            shutil.copytree(path / "beta", path / f"bad-{i:02}")
        change(lib.adapters / f"bad-{i:02}")
    lines = cli.fails()
    assert len(lines) == len(ADAPTERS)
    for i, (words, _) in enumerate(ADAPTERS):
        (line,) = (line for line in lines if line.startswith(f"{lib.adapters / f'bad-{i:02}'}"))
        assert words in line


def without_weights(root):
    task(root / "tasks", "delta")
    (root / "adapters" / "delta").mkdir()


def below(folder, change):
    """A change of one folder of the library."""
    return lambda root: change(root / folder)


# A change of the library, options, and what the only line has.
COMMANDS = [
    (without_weights, {}, ["adapters/delta", "no adapter weights"]),
    (below("adapters/beta", lambda path: (path / WEIGHTS).rename(path / "adapter_model.bin")), {},
     ["adapters/beta", "safe_serialization=True"]),
    (below("adapters/beta", file("adapters.safetensors", b"")), {}, ["adapters/beta", "keep one"]),
    (lambda root: (root / "tasks/beta").rename(root / "tasks/beta_task"), {},
     ["tasks/beta: missing; found beta_task", "--adapters NAME=PATH/beta"]),
    (None, {"adapters": "none"}, ["none: no such directory", "--adapters"]),
    (None, {"tasks": "none"}, ["none", "--tasks"]),
    (file("my.yaml", b"x"), {"adapters": "my.yaml"}, ["my.yaml"]),
    (lambda root: (root / "e" / ".h").mkdir(parents=True), {"adapters": "e"}, ["no adapters"]),
    (None, {"adapters": "adapters/*"}, ["adapters/*: ", "without *"]),
    # Options, of the command line and of a file.
    (file("my.yaml", b"probe_exmples: 3"), {"file": True}, ["did you mean 'probe_examples"]),
    (file("my.yaml", b"seed: many"), {"file": True}, ["my.yaml: seed: found 'many'"]),
    (file("my.yaml", b"seed: 1\nseed: 2"), {"file": True}, ["line 2", "seed is given twice"]),
    (None, {"file": True}, ["my.yaml", "No such file"]),
    # A folder in place of a file.
    (lambda root: (root / "my.yaml").mkdir(), {"file": True}, ["earlier run --output DIR"]),
    (None, {"clusters": "none.json"}, ["clusters: none.json: No such file"]),
    (None, {"adapters": None}, ["output: ", "no run is there (config.yaml missing)"]),
    (file("my.yaml", b"mine"), {"output": "my.yaml"}, ["output: my.yaml is a file"]),
    # Of q (32 x 32) and v (32 x 16): more would be zeros, and may be more than memory holds.
    (None, {"merge_rank": 33}, ["merge_rank: found 33, expected at most 32"]),
    (None, {"merge_rank": 33, "budget": "90%"}, ["merge_rank: found 33, expected at most 32"]),
    *((None, {"budget": budget}, ["budget: ", repr(budget), '"12.5%", "40MB"'])
      for budget in ("lots", "10 apples", "0", "-3", "2.5")),
    # The base model.
    *((None, {"model": name}, ["model", repr(name), ".gguf", "Hugging Face id"])
      for name in ("not a model", "nomodel", "a/b/c", "/no/such/model")),
    (below("model", file("config.json", None)), {}, ["model: ", "no config.json"]),
    (below("model", file("config.json", b"{")), {}, ["model: "]),
    *((below("model", values(name, **change)), {}, ["model: "]) for name, change in (
        ("config.json", {"num_attention_heads": 0}), ("config.json", {"rope_scaling": 5}),
        ("config.json", {"vocab_size": -1}),
        ("tokenizer_config.json", {"tool_parser_type": "nope"}))),
    (below("model", file("tokenizer_config.json", b"null")), {}, ["model: "]),
    (below("model", file("model.safetensors", None)), {}, ["model: "]),
    (below("model", file("model.safetensors", -100)), {}, ["model: "]),
    (below("model", file("token*.json", None)), {}, ["model: "]),
    (None, {"model": "no.gguf"}, ["no.gguf", "no such file"]),
    (file("x.gguf", b"GGUF"), {"model": "x.gguf"}, ["x.gguf"]),
    (None, {"model": "some/model"}, ["model: 'some/model'", "check the id and the network"]),
]  # fmt: skip


@pytest.mark.parametrize(("change", "options", "words"), COMMANDS)
def test_what_is_wrong_is_named_in_one_line(cli, lib, monkeypatch, change, options, words):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cli.root / "hub"))
    monkeypatch.chdir(lib.model.parent)
    if change:
        change(lib.model.parent)
    paths = {"model": "model", "adapters": "adapters", "tasks": "tasks", **options}
    arguments = ["my.yaml"] if paths.pop("file", False) else []
    (line,) = cli.fails(*arguments, **paths)
    assert all(word in line for word in words)


def test_the_problems_of_all_inputs_at_once(cli, lib):
    alpha = edit_config(lib.adapters / "alpha", use_dora=True, lora_bias=True)
    put(np.nan)(lib.adapters / "beta")
    beta, rows = lib.adapters / "beta" / WEIGHTS, lib.tasks / "gamma"
    (rows / "probe.jsonl").write_text('{"a": 1}\n{"prompt": "x", "completion": "y"}\noops\n')
    (rows / "test.jsonl").write_text("")
    shutil.rmtree(lib.tasks / "beta")
    lines = cli.fails()
    wrong = ("gamma/probe.jsonl:1", "gamma/probe.jsonl:3", "gamma/test.jsonl",
             "beta/probe.jsonl", "beta/test.jsonl")  # fmt: skip
    places = [f"{alpha}: use_dora", f"{alpha}: lora_bias", *(f"{lib.tasks}/{x}" for x in wrong)]
    for place in (*places, str(beta)):
        assert len([line for line in lines if line.startswith(place)]) == 1
    assert len(lines) == 8
    # Another command says the same.
    code, out, err = cli(cli.argv("convert", budget=None, tasks=None))
    assert (code, out) == (2, "") and not cli.output.exists()
    assert err.splitlines() == [f"error: {line}" for line in lines if str(lib.adapters) in line]


def test_rows_of_all_tasks_that_cannot_be_tokenized_at_once(cli, lib):
    """By file and line, blank ones counted."""
    alpha, beta, gamma = (lib.tasks / name / "test.jsonl" for name in NAMES)
    template = lib.model / "chat_template.jinja"
    check = "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('a bad word') }}"
    template.write_text(f"{check}{{% endif %}}{{% endfor %}}{template.read_text()}")
    for path, content in ((alpha, "bad"), (gamma, "x " * 600)):
        row = json.dumps({"prompt": content, "completion": "y"})
        path.write_text(f"\n{row}\n{path.read_text()}")
    (beta.parent / "probe.jsonl").write_text('{"text": "An answer."}\n')
    beta.write_text('\n\n{"text": "A question."}\n\n{"text": "<|im_end|>"}\n')
    first, second, third = cli.fails()
    assert first.startswith(f"{alpha}:2: ") and "a bad word" in first
    assert second.startswith(f"{beta}:5 has no target token")
    assert third.startswith(f"{gamma}:2 ") and "at most 512" in third


def test_rows_as_mlx_lm_has_them_and_those_of_no_adapter(cli, lib):
    """`valid.jsonl` are the calibration rows; `probe.jsonl` goes before it."""
    beta = lib.tasks / "beta"
    shutil.copyfile(beta / "probe.jsonl", beta / "valid.jsonl")
    expected = load_task(beta)
    (beta / "probe.jsonl").unlink()
    rows = load_task(beta)
    assert rows == expected and rows.probe[0].place.startswith(str(beta / "valid.jsonl"))
    task(lib.tasks, "delta")
    with pytest.warns(InputWarning, match="tasks: no adapter is called delta, so these rows are"):
        code, _, err = cli(cli.argv(until="pack", merge_rank=32))  # as the widest module has
    assert (code, err) == (0, "")
    manifest = json.loads((cli.output / "pack" / "manifest.json").read_text())
    assert manifest["tasks"] == dict.fromkeys(NAMES, "cluster-0")


def test_bad_adapters_are_left_out_if_asked(cli, lib):
    """One that cannot be read and one without rows are listed; without the option they end it."""
    (lib.adapters / "beta" / CONFIG).unlink()
    shutil.rmtree(lib.tasks / "gamma")
    assert len(cli.fails()) == 3
    with pytest.warns(InputWarning, match=r"skip_bad: left out 2 of 3: beta \(.*missing.*; gamma"):
        code, out, _ = cli([*cli.argv(until="pack"), "--skip-bad"])
    assert code == 0 and "1 adapters for 1 tasks" in cli(["verify", str(cli.output)])[1]
