"""The script for who has a Mac, without its long parts; see benchmarks/mac.py for a whole run."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import mac


def test_one_file_is_written_and_a_part_that_fails_is_in_it(tmp_path, monkeypatch, capsys):
    output = tmp_path / "mac.json"
    monkeypatch.setattr(mac, "COMMAND", [sys.executable, "-c", f"exit('no {Path.home()}')"])
    monkeypatch.setattr(sys, "argv", ["mac", "--output", str(output), "--without", "cpu,tests"])
    with pytest.raises(SystemExit) as ended:
        mac.main()
    assert ended.value.code == 1
    found = json.loads(output.read_text())
    assert {"machine", "python", "versions"} == found["environment"].keys()
    assert "mlx" in found["environment"]["versions"]
    assert found["demo"]["failed"] == found["phone"]["failed"] == ["no ~"]
    assert "cpu" not in found and f"wrote {output}" in capsys.readouterr().out
