"""Bad options and base models through the real command."""

import json

import huggingface_hub.constants
import pytest

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
    assert line == f"{path}: seed: found 'many', input should be a valid integer"


def test_a_key_that_is_given_twice(cli, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("seed: 1\nbudget: 1\nseed: 2\n")
    (line,) = cli.fails(path)
    assert line == f"{path}: not readable as YAML (line 3, column 1: seed is given twice; keep one)"


def test_clusters_are_read_before_anything_is_done(cli, tmp_path):
    cli.fails_with(
        f"clusters: {tmp_path / 'none.json'}: No such file", clusters=tmp_path / "none.json"
    )
    code, _, err = cli([*cli.argv(clusters=tmp_path / "none.json"), "--dry-run"])
    assert code == 2 and "clusters: " in err


def test_an_output_where_no_run_is(cli):
    code, _, err = cli(["run", "--output", str(cli.output)])
    assert code == 2 and err.count("\n") == 1
    assert f"output: {cli.output}: no run is there (config.yaml missing)" in err


def test_a_yaml_file_that_is_missing(cli, tmp_path):
    (line,) = cli.fails(tmp_path / "my.yaml")
    assert str(tmp_path / "my.yaml") in line and "No such file" in line


def test_an_option_that_is_not_given(cli):
    cli.fails_with(f"output: {cli.output}: no run is there", "--adapters", adapters=None)


def test_an_option_out_of_range(cli):
    lines = cli.fails(merge_rank=0, probe_examples=0, merge_method="dare")
    assert sorted(line.split(": found ")[0] for line in lines) == [
        "merge_method", "merge_rank", "probe_examples",
    ]  # fmt: skip


@pytest.mark.parametrize("budget", ["1", "90%"])
def test_a_rank_that_no_module_has(cli, budget):
    """Of q (32 x 32) and v (32 x 16): more would be zeros, and may be more than memory holds."""
    line = "merge_rank: found 33, expected at most 32, which no update of these modules exceeds"
    assert cli.fails(merge_rank=33, budget=budget) == [line]


def test_the_rank_of_the_widest_module(cli):
    assert cli(cli.argv(until="merge", merge_rank=32))[0] == 0


@pytest.mark.parametrize("budget", ["lots", "10 apples", "0", "-3", "2.5"])
def test_an_unreadable_budget(cli, budget):
    cli.fails_with("budget: ", repr(budget), '"12.5%", "40MB"', budget=budget)


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
    cli.fails_with("model: 'some/model'", "check the id and the network", model="some/model")
