"""Options from YAML and command line: what is read, and which fields are at fault."""

import time
from functools import partial

import pytest
import yaml
from helpers.command import problems_of

from d2c_mlx.run.config import RunConfig, load_config, stages_of
from d2c_mlx.utils.errors import ConfigError, InputWarning

NEEDED = {"adapters": "loras", "tasks": "tasks", "output": "out"}


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


problems = partial(problems_of, load_config)


@pytest.mark.parametrize(
    ("text", "given", "expected"),
    [
        ("# nothing\n", {}, {}),
        ("seed: 7\nmerge_rank: 5\n", {"seed": 8}, {"seed": 8, "merge_rank": 5}),
        ("baselines: [&x random, *x]", {}, {"baselines": ("random", "random")}),
        ('baselines: " kmeans , random ,"', {}, {"baselines": ("kmeans", "random")}),
        ("budget: 3.0", {}, {"budget": "3.0"}),
        ("budget: 25%", {}, {"budget": "25%"}),
        ("merge_rank: null\nmodel:\n", {}, {}),
        ("clusters: c.json\nbudget: 2", {"clusters": "", "budget": "3%"}, {"budget": "3%"}),
        ("", {"seed": 2**32 - 1}, {"seed": 2**32 - 1}),
    ],
)
def test_options_over_yaml_over_defaults(tmp_path, text, given, expected):
    config = load_config(write(tmp_path, text), {**NEEDED, **given})
    assert config == RunConfig(**NEEDED, **expected)
    assert load_config(write(tmp_path, yaml.safe_dump(config.to_dict())), {}) == config


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        *(({"budget": text}, "budget") for text in ("0", "-3", "five", "10XB", "", "1,000KB")),
        ({"seed": -1}, "seed"), ({"seed": 2**32}, "seed"), ({"seed": "zero"}, "seed"),
        ({"merge_rank": 0}, "merge_rank"), ({"merge_rank": 10**12}, "merge_rank"),
        ({"merge_rank": float("nan")}, "merge_rank"), ({"probe_examples": 0}, "probe_examples"),
        ({"test_examples": -1}, "test_examples"), ({"test_examples": 1.5}, "test_examples"),
        ({"baselines": ("auto",)}, "baselines.0"), ({"baselines": 3}, "baselines"),
        ({"merge_method": "dare"}, "merge_method"), ({"search": "best"}, "search"),
        ({"format": "zip"}, "format"), ({"model": 4}, "model"), ({"output": "x" * 5000}, "output"),
        ({"adapters": ""}, "adapters"), ({"refine": "maybe"}, "refine"),
        # At odds with another option.
        ({"budget": "2", "format": "gguf"}, "format"), ({"clusters": "c.json"}, "clusters"),
        ({"refine": True, "format": "gguf"}, "refine"), ({"tasks": None, "refine": True}, "refine"),
        ({"tasks": None, "merge_method": "layerwise"}, "merge_method"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_with_its_field_and_file(tmp_path, wrong, field):
    (line,) = problems(None, {**NEEDED, **wrong})
    assert line.startswith(f"{field}: ")
    (told,) = problems(write(tmp_path, yaml.safe_dump({**NEEDED, **wrong})), {})
    assert told.startswith(f"{tmp_path / 'config.yaml'}: {field}: ")


def test_all_problems_are_told_at_once(tmp_path):
    path = write(tmp_path, "badget: 3\nseed: zero\nbaselines: 3\nmodel: 4\nrefine: true\n")
    lines = problems(path, {"merge_rank": 10**5000, "zzz": 1, "search": "x" * 5000})
    fields = {line.removeprefix(f"{path}: ").split(":")[0] for line in lines}
    wrong = {"badget", "zzz", "seed", "baselines", "model", "merge_rank", "refine", "search"}
    assert fields == {"adapters", "output", *wrong} and len(lines) == len(fields)
    assert "did you mean 'budget'" in lines[0] and max(map(len, lines)) < 500
    pytest.raises(ConfigError, RunConfig(**NEEDED).replace, seed=-1).match("seed: found -1, ")


# The largest files that are read.
MANY = 199_000
HOSTILE = {
    **dict.fromkeys(("[" * MANY, "- " * (MANY // 2), "? " * (MANY // 2)), "recursion"),
    "[" * 19 + "[]," * (MANY // 3 - 9): "not readable as YAML",
    "-\n" * (MANY // 2): "expected `key: value` lines",
    # Written out, the last of them has 2 ** 60 values.
    "a0: &a0 [1, 1]\n"
    + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)): "an alias of a list",
    "seed: " + "1:" * (MANY // 2 - 9) + "1": "not readable as YAML",
    "seed: 0x" + "f" * (MANY - 9): "not readable as YAML",
    "a: &a [*a]": "an alias of a list",
    "a: !!timestamp x": "not readable as YAML",
    'a: "\\UFFFFFFFF"': "not readable as YAML",
    "#\n" * 100_001: "more than 200,000 bytes",
    "a: [1\n": "not readable as YAML",
    "just text": "expected `key: value` lines",
    b"model: \xff\xfe\n": "not readable as YAML",
    b"a: \x00": "not readable as YAML",
}


@pytest.mark.slow
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_what_takes_a_yaml_parser_minutes_is_refused_in_seconds(tmp_path, text):
    path, began = write(tmp_path, text), time.perf_counter()
    (line,) = problems(path, NEEDED)
    # Four seconds where nothing else runs; without the limits, minutes to forever.
    assert time.perf_counter() - began < 30
    assert str(path) in line and HOSTILE[text] in line


def test_what_does_nothing_is_said_if_it_was_asked_for(tmp_path):
    for options, name, lacking in (
        ({"budget": "25%", "search": "paper"}, "search", "a number of adapters as the budget"),
        ({"tasks": None, "test_examples": 2}, "test_examples", "rows, --tasks"),
    ):
        with pytest.warns(InputWarning, match=f"{name}: .* does nothing without .*{lacking}"):
            load_config(None, {**NEEDED, **options})
        # A file may be for runs of both kinds.
        text = yaml.safe_dump({name: options.pop(name)})
        load_config(write(tmp_path, text), {**NEEDED, **options})


def test_a_run_has_the_stages_of_its_options():
    config = RunConfig(**NEEDED, budget="2")
    assert stages_of(config, "merge") == ["convert", "answer", "probe", "cluster", "merge"]
    planned = config.replace(budget="3%", tasks=None)
    assert stages_of(planned) == ["convert", "plan", "pack", "bench", "report"]
    for other, until in ((config, "plan"), (config, "refine"), (planned, "probe"), (planned, "x")):
        pytest.raises(ConfigError, stages_of, other, until).match(f"until: found '{until}'")
