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

from d2c_mlx.adapters.reading import read_adapter, read_adapters
from d2c_mlx.adapters.sources import find_adapters
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.utils.errors import InputWarning


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
    cli.fails_with(
        path,
        "model.layers.0.self_attn.q_proj",
        "lora_B of shape None",
    )


def test_another_rank_than_the_config_says(cli, lib):
    path = edit_config(lib.adapters / "beta", r=8)
    n = "r or rank_pattern is not the rank of 4 modules"
    cli.fails_with(f"{path}: {n}", "q_proj has rank 4, expected 8); set them to the ranks")


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
    cli.fails_with(path, "not readable as JSON")


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_value_that_is_no_number(cli, lib, field):
    path = edit_config(lib.adapters / "beta", **{field: {"q_proj": "4"}})
    assert all(str(path) in line and field in line for line in cli.fails())


@pytest.mark.parametrize("value", ["q_proj", [], [1], 0, False, 4])
def test_a_pattern_that_is_no_object(cli, lib, value):
    path = edit_config(lib.adapters / "beta", rank_pattern=value, alpha_pattern=value)
    assert cli.fails() == [
        f"{path}: {field} is {value!r}, expected an object of numbers above 0 by module, or null"
        for field in ("rank_pattern", "alpha_pattern")
    ]


@pytest.mark.parametrize("value", ["false", "true", 1, [True]])
def test_use_rslora_is_true_or_false(cli, lib, value):
    path = edit_config(lib.adapters / "beta", use_rslora=value)
    cli.fails_with(f"{path}: use_rslora is {value!r}, expected true or false")


def test_fields_that_are_null_are_not_set(lib):
    shapes = {Q0.removeprefix("base_model.model."): (32, 32)}
    edit_tensors(lib.adapters / "beta", lambda t: [t.pop(n) for n in list(t) if Q0 not in n])
    plain = read_adapter(lib.adapters / "beta", shapes)
    edit_config(lib.adapters / "beta", rank_pattern=None, alpha_pattern=None, use_rslora=None)
    assert read_adapter(lib.adapters / "beta", shapes).digest == plain.digest


def test_weights_in_float64(cli, lib):
    def change(tensors):
        tensors[f"{Q0}.lora_B.weight"] = tensors[f"{Q0}.lora_B.weight"].astype(np.float64)

    path = edit_tensors(lib.adapters / "beta", change)
    assert cli.fails() == [
        f"{path}: 1 tensors are no floating point numbers that MLX has (first:"
        f" {Q0}.lora_B.weight, F64); save the adapter in float16, bfloat16 or float32"
    ]


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
    base = BaseModel(str(lib.model))
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
