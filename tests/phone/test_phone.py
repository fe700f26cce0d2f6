"""The benchmark of packs as on phones: complete, consistent, and honest about what fits."""

import csv
import json

import mlx.core as mx
import numpy as np
import pytest
from helpers.adapters import small_pack
from helpers.command import problems_of, typed
from helpers.losses import sum_nll
from helpers.tiny import library, tiny_model
from mlx_lm import load

from d2c_mlx import PhoneConfig, bench_phone, export
from d2c_mlx.models.examples import encode
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import load_task
from d2c_mlx.phone.memory import KV_BITS, estimate, fit_memory, measure_peak
from d2c_mlx.phone.quantized import quantized_model
from d2c_mlx.phone.tables import read_phone, render_phone
from d2c_mlx.utils.errors import InputWarning

pytestmark = pytest.mark.slow

TINY = """tiny:
  memory: 900KB
  memory_is: estimated
  memory_source: a test
  storage: 40KB
  storage_is: estimated
  storage_source: a test
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Paths, pack, and the one long run that most tests look at: its JSON and its CSV."""
    root = tmp_path_factory.mktemp("phone")
    paths = library(root, ["a", "b", "c"])
    pack = small_pack(paths, root / "run" / "pack")
    four = quantized_model(str(paths.model), "4")[1]
    small_pack(paths._replace(model=four), root / "other")
    (root / "tiny.yaml").write_text(TINY)
    argv = ["phone", root / "run", root / "other", "--model", paths.model, "--bits", "16,4",
            "--device", root / "tiny.yaml", "--adapters", paths.adapters, "--tasks", paths.tasks,
            "--test-examples", 3, "--json", "--contexts", "100,300", "--decode", 4, "--runs", 1,
            "--csv", root / "x.csv"]  # fmt: skip
    with pytest.warns(InputWarning, match="/run/pack: made on .* another base .* 4 bits") as warned:
        result = json.loads(typed(*argv))
    assert len(warned) == 1  # the other pack is made on the 4 bits that ship
    rows = list(csv.DictReader((root / "x.csv").read_text().splitlines()))
    return paths, pack, result, rows


def test_a_result_is_shown_with_and_without_quality(measured, tmp_path):
    result = measured[2]
    text = render_phone(result)
    # Bits, contexts and packs against the limits, and the loss of both at both widths.
    assert text.count("\n- run, ") == text.count("\n- other, ") == 4 and "None" not in text
    assert text.count("| run | ") == 2 + 2 * 2 * 2
    bare = json.loads(json.dumps(result)) | {"quality": {}}
    bare["devices"]["tiny"]["best"] = [None, None]
    # As phone-bench of examples/swift writes it.
    device = json.loads(json.dumps(bare)) | {"memory": {**result["memory"], "lines": {}}}
    device["memory"]["peaks"] = [{**x, "thermal": "fair"} for x in result["memory"]["peaks"]]
    assert "| fair |" in render_phone(device) and "Peaks are measured.\n" in render_phone(device)
    for other in (result, bare, device):
        (tmp_path / "x.json").write_text(json.dumps(other))
        assert read_phone(tmp_path / "x.json") == other and "None" not in render_phone(other)


def test_bytes_add_up_at_every_combination(measured):
    _, pack, result, rows = measured
    assert set(result["packs"]) == {"run", "other"}
    assert list(rows[0]) == [
        "device", "bits", "pack", "context", "kv_bits", "resident", "disk", "peak",
        "memory_margin", "storage_margin", "fits", "loss",
    ]  # fmt: skip
    # Two widths, three methods of two adapters or three, two contexts; no KV cache of width 8 is
    # quantized by mlx-lm.
    assert len(rows) == len(result["sweep"]) == 2 * (2 + 2 + 2) * 2
    ((slope, constant), rest) = result["memory"]["lines"]["16"].values()
    for row in rows:
        base, context = result["bases"][row["bits"]], int(row["context"])
        sizes = result["packs"]["run"]["adapters_nbytes"]
        if row["pack"] == "run":
            # In 16 bits; the rest was measured in the dtype of computation.
            cache = 2 * (slope * context + constant) + np.polyval(rest, context)
            expected = base["weights_nbytes"] + sum(sizes[: int(row["resident"])]) + cache
            assert abs(int(row["peak"]) - expected) < 1
            assert int(row["disk"]) == base["file_nbytes"] + pack.nbytes
        fits = int(row["peak"]) <= 900_000 and int(row["disk"]) <= 40_000
        assert row["fits"] == str(fits)
        assert int(row["memory_margin"]) == 900_000 - int(row["peak"])
        assert float(row["loss"]) == result["quality"][row["bits"]][row["pack"]]["loss"]
    assert result["bases"]["4"]["weights_nbytes"] < result["bases"]["16"]["weights_nbytes"]
    change = result["switch"]["run"]
    assert change["seconds"] >= change["token_seconds"] > 0 and change["switches"] == 10


def test_a_tiny_device_refuses_and_says_by_how_much(measured):
    result = measured[2]
    (device,), text = result["devices"].values(), render_phone(measured[2])
    # At 16 bit the base alone takes more storage, at 300 tokens anything more memory.
    refused = {(row["bits"], row["context"]) for row in device["refused"]}
    assert refused == {("16", 100), ("16", 300), ("4", 300)}
    for row in device["refused"]:
        assert (row["memory_margin"] < 0) == (row["context"] == 300)
        assert (row["storage_margin"] < 0) == (row["bits"] == "16")
        if row["pack"] in result["packs"]:
            over = -row["memory_margin"] if row["context"] == 300 else -row["storage_margin"]
            assert f"**does not fit**, {over / 1e6:,.2f} MB too much" in text
    best, none = device["best"]
    losses = {name: result["quality"]["4"][name]["loss"] for name in ("run", "other")}
    assert best["bits"] == "4" and best["loss"] == min(losses.values()) and none is None


def test_the_two_effects_are_those_of_stock_mlx_lm_on_the_quantized_base(measured, tmp_path):
    """Of task adapters and of the unpacked pack, with `mlx_lm.load` and a softmax in float64."""
    paths, pack, result, _ = measured
    places = {"run": export(pack, "mlx", tmp_path / "run")}
    individual = tmp_path / "individual"
    typed("convert", "--adapters", paths.adapters, "--model", paths.model, "--output", individual)
    places["individual"] = {name: name for name in "abc"}
    losses = {}
    for bits in ("16", "4"):
        directory = quantized_model(str(paths.model), bits)[1]
        for method, served in places.items():
            by_task = []
            for task, place in served.items():
                path = str(tmp_path / method / place) if place else None
                model, tokenizer = load(str(directory), adapter_path=path)
                model.set_dtype(mx.float32)
                examples = encode(tokenizer, task, load_task(paths.tasks / task).test[:3])
                by_task.append(sum_nll(model, examples) / examples.n_targets)
            losses[bits, method] = np.mean(by_task)
            assert result["quality"][bits][method]["loss"] == pytest.approx(np.mean(by_task), 1e-4)
    four = result["quality"]["4"]
    takes = losses["4", "individual"] - losses["16", "individual"]
    assert four["individual"]["quantizing"] == pytest.approx(takes, abs=2e-4) and abs(takes) > 1e-3
    on_top = losses["4", "run"] - losses["4", "individual"]
    assert four["run"]["excess"] == pytest.approx(on_top, abs=2e-4)
    assert 0 <= four["run"]["right"] <= 1 and result["n_rows"] == [3, 3, 3]
    # c is left to the base model.
    assert four["run"]["tasks"]["c"]["loss"] == four["base"]["tasks"]["c"]["loss"]


@pytest.mark.parametrize("dequantize", [True, False])
def test_the_model_of_memory_foretells_peaks(tmp_path, dequantize):
    """Within 5 % at twice the tokens, at every KV cache, on quantized weights too."""
    model = tiny_model(tmp_path / "model", hidden_size=64, intermediate_size=256, head_dim=64,
                       max_position_embeddings=8192)  # fmt: skip
    base, size = Model(str(quantized_model(str(model), "4")[1]), dequantize=dequantize), 4
    points = [measure_peak(base, [], [7] * (n - 2), 2, kv_bits, 3)
              for n in (512, 1024, 2048, 4096) for kv_bits in KV_BITS]  # fmt: skip
    memory = fit_memory([point for point in points if point["context"] <= 2048], size)
    assert base.model.layers[0].self_attn.n_kv_heads == 2
    for point in points:
        if point["context"] != 4096:
            continue
        beside = estimate(memory, point["context"], point["kv_bits"], size)
        assert point["counted"] + beside == pytest.approx(point["peak"], rel=0.05)
        # Two layers, two heads, keys and values of width 64, with a scale and an offset of 64.
        bits = 32 if point["kv_bits"] == 16 else point["kv_bits"] + 2 * 32 / 64
        assert point["kv_cache"] == 2 * 2 * 2 * 64 * bits / 8 * point["context"]


def test_what_does_not_go_together_is_refused_in_one_line(measured, tmp_path):
    paths, pack, *_ = measured
    (tmp_path / "a").mkdir()
    options = {"packs": (str(pack.path),), "model": str(paths.model), "contexts": (40,)}
    for change, words in (
        ({"model": None}, "model: the pack is for 'model'"),
        ({"device": "iphone"}, "device: 'iphone' is no profile; expected iphone-4gb, "),
        ({"contexts": (4, 513)}, "found 4, 513, expected more than 4 tokens, twice --decode, and"),
        ({"adapters": str(tmp_path)}, "has none for b, c, which the pack serves"),
    ):
        config = PhoneConfig(**{**options, "decode": 2, "runs": 1, **change})
        (line,) = problems_of(bench_phone, config, quiet=True)
        assert words in line


def test_options_are_checked_at_once():
    bad = {"bits": "7", "test_examples": -1, "answers": -1, "contexts": (0,), "decode": 1}
    lines = problems_of(PhoneConfig, packs=("p",), **bad, runs=0)
    assert [line.split(":")[0] for line in lines] == [*bad, "runs"]
    assert PhoneConfig(packs=("p",), contexts="20,1").contexts == (1, 20)
    for field, texts in (("contexts", ("short", "1,x", "0")), ("bits", ("", "4,4", "16,"))):
        for text in texts:
            (line,) = problems_of(PhoneConfig, packs=("p",), **{field: text})
            assert line.startswith(field)
