"""A result of a pack as on a phone: as a table, and files that are none."""

import json

import pytest

from d2c_mlx.phone.tables import read_phone, render_phone
from d2c_mlx.utils.errors import PackError

pytestmark = pytest.mark.slow


def test_a_result_as_a_table(made, tmp_path):
    result = made[2]
    text = render_phone(result)
    assert "memory: **fits** 4,200.00 MB" in text and "pocketpal" in text
    # Two contexts twice, the change of adapter, and the loss under two bases.
    assert text.count("| pack | ") == 7
    path = tmp_path / "x.json"
    for other in (result, result | {"quality": None}):
        path.write_text(json.dumps(other))
        assert read_phone(path) == other and render_phone(other)


@pytest.mark.parametrize(
    "content", ["{}", "not JSON", "[]", "", '{"format": "d2c-mlx-phone", "version": 1}']
)
def test_files_that_are_no_result(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(PackError) as refused:
        read_phone(path)
    (line,) = refused.value.problems
    assert refused.value.exit_code == 2 and line.startswith(f"{path}: ")
    with pytest.raises(PackError, match="no such file"):
        read_phone(tmp_path / "none.json")
