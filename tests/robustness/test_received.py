"""Run directories that strangers sent: crafted files with true records of them."""

import json
import random
import shutil
from contextlib import suppress

import pytest
from helpers.damage import damaged
from helpers.runs import records

from d2c_mlx.utils.files import hash_tree

pytestmark = pytest.mark.slow


def sealed(output):
    """Make every record true of what is there; the one of a finished run names files of here."""
    for path in records(output):
        with suppress(ValueError, TypeError, AttributeError, KeyError):  # a damaged one
            content = json.loads(path.read_text())
            content["outputs"] = {name: hash_tree(output / name) for name in content["outputs"]}
            path.write_text(json.dumps(content))
    (output / ".stages" / "finish.json").unlink(missing_ok=True)


@pytest.mark.parametrize("n", [120, pytest.param(600, marks=pytest.mark.soak)])
def test_crafted_files_are_written_anew_or_refused_in_one_line(whole, tmp_path, command, n):
    good, output, draw = whole[1] / "run", tmp_path / "run", random.Random(n)
    files = sorted(path for path in good.rglob("*") if path.is_file())
    files = [path.relative_to(good) for path in files if path.name not in (".lock", "config.yaml")]
    artifacts = [path for path in files if path.suffix == ".json" and len(path.parts) == 1]
    for _ in range(n):
        shutil.copytree(good, output)
        name = draw.choice(draw.choice([files, artifacts]))
        head = 400 if name.suffix == ".safetensors" else None
        (output / name).write_bytes(damaged((good / name).read_bytes(), draw, head))
        sealed(output)
        code, _, err = command("run", "--output", output)
        if code:
            assert code == 2 and str(output) in err and err.count("\n") < 5, (name, err)
        else:
            assert (output / "report.html").read_text().endswith("</html>")
        shutil.rmtree(output)


@pytest.mark.parametrize("name", ["report.html", "bench.json"])
def test_a_directory_in_the_place_of_a_file_is_named(whole, tmp_path, command, name):
    shutil.copytree(whole[1] / "run", tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / name).mkdir()
    code, _, err = command("run", "--output", tmp_path / "run")
    assert code == 2 and f"would replace your {tmp_path / 'run' / name}, which" in err
