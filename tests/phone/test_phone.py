"""The benchmark of a pack as on a phone: complete, consistent, and honest about what fits."""

import json

import mlx.core as mx
import pytest
from helpers.phone import make_pack
from helpers.tiny import library
from mlx_lm import load, stream_generate

from d2c_mlx.evaluate.answers import answer_metrics
from d2c_mlx.packs.export import export
from d2c_mlx.phone.benchmark import bench_phone
from d2c_mlx.phone.config import PhoneConfig
from d2c_mlx.phone.stock_model import quantized_model
from d2c_mlx.phone.tables import render_phone
from d2c_mlx.utils.errors import ConfigError, InputError

pytestmark = pytest.mark.slow


def empty_fields(value, path=""):
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return [found for key, one in pairs for found in empty_fields(one, f"{path}/{key}")]
    return [path] if value is None or value == "" else []


def test_every_field_is_filled(made):
    *_, result = made
    assert set(result["methods"]) == {"base", "individual", "pack"}
    # The bare model has no adapter; a random adapter need not beat the base.
    allowed = {"/methods/base/adapter", "/quality/kept_gain"}
    assert {path for path in empty_fields(result) if not path.endswith("/retention")} <= allowed


def test_a_pack_of_another_base_is_not_measured_on_the_default(made):
    _, pack, _ = made
    with pytest.raises(InputError, match="model: the pack is for 'model'; name that model's"):
        bench_phone(PhoneConfig(pack=str(pack.path), device="iphone-6gb"))


def test_components_add_up_and_both_limits_are_kept_apart(made):
    paths, pack, result = made
    for name, method in result["methods"].items():
        assert [one["context"] for one in method["contexts"]] == [300, 40]
        for one, speed in zip(method["memory"], method["contexts"]):
            parts = [one[key] for key in ("weights", "adapter", "kv_cache", "rest")]
            assert sum(parts) == one["peak"]
            assert one["margin"] == one["limit"] - one["peak"] and one["fits"]
            assert one["limit"] == 4_200_000_000
            assert one["weights"] == result["model"]["weights_nbytes"] > 0
            assert (one["adapter"] > 0) == (name != "base")
            # Two layers of keys and values of width 16 in 16 bit, in whole steps of 256 tokens.
            assert one["kv_cache"] == 2 * 2 * 16 * 2 * {300: 512, 40: 256}[one["context"]]
            assert one["rest"] > 0
            assert speed["prompt_tokens_per_second"] == pytest.approx(
                speed["context"] / speed["first_token_seconds"]
            )
        stored = result["model"]["file_nbytes"] + method["nbytes"]
        assert method["storage"]["nbytes"] == stored
        assert method["storage"]["margin"] == 4_000_000_000 - stored
    assert result["methods"]["pack"]["nbytes"] == pack.nbytes
    assert result["model"]["file_nbytes"] < (paths.model / "model.safetensors").stat().st_size


def test_quality_stands_beside_the_float_base(made):
    paths, pack, result = made
    quality = result["quality"]
    assert quality["n_rows"] == [3, 3, 3] and quality["float_weights"] == "original"
    for key in ("device", "float"):
        methods = quality[key]
        assert methods["pack"]["nbytes"] == pack.nbytes
        for task, one in methods["pack"]["tasks"].items():
            own = methods["individual"]["tasks"][task]["loss"]
            assert one["excess"] == pytest.approx(one["loss"] - own, abs=1e-9)
        # c is left to the base model.
        assert methods["pack"]["tasks"]["c"]["loss"] == methods["base"]["tasks"]["c"]["loss"]
        gain = methods["base"]["loss"] - methods["pack"]["loss"]
        assert quality["gain"][key] == pytest.approx(gain)
    assert quality["device"]["base"]["loss"] != quality["float"]["base"]["loss"]


def test_answers_are_those_of_stock_mlx_lm_on_the_quantized_base(made, tmp_path):
    """Metrics worked out anew from what mlx-lm generates with the unpacked adapter."""
    paths, pack, result = made
    export(pack, "mlx", tmp_path / "plain")
    _, _, directory = quantized_model(str(paths.model), 4)
    model, tokenizer = load(str(directory), adapter_path=str(tmp_path / "plain" / "cluster-0"))
    model.set_dtype(mx.float32)
    answers = []
    for row in map(json.loads, (paths.tasks / "a" / "test.jsonl").read_text().splitlines()[:3]):
        chat = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*chat, {"role": "assistant",
                                                       "content": row["completion"]}])  # fmt: skip
        n = 2 * (len(whole) - len(prompt)) + 16
        tokens = [s.token for s in stream_generate(model, tokenizer, prompt, max_tokens=n)]
        heard = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        answers.append({"expected": row["completion"], "pack": heard})
    expected = answer_metrics({"a": answers}, ["pack"])["pack"]["tasks"]["a"]
    found = result["quality"]["device"]["pack"]["metrics"]["tasks"]["a"]
    assert found == pytest.approx(expected)
    assert any(one["pack"] for one in answers)


@pytest.mark.slow
def test_the_quantized_base_is_asked_for(made, tmp_path):
    """Under eight bits the loss is nearer to the float base's than under four."""
    paths, pack, four = made
    config = PhoneConfig(pack=str(pack.path), device="mac-8gb", model=str(paths.model), bits=8,
                         tasks=str(paths.tasks), contexts=(4,), decode=2, runs=1,
                         test_examples=3)  # fmt: skip
    eight = bench_phone(config, quiet=True)
    assert (four["model"]["bits"], eight["model"]["bits"]) == (4, 8)
    away = [abs(one["quality"]["device"]["base"]["loss"] - one["quality"]["float"]["base"]["loss"])
            for one in (four, eight)]  # fmt: skip
    assert away[1] < away[0]
    # Without the individual adapters there is nothing to exceed.
    assert set(eight["methods"]) == {"base", "pack"}
    assert eight["quality"]["device"]["pack"]["excess"] is None
    assert "| - | - |" in render_phone(eight)


def test_both_ways_to_switch_are_timed_in_the_same_run(made):
    switch = made[2]["switch"]
    pack, stock = switch["pack"], switch["stock"]
    assert set(pack) == {"read_seconds", "attach_seconds", "token_seconds", "seconds", "switches"}
    assert set(stock) == {"reload_seconds", "token_seconds", "seconds", "switches"}
    assert (pack["switches"], stock["switches"]) == (10, 1)
    assert switch["ratio"] == stock["seconds"] / pack["seconds"]
    assert stock["seconds"] == pytest.approx(stock["reload_seconds"] + stock["token_seconds"])
    for one in (pack, stock):
        assert min(one.values()) > 0 and one["seconds"] > one["token_seconds"]


@pytest.mark.parametrize(
    ("gain", "kept", "words"),
    [(0.4, 0.8, "0.4000 on the device's: 80.0% of it is left."),
     (-0.1, -0.2, "-0.1000 on the device's: the device's base undoes it."),
     (0.1, None, "0.1000 on the device's.")],
)  # fmt: skip
def test_whether_quantizing_undoes_the_merge_is_said(made, gain, kept, words):
    result = json.loads(json.dumps(made[2]))
    result["quality"] |= {"gain": {"float": 0.5, "device": gain}, "kept_gain": kept}
    assert words in render_phone(result)


def test_a_profile_that_is_too_small_is_told_by_component(made, tmp_path):
    paths, pack, *_ = made
    device = tmp_path / "watch.yaml"
    device.write_text("watch:\n  memory: 50KB\n  memory_source: made up\n  storage: 10KB\n"
                      "  storage_source: made up\n")  # fmt: skip
    before = mx.set_memory_limit(10**12)
    try:
        config = PhoneConfig(pack=str(pack.path), device=str(device), model=str(paths.model),
                             contexts=(8,), decode=2, runs=1)  # fmt: skip
        result = bench_phone(config, quiet=True)
        assert mx.set_memory_limit(10**12) == 10**12
    finally:
        mx.set_memory_limit(before)
    (memory,) = result["methods"]["pack"]["memory"]
    assert not memory["fits"] and memory["margin"] == 50_000 - memory["peak"] < 0
    assert memory["weights"] > 50_000
    assert not result["methods"]["pack"]["storage"]["fits"]
    text = render_phone(result)
    assert f"memory: **does not fit** 0.05 MB, margin {memory['margin'] / 1e6:.2f} MB" in text
    assert "storage: **does not fit** 0.01 MB" in text and "limit: made up" in text
    assert f"{memory['weights'] / 1e6:.2f} MB" in text


def test_options_are_checked_at_once():
    with pytest.raises(ConfigError) as caught:
        PhoneConfig(
            pack="p",
            device="d",
            bits=3,
            contexts=(0,),
            decode=1,
            runs=0,
            test_examples=-1,
        )
    assert [line.split(":")[0] for line in caught.value.problems] == [
        "bits", "test_examples", "contexts", "decode", "runs"
    ]  # fmt: skip
    assert PhoneConfig(pack="p", device="d", contexts="1,20").contexts == (1, 20)
    assert PhoneConfig(pack="p", device="d").contexts is None
    for text in ("short", "1,x", "0"):
        (line,) = _refused(contexts=text)
        assert line.startswith("contexts")


def _refused(**options):
    with pytest.raises(ConfigError) as caught:
        PhoneConfig(pack="p", device="d", **options)
    return caught.value.problems


def test_a_context_beyond_the_model_is_refused_and_a_default_left_out(made):
    paths, pack, *_ = made
    config = PhoneConfig(
        pack=str(pack.path), device="mac-8gb", model=str(paths.model), contexts=(4, 509), decode=4
    )
    with pytest.raises(ConfigError, match="found 4, 509, expected at most 508 tokens"):
        bench_phone(config, quiet=True)
    result = bench_phone(config.replace(contexts=None, runs=1), quiet=True)
    assert result["options"]["contexts"] == [128]
    for method in result["methods"].values():
        for part in ("contexts", "memory"):
            assert [one["context"] for one in method[part]] == [128]
    assert "at 128 tokens" in render_phone(result)


def test_missing_adapters_are_named(made):
    paths, pack, *_ = made
    config = PhoneConfig(
        pack=str(pack.path), device="mac-8gb", model=str(paths.model), adapters=str(paths.tasks)
    )
    empty = pack.path.parent / "few"
    (empty / "a").mkdir(parents=True, exist_ok=True)
    with pytest.raises(ConfigError, match="has none for b, c, which the pack serves"):
        bench_phone(config.replace(adapters=str(empty)), quiet=True)


def test_bad_input_is_a_line_each_and_nothing_else(tmp_path, command):
    """Through the entry point: the words and the exit code that a user sees."""
    for args, words in (
        (["phone", str(tmp_path), "--device", "watch"], "error: device: 'watch' is no profile"),
        (["phone", str(tmp_path), "--device", "mac-8gb"], f"error: {tmp_path / 'manifest.json'}"),
        (["phone", str(tmp_path), "--device", "mac-8gb", "--bits", "3"], "error: bits: found 3"),
    ):
        code, out, err = command(*args)
        assert (code, out) == (2, "")
        assert err.startswith(words) and err.count("\n") == 1


def test_rows_that_cannot_be_tokenized_are_named_by_line(tmp_path):
    paths = library(tmp_path, ["a", "b", "c"])
    pack = make_pack(paths, tmp_path / "pack")
    files = [paths.tasks / name / "test.jsonl" for name in "ab"]
    for file in files:
        file.write_text('\n{"text": "A question."}\n{"text": "<|im_end|>"}\n')
    config = PhoneConfig(
        pack=str(pack.path), device="mac-8gb", model=str(paths.model), tasks=str(paths.tasks)
    )
    with pytest.raises(InputError) as caught:
        bench_phone(config, quiet=True)
    assert [line.split(" has ")[0] for line in caught.value.problems] == [
        f"{file}: line 3 (row 2)" for file in files
    ]
