"""Bad options and base models through the real command."""

import json
import re

import huggingface_hub.constants
import pytest
from helpers.command import NAMES
from helpers.tiny import peft_adapter

from d2c_mlx.utils.errors import InputWarning
from d2c_mlx.utils.parsing import read_yaml

# The options.


def test_an_unknown_key_in_yaml(cli, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("probe_exmples: 3\n")
    (line,) = cli.fails(path)
    assert line == f"{path}: probe_exmples: unknown key; did you mean 'probe_examples'?"


def test_a_wrong_type_in_yaml(cli, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("seed: many\n")
    (line,) = cli.fails(path)
    assert line == f"{path}: seed: found 'many', expected int"


def test_a_key_that_is_given_twice(cli, tmp_path):
    """An anchor that fills in other keys gives none of them twice."""
    path = tmp_path / "my.yaml"
    path.write_text("seed: 1\nbudget: 1\nseed: 2\n")
    (line,) = cli.fails(path)
    assert line == f"{path}: not readable as YAML (line 3, column 1: seed is given twice; keep one)"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")
    assert read_yaml(path)["b"] == {"x": 3, "y": 2}


def test_clusters_are_read_before_anything_is_done(cli, tmp_path):
    cli.fails_with(
        f"clusters: {tmp_path / 'none.json'}: No such file", clusters=tmp_path / "none.json"
    )
    code, _, err = cli([*cli.argv(clusters=tmp_path / "none.json"), "--dry-run"])
    assert code == 2 and "clusters: " in err


def test_an_output_where_no_run_is(cli):
    for command in ("run", "report", "refine"):
        code, _, err = cli([command, "--output", str(cli.output)])
        assert code == 2 and err.count("\n") == 1
        assert f"output: {cli.output}: no run is there (config.yaml missing)" in err


def test_a_yaml_file_that_is_missing(cli, tmp_path):
    (line,) = cli.fails(tmp_path / "my.yaml")
    assert str(tmp_path / "my.yaml") in line and "no such file" in line


def test_an_option_that_is_not_given(cli):
    cli.fails_with(f"output: {cli.output}: no run is there", "--adapters", adapters=None)


def test_an_option_out_of_range(cli):
    lines = cli.fails(density=2, probe_examples=0, merge_method="dare")
    assert sorted(line.split(": found ")[0] for line in lines) == [
        "density", "merge_method", "probe_examples",
    ]  # fmt: skip


@pytest.mark.parametrize("budget", ["1", "90%"])
def test_a_rank_that_no_module_has(cli, budget):
    """Of q (32 x 32) and v (32 x 16): more would be zeros, and may be more than memory holds."""
    line = "merge_rank: found 33, expected at most 32, which no update of these modules exceeds"
    assert cli.fails(merge_rank=33, budget=budget) == [line]


def test_the_rank_of_the_widest_module(cli):
    assert cli(cli.argv("merge", "--quiet", merge_rank=32))[0] == 0


def test_a_run_goes_on_with_another_kind_of_budget(cli):
    """No option can say that there is no limit any more."""
    assert cli(cli.argv("probe", "--quiet", budget="60%", max_adapters=2))[0] == 0
    again = ["cluster", "--quiet", "--output", str(cli.output), "--budget", "2"]
    code, _, err = cli([*again, "--max-adapters", "2"])
    assert code == 2 and "max_adapters: found 2, expected none unless" in err
    saved = cli.output / "config.yaml"
    with pytest.warns(InputWarning, match=f"max_adapters: 2 of {saved} does not go with the"):
        assert cli(again)[0] == 0
    assert "max_adapters: null" in saved.read_text()


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
    assert "(HF_HUB_OFFLINE is set, and it is not in the hub's cache on this machine)" in line
