"""`bench compare`: results of two times side by side, and files that are none."""

import json

import pytest
from click.testing import CliRunner
from d2c_mlx_cli.main import cli

from d2c_mlx.phone.compare import compare_phones
from d2c_mlx.phone.result import read_phone
from d2c_mlx.phone.tables import render_phone
from d2c_mlx.utils.errors import PackError


def test_table_history_and_comparison(made, tmp_path):
    *_, result, history = made
    assert [json.loads(line) for line in history.read_text().splitlines()] == [result]
    text = render_phone(result)
    assert "memory: **fits** 4,200.00 MB" in text and "pocketpal" in text
    # Two contexts twice, the change of adapter, and the loss under two bases.
    assert text.count("| pack | ") == 7
    other = json.loads(json.dumps(result))
    other["provenance"]["machine"]["device"] = "another"
    other["methods"]["pack"]["contexts"][0]["decode_tokens_per_second"] *= 2
    other["quality"] = None
    path = tmp_path / "other.json"
    path.write_text(json.dumps(other, indent=2))
    out = CliRunner().invoke(cli, ["bench", "compare", str(history), str(path)]).stdout
    assert "| another | differs |" in out
    decode = next(line for line in out.splitlines() if "pack, 300 tokens: decode" in line)
    assert decode.endswith("| 2.00 |")
    assert "loss of the pack" not in out and "| held-out rows | 9 | - | differs |" in out
    assert "| loss of the pack |" in compare_phones(result, result)


def test_results_of_something_else_are_not_compared(made):
    result = made[2]
    other = json.loads(json.dumps(result))
    other["model"]["bits"], other["options"]["contexts"] = 8, [40]
    with pytest.raises(PackError) as caught:
        compare_phones(result, other)
    assert len(caught.value.problems) == 2
    assert "bits of the base: found 8, expected 4 as in the first result" in str(caught.value)


@pytest.mark.parametrize("content", ["{}", "not JSON", "[]", ""])
def test_files_that_are_no_result(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(PackError, match="no result of d2c-mlx phone PACK --json"):
        read_phone(path)
    with pytest.raises(PackError, match="no such file"):
        read_phone(tmp_path / "none.json")


def test_a_result_that_lacks_parts_is_refused_by_their_names(made, tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"format": "d2c-mlx-phone", "version": 1}')
    refused = CliRunner().invoke(cli, ["bench", "compare", str(path), str(path)])
    assert isinstance(refused.exception, PackError) and refused.exception.exit_code == 2
    (line,) = refused.exception.problems
    assert line.startswith(f"{path}: has no model, pack, options and ") and "write it again" in line
    whole = made[2]
    gone = ["time", "quality", "provenance.machine.system", "switch.stock.reload_seconds",
            "methods.pack.memory.0.kv_cache", "methods.base.contexts.1.context", "methods.pack",
            "device.name", "quality.device.pack", "quality.n_rows"]  # fmt: skip
    for name in gone:
        other = json.loads(json.dumps(whole))
        *parents, key = name.split(".")
        part = other
        for one in parents:
            part = part[int(one) if one.isdigit() else one]
        del part[key]
        path.write_text(json.dumps(other))
        with pytest.raises(PackError, match=f"{path}: has no {name}[ ,]"):
            read_phone(path)
    for other in (whole | {"methods": []}, whole | {"model": 5}, whole | {"quality": {}}):
        path.write_text(json.dumps(other))
        with pytest.raises(PackError, match=f"{path}: has no "):
            read_phone(path)
    for other in (whole, whole | {"quality": None}):
        path.write_text(json.dumps(other))
        assert render_phone(read_phone(path)) and compare_phones(other, read_phone(path))
