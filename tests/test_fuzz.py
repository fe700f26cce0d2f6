"""Damaged and hostile files: each ends in our own error or is read, whatever is in it.

Inputs are drawn from a fixed seed, the same in every run; `--inputs 100000` draws more of them.
"""

import copy
import json
import shutil

import mlx.core as mx
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_compact_pack import ABOUT, ALL, SERVES, compressed
from test_gguf import write_gguf
from tiny import library, write_jsonl

from d2c_mlx.adapter import WEIGHTS
from d2c_mlx.budget import parse_budget
from d2c_mlx.compact import read_compact
from d2c_mlx.config import load_config
from d2c_mlx.convert import PEFT_WEIGHTS, read_adapter
from d2c_mlx.errors import InputError
from d2c_mlx.gguf import convert_gguf
from d2c_mlx.gguf_lora import save_gguf_lora
from d2c_mlx.model import BaseModel
from d2c_mlx.pack import load_pack
from d2c_mlx.packing import write_compact_pack, write_pack
from d2c_mlx.sources import find_adapters
from d2c_mlx.strict import match_end, parse_json
from d2c_mlx.tasks import load_task, load_unlabelled
from d2c_mlx.unpack import unpack

STRINGS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", ".", "..", "../x", "/etc/passwd", "a\x00b", "\x1b[2J", "a/b", "(a+)+$",
                     "[", "\ud800", "x" * 5000, "NaN", "float16", "0"]),
)  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2**65), st.floats(), STRINGS,
    st.sampled_from([10**400, -1, 0, 1e308, 5e-324]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
    max_leaves=5,
)
# Text that is nearly JSON, put in place of a file.
TEXTS = st.sampled_from(
    [b"", b"{", b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 50_000, b"null",
     b"1e999", b'{"a": 1, "a": 2}', b"9" * 5000, b'"\\ud800"', b"NaN", b"{}\r\n{}", b"\x00" * 64]
)  # fmt: skip


@st.composite
def damaged(draw, content, head=None):
    """Bytes with some changes; most of them in the first `head`, where the structure is."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        end = len(data) if head is None or draw(st.integers(0, 3)) == 0 else min(head, len(data))
        at = draw(st.integers(0, max(end - 1, 0)))
        kind = draw(st.sampled_from(["bit", "byte", "cut", "insert", "drop", "copy", "length"]))
        if kind == "bit" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and data:
            data[at] = draw(st.sampled_from(b'0123456789"{}[],:\x00\xff'))
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=12))
        elif kind == "drop":
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == "copy":
            data[at:at] = data[: draw(st.integers(0, 64))]
        elif kind == "length":
            data[:8] = draw(st.sampled_from([0, 1, len(data), 2**31, 2**63])).to_bytes(8, "little")
    return bytes(data)


@st.composite
def changed(draw, value):
    """A JSON value with some parts replaced, removed or added."""
    root = [copy.deepcopy(value)]
    for _ in range(draw(st.integers(1, 3))):
        place, key = root, 0
        while isinstance(place[key], dict | list) and place[key] and draw(st.integers(0, 5)):
            inner = place[key]
            keys = sorted(inner, key=str) if isinstance(inner, dict) else range(len(inner))
            place, key = inner, draw(st.sampled_from(list(keys)))
        kind = draw(st.sampled_from(["replace", "remove", "add"]))
        if kind == "remove" and place is not root:
            del place[key]
        elif kind == "add" and isinstance(place, dict):
            place[draw(STRINGS)] = draw(VALUES)
        else:
            place[key] = draw(VALUES)
    return root[0]


def as_json(strategy):
    """A JSON file of such values, or something that is nearly one."""
    dumped = strategy.map(lambda value: json.dumps(value).encode())
    return st.one_of(dumped, dumped, TEXTS, dumped.flatmap(damaged))


@pytest.fixture
def fuzz(request):
    """Calls a check with every input; an InputError is a good end, whatever else is raised not."""

    def run(strategy, check):
        """Check so many inputs."""

        @settings(
            max_examples=request.config.getoption("--inputs"), derandomize=True, database=None,
            deadline=None, suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(strategy)
        def inputs(one):
            try:
                check(one)
            except InputError as error:
                assert error.problems and all("\n" not in line for line in error.problems)
                str(error).encode()  # it can be printed

        inputs()

    return run


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return library(tmp_path_factory.mktemp("fuzz"), ["one", "two"])


@pytest.fixture(scope="module")
def adapters(paths):
    return [read_adapter(paths.adapters / name, ALL) for name in ("one", "two")]


@pytest.fixture(params=["peft", "mlx"])
def directory(request, tmp_path, paths, adapters):
    """One adapter in either layout, to be damaged; and the name of its weights."""
    if request.param == "peft":
        shutil.copytree(paths.adapters / "one", tmp_path / "one")
        return tmp_path / "one", PEFT_WEIGHTS
    adapters[0].save(tmp_path / "one", 2)
    return tmp_path / "one", WEIGHTS


def used(adapter):
    """What a run does with an adapter first."""
    assert all(ALL[path] == lora.shape for path, lora in adapter.modules.items())
    assert adapter.uniform().files(2)


def test_weights_of_an_adapter(fuzz, directory):
    folder, name = directory
    content = (folder / name).read_bytes()

    def check(data):
        (folder / name).write_bytes(data)
        used(read_adapter(folder, ALL))

    head = 8 + int.from_bytes(content[:8], "little")
    fuzz(damaged(content, head), check)


def test_config_of_an_adapter(fuzz, directory):
    folder, _ = directory
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    patterns = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.0.*": 3}}

    def check(data):
        path.write_bytes(data)
        used(read_adapter(folder, ALL))

    more = config if "r" not in config else config | patterns
    fuzz(as_json(changed(more)), check)


@pytest.fixture
def plain(tmp_path, adapters):
    return write_pack(tmp_path / "pack", adapters, **ABOUT, max_bytes=None)


@pytest.fixture
def compact(tmp_path, adapters):
    return write_compact_pack(tmp_path / "pack", compressed(adapters), SERVES, **ABOUT,
                              max_bytes=None)  # fmt: skip


@pytest.mark.parametrize("storage", ["plain", "compact"])
def test_manifest_of_a_pack(fuzz, storage, request, tmp_path):
    pack = request.getfixturevalue(storage)
    before = sorted(tmp_path.rglob("*"))

    def check(data):
        (pack.path / "manifest.json").write_bytes(data)
        try:
            opened = load_pack(pack.path)
            for task in opened.tasks:
                opened.load(task)
            unpack(opened, tmp_path / "plain")
        finally:
            shutil.rmtree(tmp_path / "plain", ignore_errors=True)
            assert sorted(tmp_path.rglob("*")) == before

    fuzz(as_json(changed(pack.manifest)), check)


def test_file_of_a_compact_pack(fuzz, compact):
    path = compact.path / "compact.safetensors"
    content = path.read_bytes()

    def check(data):
        path.write_bytes(data)
        for k in range(3):
            read_compact(path, k).adapter()

    fuzz(damaged(content, 8 + int.from_bytes(content[:8], "little")), check)


def test_index_of_a_compact_pack(fuzz, compact):
    """The header's JSON, with a length that fits and tensors where they were."""
    path = compact.path / "compact.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, tensors = json.loads(content[8 : 8 + size]), content[8 + size :]
    index = json.loads(header["__metadata__"]["index"])

    def check(index):
        about = {**header["__metadata__"], "index": json.dumps(index)}
        text = json.dumps({**header, "__metadata__": about}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + tensors)
        for k in range(3):
            read_compact(path, k).adapter()

    fuzz(changed(index), check)


def test_a_gguf(fuzz, tmp_path, paths):
    content = write_gguf(paths.model, tmp_path / "good.gguf", mx.float16).read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(paths.model / name, tmp_path / name)

    def check(data):
        (tmp_path / "x.gguf").write_bytes(data)
        (tmp_path / "out").mkdir()
        try:
            convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
        finally:
            shutil.rmtree(tmp_path / "out")

    fuzz(damaged(content, 6000), check)


def test_a_gguf_adapter(fuzz, tmp_path, adapters, base):
    path = tmp_path / "x.gguf"
    save_gguf_lora(adapters[0], path, base.config)
    content = path.read_bytes()

    def check(data):
        path.write_bytes(data)
        used(read_adapter(path, ALL, base.config))

    head = content.rindex(b".lora_b")
    fuzz(damaged(content, head), check)


@pytest.fixture(scope="module")
def base(paths):
    return BaseModel(str(paths.model))


PROMPTS = [{"prompt": f"Question {i}?", "completion": "An answer."} for i in range(2)]
ANSWER = {"role": "assistant", "content": "An answer."}
CHATS = [{"messages": [{"role": "user", "content": f"Question {i}?"}, ANSWER]} for i in range(2)]
ROWS = st.one_of(changed(PROMPTS), changed(CHATS), changed([{"text": "A text."}]))


def lines(rows):
    """JSONL of what should be a list of rows."""
    return "\n".join(map(json.dumps, rows if isinstance(rows, list) else [rows])).encode()


JSONL = st.one_of(ROWS.map(lines), TEXTS, ROWS.map(lines).flatmap(damaged))


def test_rows_of_a_task(fuzz, tmp_path, base):
    write_jsonl(tmp_path / "t" / "test.jsonl", [{"prompt": "Else?", "completion": "Else."}])

    def check(data):
        (tmp_path / "t" / "probe.jsonl").write_bytes(data)
        task = load_task(tmp_path / "t")
        assert base.encode(task.name, task.probe).n_targets > 0

    fuzz(JSONL, check)


def test_prompts_without_answers(fuzz, tmp_path, paths, base):
    tasks = [load_task(paths.tasks / name) for name in ("one", "two")]
    rows = [{"task": "one", "prompt": "What else?"},
            {"task": "two", "messages": [{"role": "user", "content": "And else?"}]}]  # fmt: skip

    def check(data):
        (tmp_path / "prompts.jsonl").write_bytes(data)
        for name, found in load_unlabelled(tmp_path / "prompts.jsonl", tasks, 2).items():
            base.encode(name, found)

    fuzz(st.one_of(changed(rows).map(lines), TEXTS), check)


def test_config_of_a_run(fuzz, tmp_path):
    path = tmp_path / "config.yaml"
    good = {"adapters": "a", "tasks": "t", "output": "o", "budget": "25%", "init": ["table"],
            "scale": 1.5, "seed": 3, "refine": False, "memory_limit": "3GB"}  # fmt: skip

    def check(data):
        path.write_bytes(data)
        load_config(path, {})

    dumped = changed(good).map(lambda value: yaml.dump(value, allow_unicode=True).encode(
        "utf-8", "surrogatepass"))  # fmt: skip
    fuzz(st.one_of(dumped, TEXTS, dumped.flatmap(damaged)), check)


def test_budgets(fuzz):
    digits = st.text("0123456789.%eE-+ MGKBmgkb٣", max_size=12)
    fuzz(st.one_of(STRINGS, digits, VALUES), parse_budget)


@pytest.mark.parametrize(
    "text, why",
    [("NaN", "no JSON"), ('{"a": -Infinity}', "no JSON"), ("1e999", "64 bits"),
     ("1" * 30, "64 bits"), ('{"a": 1, "b": {"c": 1, "c": 1}}', "'c' is there twice"),
     ('["\\ud800"]', "surrogate"), ("[" * 100_000, "nested too deeply"), ("{", "Expecting")],
)  # fmt: skip
def test_json_that_is_none(text, why):
    with pytest.raises(ValueError, match=why):
        parse_json(text)


def test_json():
    value = {"a": [1, -2.5, None, True, "ä\U0001f600", 2**64 - 1], "b": {}}
    assert (
        parse_json(json.dumps(value)) == parse_json(json.dumps(value, ensure_ascii=False)) == value
    )


def test_a_pattern_that_would_not_end():
    path = "model.layers.0.self_attn.q_proj"
    assert match_end("q_proj", path) and match_end(r"layers\.[0-3]\..*proj", path)
    assert not match_end("proj", path)
    with pytest.raises(ValueError, match="more than 1 s"):
        match_end("(a|aa)+", "a" * 60 + "!")


@pytest.mark.parametrize(
    "names, problem",
    [(["Q", "q"], "'Q' and 'q' are one name on a Mac"), (["a\nb"], "characters that are not pri")],
)
def test_names_that_a_mac_cannot_hold(tmp_path, names, problem):
    for name in names:
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=problem):
        find_adapters(tmp_path)
