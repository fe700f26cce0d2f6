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


# Which files there are, and what is in the tasks.


def of_beta(file, content):
    """Write a file of the adapter beta, or of its task; None removes it."""

    def change(lib):
        path = (lib.tasks if file.endswith(".jsonl") else lib.adapters) / "beta" / file
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        return path

    return change


def without_weights(lib):
    task(lib.tasks, "delta")
    (lib.adapters / "delta").mkdir()
    return lib.adapters / "delta"


def a_pickle(lib):
    path = lib.adapters / "beta" / "adapter_model.safetensors"
    return path.rename(path.with_suffix(".bin"))


def both_layouts(lib):
    directory = lib.adapters / "beta"
    shutil.copyfile(directory / "adapter_model.safetensors", directory / "adapters.safetensors")
    return directory


def a_broken_line(lib):
    path = lib.tasks / "beta" / "probe.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "", '{"prompt": "x", ', *lines[1:]]))
    return f"{path}:3"


def shared_rows(lib):
    probe, test = (lib.tasks / "beta" / name for name in ("probe.jsonl", "test.jsonl"))
    rows = test.read_text().splitlines() + probe.read_text().splitlines()[:2]
    test.write_text("\n".join(rows))
    return f"{test}:5"


def no_target(lib):
    rows = [{"text": "A question."}, {"text": "<|im_end|>"}]
    (lib.tasks / "beta" / "probe.jsonl").write_text('{"text": "An answer."}\n')
    (lib.tasks / "beta" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return lib.tasks / "beta" / "test.jsonl"


LATIN = '{"prompt": "ä", "completion": "y"}\n'.encode("latin-1")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_weights, "no adapter weights"),
        (of_beta("adapter_config.json", None), "missing"),
        (of_beta("adapter_config.json", b"{"), "JSON"),
        (of_beta("adapter_config.json", b"[]"), "JSON"),
        (of_beta("adapter_config.json", b"\xff\xfe"), "JSON"),
        (a_pickle, "safe_serialization=True"),
        (both_layouts, "keep one"),
        (of_beta("probe.jsonl", None), "missing"),
        (of_beta("test.jsonl", None), "missing"),
        (a_broken_line, "not JSON"),
        (shared_rows, "2 such rows"),
        (of_beta("test.jsonl", b'{"question": "x", "answer": "y"}\n'), "['answer', 'question']"),
        (of_beta("test.jsonl", LATIN), ""),
        (no_target, "no target token"),
    ],
)  # fmt: skip
def test_a_file_that_is_bad_is_named_in_one_line(cli, lib, change, words):
    cli.fails_with(change(lib), words)


@pytest.mark.parametrize("field", ["adapters", "tasks"])
def test_a_folder_that_is_missing_empty_or_a_file(cli, tmp_path, field):
    cli.fails_with(tmp_path / "nope", f"--{field}", **{field: tmp_path / "nope"})
    if field == "adapters":
        (tmp_path / "file").write_text("x")
        cli.fails_with(tmp_path / "file", adapters=tmp_path / "file")
        (tmp_path / "empty" / ".hidden").mkdir(parents=True)
        cli.fails_with(tmp_path / "empty", "no adapters", adapters=tmp_path / "empty")


def test_no_task_for_an_adapter(cli, lib):
    shutil.rmtree(lib.tasks / "beta")
    lines = cli.fails()
    assert [line.split(": ")[0] for line in lines] == [
        str(lib.tasks / "beta" / name) for name in ("probe.jsonl", "test.jsonl")
    ]
    assert all("missing" in line for line in lines)


def test_a_chat_that_is_only_an_answer(cli, lib):
    path = lib.tasks / "beta" / "probe.jsonl"
    path.write_text('{"messages": [{"role": "assistant", "content": "y"}]}\n')
    code, _, err = cli(cli.argv(until="probe"))
    # It may be evaluated (nothing is masked) or refused, but never be a traceback.
    assert code == 0 or (code == 2 and "beta" in err and not cli.output.exists())


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

    bad = [doctor.Finding("x", "y", "do z")]
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
