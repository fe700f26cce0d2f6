"""Bad adapters through the real command."""

import json
import shutil
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from helpers.command import Q0, edit_config, edit_tensors
from mlx.utils import tree_flatten
from mlx_lm import load as stock_load
from mlx_lm.tuner.utils import linear_to_lora_layers

from d2c_mlx.adapters.reading import find_adapters, read_adapter, read_adapters
from d2c_mlx.models.model import Model
from d2c_mlx.utils.errors import InputWarning


def tensors(**changes):
    """Set tensors of an adapter; None removes one, the leaf of the first q_proj stands for it."""

    def change(directory):
        def rewrite(there):
            for name, value in changes.items():
                name = f"{Q0}.{name}.weight" if name in ("lora_A", "lora_B") else name
                if value is None:
                    del there[name]
                else:
                    there[name] = value(there.get(name)) if callable(value) else value

        return edit_tensors(directory, rewrite)

    return change


def config(**changes):
    return lambda directory: edit_config(directory, **changes)


def truncated(keep):
    def change(directory):
        path = directory / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        return path

    return change


def put(x, value):
    x = x.copy()
    x[3, 1] = value
    return x


def module(name, n_out=32):
    return {f"base_model.model.{name}.{leaf}.weight": np.ones(shape, "f2")
            for leaf, shape in (("lora_A", (4, 32)), ("lora_B", (n_out, 4)))}  # fmt: skip


FEATURES = [
    ("use_dora", True), ("bias", "all"), ("bias", "lora_only"), ("lora_bias", True),
    ("modules_to_save", ["lm_head"]), ("trainable_token_indices", [1, 2]),
    ("target_parameters", ["mlp.experts.gate_up_proj"]),
    ("layer_replication", [[0, 2], [1, 2]]), ("fan_in_fan_out", True),
    ("alora_invocation_tokens", [1, 2, 3]), ("init_lora_weights", "pissa"),
    ("init_lora_weights", "pissa_niter_16"), ("init_lora_weights", "olora"),
    ("use_qalora", True), ("use_bdlora", {"nblocks": 2}), ("frobnicate", {"by": 2}),
    ("peft_type", "LOHA"),
    *(("r", value) for value in (None, "4", 0)),
    *(("lora_alpha", value) for value in (None, "4", 0, True, -1)),
    *(("use_rslora", value) for value in ("false", "true", 1, [True])),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), FEATURES)
def test_a_field_that_is_not_taken(cli, lib, field, value):
    path = edit_config(lib.adapters / "beta", **{field: value})
    cli.fails_with(f"{path}: {field} is {value!r}")


@pytest.mark.parametrize("value", ["q_proj", [], [1], 0, False, 4, {"q_proj": "4"}])
def test_a_pattern_that_is_no_object_of_numbers(cli, lib, value):
    path = edit_config(lib.adapters / "beta", rank_pattern=value, alpha_pattern=value)
    lines = cli.fails()
    assert all(line.startswith(f"{path}: ") for line in lines)
    assert {field for field in ("rank_pattern", "alpha_pattern") for x in lines if field in x} == {
        "rank_pattern", "alpha_pattern"}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (tensors(lora_A=np.ones((4, 48), "f2")), "(48, 32)"),
        *((tensors(**module(name)), f"first: {name}") for name in (
            "model.layers.0.self_attn.nope_proj", "model.layers.7.self_attn.q_proj")),
        (tensors(**module("lm_head", 300)), "first: lm_head"),
        (tensors(lora_B=lambda x: put(x, np.nan)), "NaN"),
        (tensors(lora_B=lambda x: put(x, np.inf)), f"{Q0}.lora_B.weight"),
        (tensors(lora_B=None), "lora_B of shape None"),
        (tensors(lora_B=lambda x: x.astype(np.float64)), "F64"),
        (config(r=8), "r or rank_pattern is not the rank of 4 modules"),
        (config(lora_alpha=float("nan")), "not readable as JSON"),
        (config(lora_alpha=float("inf")), "not readable as JSON"),
        *((truncated(keep), "truncated") for keep in (0, 4, 20, -10)),
        (lambda directory: edit_tensors(directory, lambda there: there.clear()), "no tensors"),
        *((tensors(**{name: np.ones(shape, "f2")}), name) for name, shape in (
            ("base_model.model.model.embed_tokens.lora_embedding_A", (4, 300)),
            (f"{Q0}.lora_magnitude_vector", (32,)),
            (f"{Q0}.lora_magnitude_vector.weight", (32,)), (f"{Q0}.lora_B.bias", (32,)),
            (f"{Q0}.lora_A.default.weight", (4, 32)))),
    ],
)  # fmt: skip
def test_a_file_that_is_not_taken(cli, lib, change, words):
    cli.fails_with(change(lib.adapters / "beta"), words)


def test_fields_that_are_null_are_not_set(lib):
    shapes = {Q0.removeprefix("base_model.model."): (32, 32)}
    edit_tensors(lib.adapters / "beta", lambda t: [t.pop(n) for n in list(t) if Q0 not in n])
    plain = read_adapter(lib.adapters / "beta", shapes)
    edit_config(lib.adapters / "beta", rank_pattern=None, alpha_pattern=None, use_rslora=None)
    assert read_adapter(lib.adapters / "beta", shapes).digest == plain.digest


@pytest.mark.slow
def test_names_of_different_base_models_are_a_warning(cli, lib):
    """One line on standard error; the command goes on."""
    for name in ("alpha", "gamma"):
        edit_config(lib.adapters / name, base_model_name_or_path="tiny/llama-chat")
    command = [sys.executable, "-c", "from d2c_mlx_cli.main import main; main()", "convert"]
    options = ["--model", lib.model, "--adapters", lib.adapters, "--output", cli.output]
    done = subprocess.run(
        [*command, *map(str, options)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (
        0,
        "warning: adapters: found base models 'tiny/llama-chat' (alpha, gamma), 'tiny/llama'"
        " (beta), expected one; unless all are the same model, leave out what was trained on"
        " another\n",
    )
    base = Model(str(lib.model))
    with pytest.warns(InputWarning, match="found base models"):
        read_adapters(find_adapters(lib.adapters), base.module_shapes, base.config)
    # One model in other precisions is no other.
    names = ["unsloth/llama-unsloth-bnb-4bit", "mlx-community/Llama-8bit", "x/llama.Q4_K_M"]
    for name, other in zip(("alpha", "beta", "gamma"), names):
        edit_config(lib.adapters / name, base_model_name_or_path=other)
    assert len(read_adapters(find_adapters(lib.adapters), base.module_shapes, base.config)) == 3
    for name in ("alpha", "gamma"):
        edit_config(lib.adapters / name, base_model_name_or_path="tiny/llama-chat")
    # Without a name it may be of any.
    edit_config(lib.adapters / "beta", base_model_name_or_path=None)
    assert len(read_adapters(find_adapters(lib.adapters), base.module_shapes, base.config)) == 3


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
