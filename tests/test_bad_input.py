"""Bad input through the real command: exit code 2, a message that helps, nothing written."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import mlx.core as mx
import numpy as np
import pytest
from d2c_mlx_cli.main import main
from mlx.utils import tree_flatten
from mlx_lm import load as stock_load
from mlx_lm.tuner.utils import linear_to_lora_layers
from safetensors.numpy import load_file, save_file
from tiny import Library, library, peft_adapter, task

NAMES = ("alpha", "beta", "gamma")
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("library")
    library(root, NAMES)
    return root


@pytest.fixture
def lib(pristine, tmp_path):
    root = tmp_path / "in"
    shutil.copytree(pristine, root)
    return Library(root / "model", root / "adapters", root / "tasks")


class Command:
    """The command line on one library; options are replaced by name, None leaves one out."""

    def __init__(self, lib, root, monkeypatch, capsys):
        self.lib, self.root, self.monkeypatch, self.capsys = lib, root, monkeypatch, capsys
        self.output = root / "runs" / "out"

    def argv(self, command="run", *arguments, **options):
        values = {
            "model": self.lib.model,
            "adapters": self.lib.adapters,
            "tasks": self.lib.tasks,
            "budget": "1",
            "output": self.output,
            **options,
        }
        pairs = [(f"--{k.replace('_', '-')}", str(v)) for k, v in values.items() if v is not None]
        return [command, *map(str, arguments), *(part for pair in pairs for part in pair)]

    def files(self):
        # The lock of the cache of converted models stays.
        return {p for p in self.root.rglob("*") if p.is_file() and p.name != ".lock"}

    def __call__(self, argv):
        """Exit code, standard output and standard error. Any other exception is a traceback."""
        self.monkeypatch.setattr(sys, "argv", ["d2c-mlx", *argv])
        self.capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        return code, *self.capsys.readouterr()

    def fails(self, *arguments, **options):
        """The error lines of a `run` that must be refused."""
        before = self.files()
        code, out, err = self(self.argv("run", "--quiet", *arguments, **options))
        assert code == 2, err
        assert "Traceback" not in err
        assert out == ""
        assert not self.output.exists()
        assert self.files() == before
        lines = err.splitlines()
        assert lines and all(line.startswith("error: ") for line in lines), err
        return [line.removeprefix("error: ") for line in lines]

    def fails_with(self, *parts, **options):
        """The only error line; it must hold every one of `parts`."""
        (line,) = self.fails(**options)
        for part in parts:
            assert str(part) in line
        return line


@pytest.fixture
def cli(lib, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / "cache"))
    return Command(lib, tmp_path, monkeypatch, capsys)


def edit_tensors(directory, change):
    """Rewrite an adapter's tensors after `change` worked on the dictionary of them."""
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def edit_config(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


# The library itself is good: what the cases below refuse is what they changed.


def test_the_untouched_library_runs(cli):
    code, out, err = cli(cli.argv("pack", "--quiet", "--json"))
    assert (code, err) == (0, "")
    assert json.loads(out)["tasks"] == dict.fromkeys(NAMES, "cluster-0")


def test_convert_is_refused_in_the_same_words(cli, lib):
    path = edit_config(lib.adapters / "beta", use_dora=True)
    refused = cli.fails_with(path, "use_dora")
    argv = ["convert", "--model", lib.model, "--adapters", lib.adapters, "--output", cli.output]
    code, out, err = cli(list(map(str, argv)))
    assert (code, out, err) == (2, "", f"error: {refused}\n")
    assert not cli.output.exists()


def test_a_real_process_prints_no_traceback(cli, lib):
    path = edit_config(lib.adapters / "beta", use_dora=True)
    command = [sys.executable, "-c", "from d2c_mlx_cli.main import main; main()", *cli.argv()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert f"error: {path}: use_dora is True" in done.stderr
    assert not cli.output.exists()


# Which files there are.


def test_no_adapters_in_the_folder(cli, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README").write_text("no directory")
    (tmp_path / "empty" / ".hidden").mkdir()
    parts = (tmp_path / "empty", "no adapters", "adapter_model.safetensors", "adapters.safetensors")
    cli.fails_with(*parts, adapters=tmp_path / "empty")


def test_no_folder_of_adapters(cli, tmp_path):
    cli.fails_with(tmp_path / "nope", "no such directory", "--adapters", adapters=tmp_path / "nope")


def test_a_folder_of_adapters_that_is_a_file(cli, tmp_path):
    (tmp_path / "file").write_text("x")
    cli.fails_with(tmp_path / "file", adapters=tmp_path / "file")


def test_a_directory_without_weights(cli, lib):
    (lib.adapters / "delta").mkdir()
    task(lib.tasks, "delta")
    cli.fails_with(lib.adapters / "delta", "no adapter weights", "adapter_model.safetensors")


def test_an_adapter_without_config(cli, lib):
    path = lib.adapters / "beta" / "adapter_config.json"
    path.unlink()
    assert any(str(path) in line and "missing" in line for line in cli.fails())


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b""])
def test_an_adapter_config_that_is_no_json_object(cli, lib, content):
    path = lib.adapters / "beta" / "adapter_config.json"
    path.write_bytes(content)
    cli.fails_with(path, "JSON")


def test_a_pickle_is_never_loaded(cli, lib):
    path = lib.adapters / "beta" / "adapter_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    cli.fails_with(path.with_suffix(".bin"), "safe_serialization=True")


def test_both_layouts_in_one_directory(cli, lib):
    directory = lib.adapters / "beta"
    shutil.copyfile(directory / "adapter_model.safetensors", directory / "adapters.safetensors")
    cli.fails_with(directory, "adapter_model.safetensors", "adapters.safetensors", "keep one")


def test_no_folder_of_tasks(cli, tmp_path):
    cli.fails_with(tmp_path / "nope", "no such directory", "--tasks", tasks=tmp_path / "nope")


def test_no_task_for_an_adapter(cli, lib):
    shutil.rmtree(lib.tasks / "beta")
    lines = cli.fails()
    assert [line.split(": ")[0] for line in lines] == [
        str(lib.tasks / "beta" / name) for name in ("probe.jsonl", "test.jsonl")
    ]
    assert all("missing" in line for line in lines)


@pytest.mark.parametrize("name", ["probe.jsonl", "test.jsonl"])
def test_one_file_of_a_task_is_missing(cli, lib, name):
    (lib.tasks / "beta" / name).unlink()
    cli.fails_with(lib.tasks / "beta" / name, "missing")


# What is in the tasks.


def test_a_malformed_json_line(cli, lib):
    path = lib.tasks / "beta" / "probe.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "", '{"prompt": "x", ', *lines[1:]]))
    cli.fails_with(f"{path}:3: not JSON")


def test_rows_shared_by_probe_and_test(cli, lib):
    probe, test = (lib.tasks / "beta" / name for name in ("probe.jsonl", "test.jsonl"))
    rows = test.read_text().splitlines() + probe.read_text().splitlines()[:2]
    test.write_text("\n".join(rows))
    cli.fails_with(f"{test}:5: ", "probe.jsonl", "2 such rows", "disjoint")


def test_a_row_in_another_format(cli, lib):
    path = lib.tasks / "beta" / "test.jsonl"
    path.write_text('{"question": "x", "answer": "y"}\n')
    cli.fails_with(f"{path}:1: ", "['answer', 'question']", '"prompt" and "completion"')


def test_a_task_that_is_no_utf_8(cli, lib):
    path = lib.tasks / "beta" / "test.jsonl"
    path.write_bytes('{"prompt": "ä", "completion": "y"}\n'.encode("latin-1"))
    cli.fails_with(path)


def test_a_chat_that_is_only_an_answer(cli, lib):
    path = lib.tasks / "beta" / "probe.jsonl"
    path.write_text('{"messages": [{"role": "assistant", "content": "y"}]}\n')
    code, _, err = cli(cli.argv("probe", "--quiet"))
    # It may be evaluated (nothing is masked) or refused, but never be a traceback.
    assert code == 0 or (code == 2 and "beta" in err and not cli.output.exists())


def test_a_test_row_without_target_is_refused_before_anything_is_written(cli, lib):
    rows = [{"text": "A question."}, {"text": "<|im_end|>"}]
    (lib.tasks / "beta" / "probe.jsonl").write_text('{"text": "An answer."}\n')
    (lib.tasks / "beta" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cli.fails_with("beta", "row 2", "no target token")


# What is in the adapters.


def test_an_adapter_for_another_base(cli, lib):
    def change(tensors):
        tensors[f"{Q0}.lora_A.weight"] = np.ones((4, 48), np.float16)

    path = edit_tensors(lib.adapters / "beta", change)
    cli.fails_with(path, "model.layers.0.self_attn.q_proj", "(48, 32)", "(32, 32)", "tiny/llama")


@pytest.mark.parametrize(
    "module",
    ["model.layers.0.self_attn.nope_proj", "model.layers.7.self_attn.q_proj", "lm_head"],
)
def test_an_unknown_module(cli, lib, module):
    def change(tensors):
        for leaf in ("lora_A", "lora_B"):
            x = tensors[f"{Q0}.{leaf}.weight"].copy()
            tensors[f"base_model.model.{module}.{leaf}.weight"] = x

    path = edit_tensors(lib.adapters / "beta", change)
    cli.fails_with(path, f"first: {module}", "1 module")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(cli, lib, value):
    def change(tensors):
        tensors[f"{Q0}.lora_B.weight"][3, 1] = value

    path = edit_tensors(lib.adapters / "beta", change)
    cli.fails_with(path, f"{Q0}.lora_B.weight", "1 tensor", "NaN")


def test_a_missing_factor(cli, lib):
    path = edit_tensors(lib.adapters / "beta", lambda t: t.pop(f"{Q0}.lora_B.weight"))
    cli.fails_with(path, "model.layers.0.self_attn.q_proj has no lora_B")


def test_another_rank_than_the_config_says(cli, lib):
    path = edit_config(lib.adapters / "beta", r=8)
    lines = cli.fails()
    assert all(str(path) in line and "rank 4" in line and "8" in line for line in lines)


@pytest.mark.parametrize(
    "field, value",
    [
        *(("r", value) for value in (None, "4", 0)),
        *(("lora_alpha", value) for value in (None, "4", 0, True, -1)),
    ],
)
def test_rank_and_alpha_are_numbers_above_zero(cli, lib, field, value):
    path = edit_config(lib.adapters / "beta", **{field: value})
    cli.fails_with(f"{path}: {field} is {value!r}", "expected a number above 0")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_does_not_have(cli, lib, value):
    path = edit_config(lib.adapters / "beta", lora_alpha=value)
    cli.fails_with(path, "is no JSON")


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_value_that_is_no_number(cli, lib, field):
    path = edit_config(lib.adapters / "beta", **{field: {"q_proj": "4"}})
    assert all(str(path) in line and field in line for line in cli.fails())


FEATURES = [
    ("use_dora", True),
    ("bias", "all"),
    ("bias", "lora_only"),
    ("lora_bias", True),
    ("modules_to_save", ["lm_head"]),
    ("trainable_token_indices", [1, 2]),
    ("target_parameters", ["mlp.experts.gate_up_proj"]),
    ("layer_replication", [[0, 2], [1, 2]]),
    ("fan_in_fan_out", True),
    ("alora_invocation_tokens", [1, 2, 3]),
    ("init_lora_weights", "pissa"),
    ("init_lora_weights", "pissa_niter_16"),
    ("init_lora_weights", "olora"),
    ("use_qalora", True),
    ("use_bdlora", {"nblocks": 2}),
    ("frobnicate", {"by": 2}),
    ("peft_type", "LOHA"),
]


@pytest.mark.parametrize("field, value", FEATURES)
def test_an_unsupported_peft_feature(cli, lib, field, value):
    path = edit_config(lib.adapters / "beta", **{field: value})
    cli.fails_with(f"{path}: {field} is {value!r}")


@pytest.mark.parametrize(
    "name, shape",
    [
        ("base_model.model.model.embed_tokens.lora_embedding_A", (4, 300)),
        (f"{Q0}.lora_magnitude_vector", (32,)),
        (f"{Q0}.lora_magnitude_vector.weight", (32,)),
        (f"{Q0}.lora_B.bias", (32,)),
        ("base_model.model.lm_head.weight", (300, 32)),
        (f"{Q0}.lora_A.default.weight", (4, 32)),
    ],
)
def test_an_unsupported_peft_tensor(cli, lib, name, shape):
    path = edit_tensors(lib.adapters / "beta", lambda t: t.update({name: np.ones(shape, "f2")}))
    cli.fails_with(path, name, str(shape), "<module>.lora_A.weight")


def test_a_dora_of_mlx_lm(cli, lib):
    """As mlx-lm itself makes and saves one."""
    model, _ = stock_load(str(lib.model))
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": 0.0}, use_dora=True)
    directory = lib.adapters / "beta"
    shutil.rmtree(directory)
    directory.mkdir()
    tensors = dict(tree_flatten(model.trainable_parameters()))
    assert any(name.endswith(".m") for name in tensors)
    mx.save_safetensors(str(directory / "adapters.safetensors"), tensors)
    config = {
        "fine_tune_type": "dora",
        "num_layers": 2,
        "lora_parameters": {"rank": 4, "scale": 2.0},
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    where = directory / "adapter_config.json"
    cli.fails_with(f"{where}: fine_tune_type is 'dora'", "scales each row", "no low-rank addition")


@pytest.mark.parametrize("keep", [0, 4, 20, -10])
def test_truncated_weights(cli, lib, keep):
    path = lib.adapters / "beta" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    cli.fails_with(path, "truncated")


def test_weights_without_a_tensor(cli, lib):
    path = edit_tensors(lib.adapters / "beta", lambda tensors: tensors.clear())
    cli.fails_with(path, "no tensors")


# The options.


def test_an_unknown_key_in_yaml(cli, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("probe_exmples: 3\n")
    (line,) = cli.fails(path)
    assert line == f"{path}: probe_exmples: unknown key; did you mean 'probe_examples'?"


def test_a_wrong_type_in_yaml(cli, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("rounds: many\n")
    (line,) = cli.fails(path)
    assert line == f"{path}: rounds: found 'many', expected int"


def test_a_yaml_file_that_is_missing(cli, tmp_path):
    (line,) = cli.fails(tmp_path / "my.yaml")
    assert str(tmp_path / "my.yaml") in line and "no such file" in line


def test_an_option_that_is_not_given(cli):
    cli.fails_with("tasks: not given", "--tasks", tasks=None)


def test_an_option_out_of_range(cli):
    lines = cli.fails(density=2, probe_examples=0, merge_method="dare")
    assert sorted(line.split(": found ")[0] for line in lines) == [
        "density", "merge_method", "probe_examples",
    ]  # fmt: skip


@pytest.mark.parametrize("budget", ["lots", "10 apples", "0", "-3", "2.5"])
def test_an_unreadable_budget(cli, budget):
    cli.fails_with("budget: ", repr(budget), '"12.5%", "40MB"', budget=budget)


@pytest.mark.parametrize("budget", ["1%", "100B"])
def test_a_budget_too_small_for_one_adapter(cli, budget):
    line = cli.fails_with(
        f"budget: {budget} is ", "one merged adapter takes", budget=budget, plan="d2c"
    )
    (needed,) = re.findall(r"takes ([0-9,]+)", line)
    assert int(needed.replace(",", "")) > 1000


@pytest.mark.parametrize("ranks", [(4, 4, 4), (4, 8, 16), (64, 64, 64)])
def test_the_budget_that_the_message_names_works(cli, lib, ranks):
    for name, rank in zip(NAMES, ranks, strict=True):
        peft_adapter(lib.adapters, name, rank=rank)
    line = cli.fails_with("give at least", budget="1B", plan="d2c")
    offers = re.findall(r"[0-9][0-9.,]*(?:%|[KMG]?B)", line.split("give at least")[1])
    assert len(offers) == 2
    for offer in offers:
        code, _, err = cli(cli.argv("probe", "--quiet", budget=offer, plan="d2c"))
        assert (code, err) == (0, ""), offer


def test_an_unknown_option(cli):
    before = cli.files()
    code, out, err = cli([*cli.argv(), "--bugdet", "3"])
    assert (code, out) == (2, "")
    assert "--bugdet" in err and "--budget" in err and "Traceback" not in err
    assert cli.files() == before


def test_an_unknown_command(cli):
    code, out, err = cli(["runn"])
    assert (code, out) == (2, "")
    assert "runn" in err and "Traceback" not in err


def test_an_output_that_is_a_file(cli, tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    (line,) = cli.fails(output=path)
    assert str(path) in line and path.read_text() == "mine"


# The base model.


@pytest.mark.parametrize("model", ["not a model", "nomodel", "a/b/c", "/no/such/model"])
def test_a_model_that_is_no_path_and_no_id(cli, model):
    cli.fails_with("model", repr(model), ".gguf", "Hugging Face id", model=model)


def test_a_model_directory_without_config(cli, lib):
    (lib.model / "config.json").unlink()
    cli.fails_with(lib.model, "no config.json")


def test_a_model_directory_without_weights(cli, lib):
    (lib.model / "model.safetensors").unlink()
    cli.fails_with(lib.model)


@pytest.mark.parametrize("keep", [0, 20, -100])
def test_a_model_with_truncated_weights(cli, lib, keep):
    path = lib.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    cli.fails_with(lib.model)


def test_a_model_without_tokenizer(cli, lib):
    for path in lib.model.glob("token*.json"):
        path.unlink()
    cli.fails_with(lib.model)


@pytest.mark.parametrize(
    "change", [{"model_type": None}, {"model_type": "abacus"}, {"hidden_size": None}]
)
def test_a_model_config_that_mlx_lm_does_not_know(cli, lib, change):
    path = lib.model / "config.json"
    config = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    cli.fails_with(lib.model)


def test_a_model_config_that_is_no_json(cli, lib):
    (lib.model / "config.json").write_text("{")
    cli.fails_with(lib.model)


def test_a_gguf_that_does_not_exist(cli, tmp_path):
    cli.fails_with(tmp_path / "no.gguf", "no such file", model=tmp_path / "no.gguf")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        bytes(range(256)) * 16,
        b"GGUF" + (3).to_bytes(4, "little") + bytes(16),
        b"GGUF" + (3).to_bytes(4, "little") + (5).to_bytes(8, "little") * 2,
    ],
    ids=["empty", "magic", "garbage", "no-metadata", "truncated"],
)
def test_a_gguf_full_of_garbage(cli, tmp_path, content):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    cli.fails_with(path, model=path)


def test_a_hub_id_without_network(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    line = cli.fails_with("model: 'some/model'", "check the id and the network", model="some/model")
    assert "LocalEntryNotFoundError" in line or "OfflineModeIsEnabled" in line


# Several at once.


def test_the_problems_of_all_inputs_at_once(cli, lib):
    def change(tensors):
        tensors[f"{Q0}.lora_A.weight"][0, 0] = np.nan

    alpha = edit_config(lib.adapters / "alpha", use_dora=True, lora_bias=True)
    beta = edit_tensors(lib.adapters / "beta", change)
    gamma = lib.tasks / "gamma" / "test.jsonl"
    gamma.write_text("oops\n")
    lines = cli.fails()
    expected = [
        (alpha, "use_dora"),
        (alpha, "lora_bias"),
        (beta, "NaN"),
        (f"{gamma}:1", "not JSON"),
    ]
    assert len(lines) == len(expected)
    for where, what in expected:
        assert any(line.startswith(f"{where}: ") and what in line for line in lines)


def test_the_problems_of_one_adapter_at_once(cli, lib):
    def change(tensors):
        del tensors[f"{Q0}.lora_B.weight"]
        tensors["base_model.model.lm_head.weight"] = np.ones((300, 32), np.float16)

    path = edit_config(lib.adapters / "beta", use_dora=True, bias="all", r=None)
    weights = edit_tensors(lib.adapters / "beta", change)
    lines = cli.fails()
    assert len(lines) == 5
    assert sum(line.startswith(f"{path}: ") for line in lines) == 3
    assert sum(line.startswith(f"{weights}: ") for line in lines) == 2


# Exit codes of commands that are no input error.


def test_doctor_exits_with_1_if_something_is_not_well(cli, monkeypatch):
    from d2c_mlx import doctor

    bad = [doctor.Finding("x", "y", False, "do z")]
    monkeypatch.setattr(doctor, "diagnose", lambda: bad)
    code, out, _ = cli(["doctor"])
    assert "do z" in out
    assert code == 1


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["run", "--help"]])
def test_help_exits_with_0(cli, argv):
    code, out, err = cli(argv)
    assert code == 0 and out and err == ""


def test_paths_may_be_relative(cli, lib, monkeypatch):
    monkeypatch.chdir(lib.model.parent)
    (line,) = cli.fails(adapters=Path("nope"), tasks="tasks", model="model")
    assert line.startswith("nope: no such directory")
