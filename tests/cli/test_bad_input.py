"""Bad input through the real command: exit code 2, a message that helps, nothing written.

Here files and tasks; adapters, options and base models have files of their own. The library itself
is good: what the cases refuse is what they changed.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.command import NAMES, Q0, edit_config, edit_tensors
from helpers.tiny import task


def test_the_untouched_library_runs(cli):
    code, out, err = cli(cli.argv(until="pack"))
    assert (code, err) == (0, "")
    manifest = json.loads((cli.output / "pack" / "manifest.json").read_text())
    assert manifest["tasks"] == dict.fromkeys(NAMES, "cluster-0")


def test_convert_is_refused_in_the_same_words(cli, lib):
    path = edit_config(lib.adapters / "beta", use_dora=True)
    refused = cli.fails_with(path, "use_dora")
    argv = ["convert", "--model", lib.model, "--adapters", lib.adapters, "--output", cli.output]
    code, out, err = cli(list(map(str, argv)))
    assert (code, out, err) == (2, "", f"error: {refused}\n")
    assert not cli.output.exists()


@pytest.mark.slow
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
    code, _, err = cli(cli.argv(until="probe"))
    # It may be evaluated (nothing is masked) or refused, but never be a traceback.
    assert code == 0 or (code == 2 and "beta" in err and not cli.output.exists())


def test_a_test_row_without_target_is_refused_before_anything_is_written(cli, lib):
    rows = [{"text": "A question."}, {"text": "<|im_end|>"}]
    (lib.tasks / "beta" / "probe.jsonl").write_text('{"text": "An answer."}\n')
    (lib.tasks / "beta" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cli.fails_with("beta", "row 2", "no target token")


def test_rows_of_all_tasks_that_cannot_be_tokenized_at_once(cli, lib):
    """By file and line, blank ones counted, and each with what to do."""
    beta, gamma = (lib.tasks / name / "test.jsonl" for name in ("beta", "gamma"))
    (beta.parent / "probe.jsonl").write_text('{"text": "An answer."}\n')
    beta.write_text('\n\n{"text": "A question."}\n\n{"text": "<|im_end|>"}\n')
    good = gamma.read_text()
    gamma.write_text(f"\n{json.dumps({'prompt': 'x ' * 600, 'completion': 'y'})}\n{good}")
    template = lib.model / "chat_template.jinja"
    check = "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('a bad word') }}"
    template.write_text(f"{check}{{% endif %}}{{% endfor %}}{template.read_text()}")
    alpha = lib.tasks / "alpha" / "probe.jsonl"
    rows = [{"prompt": word, "completion": "y"} for word in ("good", "bad 1", "bad 2")]
    alpha.write_text("\n".join(map(json.dumps, rows)))
    first, second, third = cli.fails()
    assert first.startswith(f"{alpha}: line 2 (row 2): mlx-lm cannot tokenize it, nor 1 rows more")
    assert "(a bad word); change it" in first
    assert second == (
        f"{beta}: line 5 (row 2) has no target token: found 1 tokens, expected more than the 1 that"
        " are given; complete the row or remove it"
    )
    assert third.startswith(f"{gamma}: line 2 (row 1) has ")
    assert third.endswith("tokens, more than the model's context of 512; shorten it")


def test_prompts_for_a_model_without_a_chat_template(cli, lib):
    (lib.model / "chat_template.jinja").unlink()
    for line in cli.fails():
        assert "put a chat_template.jinja beside its weights, or use rows of text" in line


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
    from d2c_mlx.run import doctor

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
