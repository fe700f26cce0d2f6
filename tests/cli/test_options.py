"""Options of a run: every field of `RunConfig` is one, and files made of them are up to date."""

import re

import click
import pytest
from d2c_mlx_cli import compare, stages
from d2c_mlx_cli.main import _COMMANDS, cli
from helpers import ROOT

from d2c_mlx.run.config import RunConfig
from docs.scripts.options import FILES

NEEDED = {"adapters": "loras", "tasks": "tasks", "output": "out"}
STAGES = ("run", "probe", "plan", "cluster", "merge", "refine", "pack", "bench", "report")


def options(command):
    return {p.name: p for p in command.params if isinstance(p, click.Option)}


@pytest.mark.parametrize("name", STAGES)
def test_every_field_is_an_option_and_every_option_a_field(name):
    names = set(options(getattr(stages, name))) - {"quiet", "as_json", "dry_run", "log_file"}
    assert names == set(RunConfig.model_fields)


def test_option_names_are_the_field_names_with_dashes():
    for name, option in options(stages.run).items():
        if name != "as_json":
            assert option.opts[-1:] == [f"--{name.replace('_', '-')}"]


def test_the_help_states_the_defaults():
    default = RunConfig(**NEEDED)
    stated = {}
    for name, option in options(stages.run).items():
        match = re.search(r"\[default: (.+)\]", option.help or "")
        if match:
            stated[name] = match[1]
    values = {name: getattr(default, name) for name in stated}
    assert stated.pop("tasks").startswith("none") and values.pop("tasks") == NEEDED["tasks"]
    assert stated.pop("model").startswith("the embedded") and values.pop("model") is None
    assert stated.pop("scale").startswith("tuned") and values.pop("scale") is None
    assert stated.pop("merge_rank").startswith("the largest") and values.pop("merge_rank") is None
    assert stated.pop("merge_method").startswith("layerwise, or regmean++")
    assert values.pop("merge_method") is None
    assert stated.pop("max_adapters").startswith("any") and values.pop("max_adapters") is None
    assert stated.pop("memory_limit").startswith("what") and values.pop("memory_limit") is None
    assert stated.pop("accept_dora") == "refuse them" and values.pop("accept_dora") is None
    # tests/refine/test_stored.py holds its words to the rates that train.
    assert stated.pop("refine_rate") and values.pop("refine_rate") is None
    for name in ("refine", "same_shape", "skip_bad", "thorough"):
        assert stated.pop(name) == "no" and values.pop(name) is False
    assert stated.pop("baselines") == ",".join(values.pop("baselines"))
    assert stated == {name: str(value) for name, value in values.items()}
    special = {"model", "scale", "memory_limit", "refine", "same_shape", "without", "baselines"}
    special |= {
        "unlabelled",
        "clusters",
        "skip_bad",
        "merge_method",
        "merge_rank",
        "max_adapters",
        "thorough",
    }
    special |= {"accept_dora", "refine_rate"}
    unstated = set(RunConfig.model_fields) - set(stated) - special
    assert unstated == set(NEEDED)


def test_a_comparison_states_its_own_defaults():
    shown = {name: one.help for name, one in options(compare.compare).items()}
    assert "[default: none]" in shown["baselines"]
    assert not {"format", "same_shape", "thorough"} & shown.keys()


def test_options_have_no_default_of_their_own():
    # A default on the command line would override the YAML file.
    for name, option in options(stages.run).items():
        assert name in ("quiet", "as_json") or not option.default or option.default is UNSET


UNSET = getattr(click.core, "UNSET", None)


def test_every_command_is_listed_and_named_as_it_is_called():
    context = click.Context(cli)
    for name in _COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None and command.name == name


@pytest.mark.parametrize("name", FILES)
def test_what_is_written_from_the_fields_is_up_to_date(name):
    """Else run `make options`."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text == FILES[name]()
