"""The benchmark of a pack as on a phone: complete, consistent, and honest about what fits."""

import json

import mlx.core as mx
import pytest
from click.testing import CliRunner
from d2c_mlx_cli.main import cli
from helpers.losses import sum_nll
from helpers.phone import make_pack
from helpers.tiny import library
from mlx_lm import load

from d2c_mlx.models.examples import encode
from d2c_mlx.models.tasks import load_task
from d2c_mlx.packs.export import export
from d2c_mlx.phone.benchmark import bench_phone, quantized_model
from d2c_mlx.phone.config import PhoneConfig
from d2c_mlx.phone.tables import read_phone, render_phone
from d2c_mlx.utils.errors import ConfigError, InputError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Paths, pack, and the one long run that most tests look at: its JSON."""
    root = tmp_path_factory.mktemp("phone")
    paths = library(root, ["a", "b", "c"])
    pack = make_pack(paths, root / "pack")
    result = CliRunner().invoke(
        cli, ["phone", str(pack.path), "--model", str(paths.model), "--bits", "4", "--device",
              "iphone-6gb", "--adapters", str(paths.adapters), "--tasks", str(paths.tasks),
              "--test-examples", "3", "--json", "--contexts", "300,40", "--decode", "4",
              "--runs", "1"],
        catch_exceptions=False,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return paths, pack, json.loads(result.stdout)


def test_a_result_is_shown_with_and_without_quality(measured, tmp_path):
    *_, result = measured
    text = render_phone(result)
    # Two contexts twice, the change of adapter, and the loss under two bases.
    assert text.count("| pack | ") == 6 and "None" not in text
    for other in (result, result | {"quality": None}):
        (tmp_path / "x.json").write_text(json.dumps(other))
        assert read_phone(tmp_path / "x.json") == other and render_phone(other)


def test_components_add_up_and_both_limits_are_kept_apart(measured):
    paths, pack, result = measured
    model = result["model"]
    for name, method in result["methods"].items():
        assert [speed["context"] for speed in method["contexts"]] == [300, 40]
        for memory in method["memory"]:
            parts = [memory[key] for key in ("weights", "adapter", "kv_cache", "rest")]
            assert sum(parts) == memory["peak"] and memory["rest"] > 0
            assert memory["margin"] == memory["limit"] - memory["peak"] and memory["fits"]
            assert memory["limit"] == 4_200_000_000
            assert memory["weights"] == model["weights_nbytes"] > 0
            assert (memory["adapter"] > 0) == (name != "base")
            # Two layers of keys and values of width 16 in 16 bit, in whole steps of 256 tokens.
            assert memory["kv_cache"] == 2 * 2 * 16 * 2 * {300: 512, 40: 256}[memory["context"]]
        stored = model["file_nbytes"] + method["nbytes"]
        assert method["storage"]["nbytes"] == stored
        assert method["storage"]["margin"] == 4_000_000_000 - stored
    assert result["methods"]["pack"]["nbytes"] == pack.nbytes
    change = result["switch"]
    assert change["seconds"] >= change["token_seconds"] > 0 and change["switches"] == 10


def test_quality_stands_beside_the_float_base(measured):
    quality = measured[2]["quality"]
    assert quality["n_rows"] == [3, 3, 3] and quality["float_weights"] == "original"
    for key in ("device", "float"):
        base, own, pack = (quality[key][name] for name in ("base", "individual", "pack"))
        for task, row in pack["tasks"].items():
            excess = row["loss"] - own["tasks"][task]["loss"]
            assert row["excess"] == pytest.approx(excess, abs=1e-9)
        # c is left to the base model.
        assert pack["tasks"]["c"]["loss"] == base["tasks"]["c"]["loss"]
        assert quality["gain"][key] == pytest.approx(base["loss"] - pack["loss"])
    assert quality["device"]["base"]["loss"] != quality["float"]["base"]["loss"]


def test_losses_are_those_of_stock_mlx_lm_on_the_quantized_base(measured, tmp_path):
    """With the unpacked adapter."""
    paths, pack, result = measured
    places = export(pack, "mlx", tmp_path / "plain")
    _, directory = quantized_model(str(paths.model), 4)
    scores = result["quality"]["device"]["pack"]
    for task, place in places.items():
        path = str(tmp_path / "plain" / place) if place else None
        model, tokenizer = load(str(directory), adapter_path=path)
        model.set_dtype(mx.float32)
        examples = encode(tokenizer, task, load_task(paths.tasks / task).test[:3])
        expected = sum_nll(model, examples) / examples.n_targets
        assert scores["tasks"][task]["loss"] == pytest.approx(expected, abs=1e-4)
    assert 0 <= scores["right"] <= 1


def test_what_does_not_fit_and_what_quantizing_undoes_is_shown(measured):
    result = json.loads(json.dumps(measured[2]))
    result["quality"] |= {"gain": {"float": 0.5, "device": -0.1}, "kept_gain": -0.2}
    method = result["methods"]["pack"]
    for row in (*method["memory"], method["storage"]):
        row |= {"limit": 50_000, "fits": False, "margin": -7_000}
    text = render_phone(result)
    assert "-0.1000 on the device's: the device's base undoes it." in text
    assert "memory: **does not fit** 0.05 MB, margin -0.01 MB" in text
    assert "storage: **does not fit** 0.05 MB" in text


def test_what_does_not_go_together_is_refused_in_one_line(measured, tmp_path):
    paths, pack, _ = measured
    (tmp_path / "a").mkdir()
    options = {"pack": str(pack.path), "device": "mac-8gb", "model": str(paths.model)}
    for change, words in (
        ({"model": None}, "model: the pack is for 'model'"),
        ({"contexts": (4, 511)}, "contexts: found 4, 511, expected at most 510 tokens"),
        ({"adapters": str(tmp_path)}, "has none for b, c, which the pack serves"),
        ({"model": str(quantized_model(str(paths.model), 8)[1]), "bits": 4}, "8 bits already"),
    ):
        config = PhoneConfig(**{**options, "contexts": (4,), "decode": 2, "runs": 1, **change})
        with pytest.raises(InputError) as refused:
            bench_phone(config, quiet=True)
        (line,) = refused.value.problems
        assert words in line


def test_options_are_checked_at_once():
    bad = {"bits": 3, "test_examples": -1, "contexts": (0,), "decode": 1, "runs": 0}
    with pytest.raises(ConfigError) as caught:
        PhoneConfig(pack="p", device="d", **bad)
    assert [line.split(":")[0] for line in caught.value.problems] == list(bad)
    assert PhoneConfig(pack="p", device="d", contexts="1,20").contexts == (1, 20)
    for text in ("short", "1,x", "0"):
        with pytest.raises(ConfigError, match="^contexts"):
            PhoneConfig(pack="p", device="d", contexts=text)
