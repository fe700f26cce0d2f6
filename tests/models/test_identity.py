"""Which base a directory holds, models converted once, and directories that strangers sent."""

import io
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.tiny import LAYERS, edit_json, tiny_model
from safetensors.numpy import load_file, save_file

from d2c_mlx.models import trial
from d2c_mlx.models.model import Model
from d2c_mlx.models.resolve import cached_model, config_digest, resolve_model, weights_digest
from d2c_mlx.models.stock import load_stock
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.write import write_pack
from d2c_mlx.serve.load import load
from d2c_mlx.utils.errors import ModelError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("identity") / "model")


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "copy")


def test_the_order_and_the_files_of_tensors_do_not_count(model, copy):
    digest, tensors = weights_digest(model), load_file(copy / "model.safetensors")
    names = sorted(tensors)
    (copy / "model.safetensors").unlink()
    second = copy / "model-2-of-2.safetensors"
    save_file({n: tensors[n] for n in names[3:]}, copy / "model-1-of-2.safetensors")
    save_file({n: tensors[n] for n in names[:3]}, second)
    assert weights_digest(copy) == digest
    tensors[names[0]] = tensors[names[0]] + 1
    save_file({n: tensors[n] for n in names[:3]}, second)
    assert weights_digest(copy) != digest
    second.write_bytes(b"\x09" * 40)
    pytest.raises(ModelError, weights_digest, copy).match("not a safetensors file")


def test_a_pack_takes_its_base_and_refuses_another(model, copy, tmp_path, command):
    base = Model(str(model))
    about = Manifest(model="tiny", config_hash=base.config_hash, n_layers=LAYERS,
                     weights_hash=base.weights_hash)  # fmt: skip
    pack = write_pack(tmp_path / "pack", [], about, {"one": None})
    # However it is indented.
    edit_json(copy / "config.json")
    assert pack.base_directory(str(copy)) == copy
    edit_json(copy / "config.json", rope_theta=20000.0)
    pytest.raises(ModelError, pack.base_directory, str(copy)).match("is not the config of 'tiny'")
    other = tiny_model(tmp_path / "other", seed=1)
    assert config_digest(other) == config_digest(model)
    words = "has the config of the pack's base model but other weights"
    for use in (pack.base_directory, lambda model: load(pack, "one", model)):
        pytest.raises(ModelError, use, str(other)).match(words)
    load(pack, "one", str(model))
    code, _, problem = command("route", pack.path, "x", "--model", other)
    assert (code, problem.count("\n")) == (2, 1) and words in problem


def test_a_digest_is_kept_until_something_touches_the_file(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / "cache"))
    path = copy / "model.safetensors"
    content, before, digest = bytearray(path.read_bytes()), path.stat(), weights_digest(copy)
    (kept,) = (tmp_path / "cache" / "digests").iterdir()
    kept.write_text('"read"')
    assert weights_digest(copy) == "read"
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights_digest(copy) not in ("read", digest)


def test_a_model_is_written_once_by_those_who_start_together(tmp_path, monkeypatch):
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / "cache"))
    writes = []

    def write(directory):
        writes.append(directory)
        time.sleep(0.1)

    with ThreadPoolExecutor(2) as pool:
        paths = set(pool.map(lambda _: cached_model("m", ["x"], write), range(2)))
    assert len(writes) == len(paths) == 1


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_code_in_a_model_directory_is_never_run(copy, tmp_path, monkeypatch, file):
    """transformers would ask, and take a y from standard input."""
    ran, answers = tmp_path / "ran", io.StringIO("y\n" * 9)
    (copy / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    entry = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    changes = {"auto_map": entry, "tokenizer_class": "Evil", "model_file": "evil.py"}
    edit_json(copy / file, **changes)
    monkeypatch.setattr(sys, "stdin", answers)
    with pytest.raises(ModelError, match="needs Python code from this directory") as caught:
        load_stock(copy)
    assert len(caught.value.problems) == 1 and not ran.exists() and answers.tell() == 0


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_or_a_device_in_a_model_directory(copy, file):
    (copy / file).unlink()
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(copy / file)
        pytest.raises(ModelError, load_stock, copy).match("is no regular file")
        (copy / file).unlink()
    with open(copy / file, "wb") as sparse:
        sparse.truncate(3 << 30)
    words = "3,221,225,472 bytes, at most" if file.endswith("json") else "cannot load"
    pytest.raises(ModelError, load_stock, copy).match(words)


# Chat templates and tokenizers of strangers that would run for ever, or end the process

LOOP = "{% for _ in range(99999) %}"
BAD = {
    "nested loops": LOOP * 3 + "{% endfor %}" * 3,
    "several": [{"name": "default", "template": LOOP * 3 + "{% endfor %}" * 3}],
    "doubling": LOOP + "{% set x.y = x.y ~ x.y %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "long": LOOP + "0123456789abcdef{% endfor %}",
    "growing": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 99}] * 6,
    "panic": [{"type": "Replace", "pattern": {"String": ""}, "content": "x" * 8}],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BAD)
def test_a_model_whose_texts_do_not_end_is_refused(copy, monkeypatch, kind):
    monkeypatch.setattr(trial, "_SECONDS", 1)
    if isinstance(BAD[kind], str):
        start = "{% set x = namespace(y='ab') %}"
        (copy / "chat_template.jinja").write_text(start + BAD[kind])
    elif kind == "several":
        (copy / "chat_template.jinja").unlink()
        edit_json(copy / "tokenizer_config.json", chat_template=BAD[kind])
    else:
        normalizer = {"type": "Sequence", "normalizers": BAD[kind]}
        edit_json(copy / "tokenizer.json", normalizer=normalizer)
    with pytest.raises(ModelError, match=f"^{copy}: .* for a short conversation, or ends its"):
        resolve_model(str(copy))


def test_a_model_is_tried_once_until_its_texts_change(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / "cache"))
    tried = []
    monkeypatch.setattr("d2c_mlx.models.resolve.try_texts", lambda path: tried.append(path) or "x")
    for _ in range(2):
        resolve_model(str(copy))
    # An error in words is told where the file is used.
    (copy / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    resolve_model(str(copy))
    assert tried == [copy] * 2
    monkeypatch.undo()
    assert trial.try_texts(copy) == "good"
