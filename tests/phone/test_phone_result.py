"""A result of a pack as on a phone: as a table, and files that are none."""

import json

import pytest

from d2c_mlx.phone.result import read_phone
from d2c_mlx.phone.tables import render_phone
from d2c_mlx.utils.errors import PackError

pytestmark = pytest.mark.slow


@pytest.mark.slow
def test_a_result_as_a_table(made):
    result = made[2]
    text = render_phone(result)
    assert "memory: **fits** 4,200.00 MB" in text and "pocketpal" in text
    # Two contexts twice, the change of adapter, and the loss under two bases.
    assert text.count("| pack | ") == 7


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
    with pytest.raises(PackError) as refused:
        read_phone(path)
    assert refused.value.exit_code == 2
    (line,) = refused.value.problems
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
    for part, said in (
        ({"methods": []}, "methods: found [], expected an object with pack; write it again"),
        ({"model": 5}, "model: found 5, expected an object with bits, name, compute_dtype; write it"
                       " again"),
        ({"quality": {}}, "has no quality.n_rows, quality.float_dtype, quality.float_weights and 4"
                          " fields more, expected a whole result of d2c-mlx phone PACK --json;"
                          " write it again"),
        ({"time": 3}, "time: found 3, expected str; write it again"),
    ):  # fmt: skip
        path.write_text(json.dumps(whole | part))
        with pytest.raises(PackError) as refused:
            read_phone(path)
        assert refused.value.problems == [f"{path}: {said}"]
    for part in ("contexts", "memory"):
        other = json.loads(json.dumps(whole))
        other["methods"]["pack"][part] = []
        path.write_text(json.dumps(other))
        with pytest.raises(PackError) as refused:
            read_phone(path)
        assert refused.value.problems == [
            f"{path}: methods.pack.{part}: found [], expected a list that is not empty; write it"
            " again"
        ]
    for other in (whole, whole | {"quality": None}):
        path.write_text(json.dumps(other))
        assert read_phone(path) == other and render_phone(other)
