"""A run directory that somebody sent: its links lead no write out of it."""

import pytest

from d2c_mlx.pipeline import run
from d2c_mlx.utils.errors import D2CError


@pytest.mark.parametrize("name", [".lock", ".stages", ".config.yaml.tmp", ".losses.json.tmp"])
def test_a_link_in_a_run_directory(config, tmp_path, name):
    output, mine = tmp_path / "run", tmp_path / "mine"
    output.mkdir()
    if name == ".stages":
        mine.mkdir()
        (mine / "probe.json").write_text("mine")
    else:
        mine.write_text("mine")
    (output / name).symlink_to(mine)
    if name in (".lock", ".stages"):
        with pytest.raises(D2CError, match=rf"run/{name}: is ") as caught:
            run(config, "probe", quiet=True)
        assert len(str(caught.value).splitlines()) == 1
    else:
        run(config, "probe", quiet=True)
        assert not [one for one in output.iterdir() if one.is_symlink() and one.name != name]
    kept = [mine] if mine.is_file() else list(mine.iterdir())
    assert [one.read_text() for one in kept] == ["mine"]
