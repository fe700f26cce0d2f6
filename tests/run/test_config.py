import time

import pytest
import yaml

from d2c_mlx.run.config import RunConfig, load_config
from d2c_mlx.utils.errors import ConfigError, InputWarning

NEEDED = {"adapters": "loras", "tasks": "tasks", "output": "out"}
REQUIRED = ("adapters", "output")


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(path, overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value.problems


def test_overrides_over_yaml_over_defaults(tmp_path):
    path = write(tmp_path, "adapters: a\ntasks: t\noutput: o\nseed: 7\nmerge_rank: 5\n")
    config = load_config(path, {"seed": 8, "output": "other"})
    assert config == RunConfig(
        adapters="a",
        tasks="t",
        output="other",
        seed=8,
        merge_rank=5,
    )


def test_without_a_file():
    assert load_config(None, NEEDED) == RunConfig(**NEEDED)


def test_an_empty_file_is_no_option(tmp_path):
    assert load_config(write(tmp_path, "# nothing\n"), NEEDED) == RunConfig(**NEEDED)


def test_to_dict_reads_back_from_yaml(tmp_path):
    config = RunConfig(**NEEDED, budget="3", baselines=("kmeans",), model="m", seed=0)
    assert load_config(write(tmp_path, yaml.safe_dump(config.to_dict())), {}) == config


@pytest.mark.parametrize("given", ["[kmeans, random]", '"kmeans,random"', '" kmeans , random ,"'])
def test_baselines_are_a_list_or_a_comma_string(tmp_path, given):
    found = load_config(write(tmp_path, f"baselines: {given}"), NEEDED).baselines
    assert found == ("kmeans", "random")


@pytest.mark.parametrize(
    "text, budget", [("3", "3"), ("3.0", "3.0"), ('"5MB"', "5MB"), ("25%",) * 2]
)
def test_budget_may_be_a_yaml_number(tmp_path, text, budget):
    assert load_config(write(tmp_path, f"budget: {text}"), NEEDED).budget.text == budget


def test_null_where_none_is_a_value(tmp_path):
    config = load_config(write(tmp_path, "merge_rank: null\nmodel:\n"), NEEDED)
    assert config.merge_rank is None and config.model is None


def test_all_wrong_keys_and_types_at_once(tmp_path):
    text = "badget: 3\nseed: zero\nmerge_rank: wide\nbaselines: 3\ntest_examples: 1.5\nmodel: 4\n"
    path = write(tmp_path, text)
    found = problems(path, {"probe_examples": "few", "zzz": 1})
    assert len(found) == 8 + len(REQUIRED)
    text = "\n".join(found)
    for part in (
        f"{path}: badget: unknown key; did you mean 'budget'?",
        f"{path}: seed: found 'zero', ",
        f"{path}: merge_rank: found 'wide', ",
        f"{path}: baselines: found 3, ",
        f"{path}: test_examples: found 1.5, ",
        f"{path}: model: found 4, ",
        "probe_examples: found 'few', ",
        "zzz: unknown key; known: adapters, ",
    ):
        assert part in text


def test_all_values_out_of_range_at_once():
    wrong = {
        "merge_method": "dare", "merge_rank": 0, "search": "best",
        "baselines": ("auto",), "seed": -1,
        "probe_examples": 0, "test_examples": -1, "budget": "much",
    }  # fmt: skip
    found = problems(None, wrong)
    for name in (*REQUIRED, *wrong):
        (line,) = (line for line in found if line.startswith(f"{name}: "))
        assert name in REQUIRED or repr(wrong[name]) in line
    assert len(found) == len(REQUIRED) + len(wrong)


@pytest.mark.parametrize("name", ["probe_examples", "merge_rank"])
def test_nan_is_no_number(tmp_path, name):
    path = write(tmp_path, f"{name}: .nan")
    (line,) = problems(path, NEEDED)
    assert line.startswith(f"{path}: {name}: found nan, ")


@pytest.mark.parametrize("budget", ["0", "-3", "12.5", "five", "10XB", "", "1,000KB", "5 %%"])
def test_unreadable_budget(budget):
    (line,) = problems(None, {**NEEDED, "budget": budget})
    assert line.startswith("budget: ") and repr(budget) in line and "12.5%" in line


@pytest.mark.parametrize(
    "content",
    [b"- a\n- b\n", b"a: [1\n", b"just text", b"seed: 1\nseed\n", b"model: \xff\xfe\n", b"a: \x00"],
)
def test_a_file_that_is_no_mapping(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    (line,) = problems(path, NEEDED)
    assert str(path) in line


def test_a_file_that_is_missing_or_a_directory(tmp_path):
    for path in (tmp_path / "missing.yaml", tmp_path):
        (line,) = problems(path, NEEDED)
        assert str(path) in line


@pytest.mark.parametrize(
    "name, value",
    [
        ("seed", 2**32),
        ("merge_rank", 10**12),
    ],
)
def test_numbers_beyond_any_use_are_refused_at_once(name, value):
    (line,) = problems(None, {**NEEDED, name: value})
    assert line.startswith(f"{name}: found {value!r}, ")


def test_the_largest_numbers_that_are_good():
    config = load_config(
        None,
        {
            **NEEDED,
            "seed": 2**32 - 1,
        },
    )
    assert config.seed == 2**32 - 1


@pytest.mark.parametrize("listed", [False, True])
def test_a_long_list_of_adapters_reads_back(tmp_path, listed):
    """A thousand by their paths: ninety thousand characters, as a run writes them."""
    paths = [f"/Volumes/work/projects/assistant/training/2026-11/loras/{i:04}" for i in range(1500)]
    config = RunConfig(**{**NEEDED, "adapters": tuple(paths) if listed else ",".join(paths)})
    text = yaml.safe_dump(config.to_dict(), sort_keys=False)
    assert len(text) > 90_000
    assert load_config(write(tmp_path, text), {}) == config


MANY = 300_000
HOSTILE = {
    "[" * MANY: "more than 20 levels",
    "{" * MANY: "more than 20 levels",
    "- " * MANY: "more than 20 levels",
    "? " * MANY: "more than 20 levels",
    "[" * 19 + "[]," * (MANY // 3): "more than 50,000 values",
    "-\n" * (MANY // 3): "more than 50,000 values",
    # Written out, the last of them has 2 ** 60 values.
    "a0: &a0 [1, 1]\n"
    + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)): "50,000 values",
    "seed: " + "1:" * MANY + "1": "a number of more than 1,000 digits",
    "seed: 0x" + "f" * MANY: "a number of more than 1,000 digits",
    "a: &a [*a]": "Circular",
    "a: !!timestamp x": "not readable as YAML",
    'a: "\\UFFFFFFFF"': "not readable as YAML",
    "a: !!bool x": "not readable as YAML",
    "#\n" * 500_001: "1,000,002 characters, at most 1,000,000 are read",
}


def test_a_name_that_no_file_system_takes(tmp_path):
    (line,) = problems(write(tmp_path, ""), {**NEEDED, "output": "x" * 5000})
    assert "output: File name too long, expected a directory or a new name" in line


@pytest.mark.slow
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_what_takes_a_yaml_parser_minutes_is_refused_in_seconds(tmp_path, text):
    path, began = write(tmp_path, text), time.perf_counter()
    (line,) = problems(path, NEEDED)
    # Three seconds where nothing else runs; without the limits, minutes to forever.
    assert time.perf_counter() - began < 30
    assert str(path) in line and HOSTILE[text] in line


def test_aliases_and_levels_within_reason_are_read(tmp_path):
    path = write(tmp_path, "baselines: [&some random, *some]\n")
    assert load_config(path, NEEDED).baselines == ("random", "random")


SLOTS, BYTES = {**NEEDED, "budget": "2"}, {**NEEDED, "budget": "25%"}


@pytest.mark.parametrize(
    "common, asked, without",
    [
        (BYTES, {"search": "paper"}, "a number of adapters as the budget"),
        ({**SLOTS, "merge_method": "concat"}, {"merge_rank": 9}, "a merge method that keeps to a"),
    ],
)
def test_what_does_nothing_is_said_if_it_was_asked_for(tmp_path, common, asked, without):
    ((name, value),) = asked.items()
    with pytest.warns(InputWarning) as warned:
        assert getattr(load_config(None, common | asked), name) == value
    (line,) = (str(one.message) for one in warned)
    assert line.startswith(f"{name}: {value!r} does nothing without ") and without in line
    # A file may be for runs of both kinds, and a default changes nothing.
    path = write(tmp_path, yaml.safe_dump(asked))
    assert getattr(load_config(path, common), name) == value
    assert load_config(None, {**common, name: getattr(RunConfig(**NEEDED), name)})
    good = {"refine": True, "budget": "2"}
    good |= {"merge_method": "ties"} if name == "merge_rank" else {}
    assert getattr(load_config(None, common | asked | good), name) == value


def test_a_value_is_told_with_the_file_that_has_it(tmp_path):
    path = write(tmp_path, "seed: -1\nmerge_rank: 0\n")
    assert problems(path, {**NEEDED, "probe_examples": 0, "merge_rank": 2}) == [
        f"{path}: seed: found -1, input should be greater than or equal to 0",
        "probe_examples: found 0, input should be greater than or equal to 1",
    ]


def test_values_at_odds_are_told_with_all_others():
    wrong = {**NEEDED, "refine": True, "format": "gguf", "merge_rank": 0, "merge_method": "best"}
    fields = [line.split(":")[0] for line in problems(None, wrong)]
    assert fields == ["merge_method", "merge_rank", "refine"]


def test_replacing_a_value_checks_it():
    config = RunConfig(**NEEDED, budget="2")
    assert config.replace(seed=3) == RunConfig(**NEEDED, budget="2", seed=3)
    with pytest.raises(ConfigError, match="seed: found -1"):
        config.replace(seed=-1)
