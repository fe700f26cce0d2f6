"""What is fuzzed: files from strangers. Of each a good one, and what a run does with it.

`robustness/test_fuzz.py` draws inputs from a fixed seed, `robustness/fuzz.py` with atheris.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import yaml

from d2c_mlx import InputError, export, load_pack, read_adapter
from d2c_mlx.adapters.gguf_format import save_gguf
from d2c_mlx.adapters.peft_format import PEFT_WEIGHTS
from d2c_mlx.compress.budget import parse_budget
from d2c_mlx.compress.compact_file import read_compact
from d2c_mlx.models.gguf_import import convert_gguf
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import encode_task, load_task
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.write import write_pack
from d2c_mlx.run.config import load_config
from d2c_mlx.serve.requests import ChatRequest, RequestError, TextRequest, read_request
from helpers import ROOT
from helpers.adapters import COMPACT_ABOUT, SERVES, compressed
from helpers.gguf_files import write_gguf
from helpers.tiny import ALL, library, write_jsonl

MANIFEST, COMPACT, CONFIG = "manifest.json", "compact.safetensors", "adapter_config.json"
PROMPTS = [{"prompt": f"Question {i}?", "completion": "An answer."} for i in range(2)]
ANSWER = {"role": "assistant", "content": "An answer."}
CHATS = [{"messages": [{"role": "user", "content": f"Question {i}?"}, ANSWER]} for i in range(2)]
TEXTS = [{"text": "A text."}]
QUESTIONS = [{"prompt": "What else?"}, {"prompt": "And what then?"}]
OPTIONS = {"adapters": "a", "tasks": "t", "output": "o", "budget": "25%", "baselines": ["kmeans"],
           "seed": 3, "refine": False}  # fmt: skip
REQUEST = {"model": "one", "max_tokens": 4, "stop": ["x"], "stream": True, "temperature": 0.5,
           "stream_options": {"include_usage": True}}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """Something that reads what strangers wrote.

    Attributes:
        seeds: good inputs.
        check: reads one input; raises InputError, or whatever is wrong with our own code.
        head: so many bytes at the front hold the structure, the rest is numbers; None: all.
    """

    seeds: list[bytes]
    check: Callable[[bytes], None]
    head: int | None = None

    def take(self, data):
        """Read one input, or refuse it in lines that can be printed."""
        try:
            self.check(data)
        except InputError as error:
            assert error.problems and all("\n" not in line for line in error.problems)
            str(error).encode()


class Shared:
    """A tiny base model, two adapters and their tasks, for all targets."""

    def __init__(self, root: Path) -> None:
        self.paths = library(root / "library", ["one", "two"])
        self.adapters = [read_adapter(self.paths.adapters / name, ALL) for name in ("one", "two")]
        self.base = Model(str(self.paths.model))


def used(adapter):
    """What a run does with an adapter first."""
    assert all(ALL[path] == lora.shape for path, lora in adapter.modules.items())
    assert adapter.uniform().files(2)


def reading(path, read):
    """A check that writes its input to a file, which is read then."""

    def check(data):
        path.write_bytes(data)
        read()

    return check


def _header_end(content):
    return 8 + int.from_bytes(content[:8], "little")


def adapter(shared, root, layout, part):
    """Weights or config of an adapter in either layout, beside a good other."""
    folder = root / "one"
    if layout == "peft":
        shutil.copytree(shared.paths.adapters / "one", folder)
    else:
        shared.adapters[0].save(folder, 2)
    if part == "config":
        path = folder / CONFIG
    else:
        path = folder / (PEFT_WEIGHTS if layout == "peft" else "adapters.safetensors")
    content = path.read_bytes()
    if (layout, part) == ("peft", "config"):
        patterns = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.0.*": 3}}
        content = json.dumps(json.loads(content) | patterns).encode()

    check = reading(path, lambda: used(read_adapter(folder, ALL)))
    return Target([content], check, None if part == "config" else _header_end(content))


def _pack(shared, root, storage):
    stored, serves = compressed(shared.adapters), SERVES
    if storage == "plain":
        stored = [replace(adapter, sources=(adapter.name,)) for adapter in shared.adapters]
        serves = None
    return write_pack(root / "pack", stored, Manifest(**COMPACT_ABOUT), serves)


def manifest(shared, root, storage):
    """Manifest of a pack whose files are good; whatever it says, no file appears elsewhere."""
    pack = _pack(shared, root, storage)
    before = sorted(root.rglob("*"))

    def read():
        try:
            opened = load_pack(pack.path)
            for task in opened.tasks:
                opened.load(task)
            export(opened, "mlx", root / "plain")
        finally:
            shutil.rmtree(root / "plain", ignore_errors=True)
            assert sorted(root.rglob("*")) == before

    path = pack.path / MANIFEST
    return Target([path.read_bytes()], reading(path, read))


def compact(shared, root):
    """The file of a compact pack."""
    path = _pack(shared, root, "compact").path / COMPACT
    content = path.read_bytes()
    check = reading(path, lambda: [read_compact(path, k).adapter() for k in range(3)])
    return Target([content], check, _header_end(content))


def index(shared, root):
    """The index in that file, in a header whose lengths fit and with tensors where they were."""
    whole = compact(shared, root)
    header, tensors = json.loads(whole.seeds[0][8 : whole.head]), whole.seeds[0][whole.head :]

    def check(data):
        about = {**header["__metadata__"], "index": data.decode("utf-8", "replace")}
        text = json.dumps({**header, "__metadata__": about}).encode()
        whole.check(len(text).to_bytes(8, "little") + text + tensors)

    return Target([header["__metadata__"]["index"].encode()], check)


def gguf(shared, root):
    """A base model in GGUF."""
    path, model = root / "x.gguf", shared.paths.model
    content = write_gguf(model, path, mx.float16).read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model / name, root / name)

    def read():
        (root / "out").mkdir()
        try:
            convert_gguf(path, root / "out")
        finally:
            shutil.rmtree(root / "out")

    return Target([content], reading(path, read), 6000)


def gguf_adapter(shared, root):
    """A LoRA in GGUF."""
    path = root / "x.gguf"
    save_gguf(shared.adapters[0], path, shared.base.config)
    content = path.read_bytes()
    check = reading(path, lambda: used(read_adapter(path, ALL, shared.base.config)))
    return Target([content], check, content.rindex(b".lora_b"))


def lines(values):
    """JSONL of what should be a list of rows."""
    return "\n".join(map(json.dumps, values if isinstance(values, list) else [values])).encode()


def rows(shared, root):
    """Rows of a task."""
    path = root / "t" / "probe.jsonl"
    write_jsonl(root / "t" / "test.jsonl", [{"prompt": "Else?", "completion": "Else."}])

    def read():
        task = load_task(path.parent)
        assert shared.base.encode(task.name, task.probe).n_targets > 0

    return Target([lines(PROMPTS), lines(CHATS), lines(TEXTS)], reading(path, read))


def prompts(shared, root):
    """Rows of a task without answers, maybe beside some that have one."""
    path = root / "t" / "probe.jsonl"
    rows(shared, root)

    def read():
        task = load_task(path.parent, prompts=True).used(4, 4, extra=True)
        assert encode_task(shared.base.encode, task).calibration.n_targets > 0

    return Target([lines(PROMPTS[:1] + QUESTIONS), lines(QUESTIONS)], reading(path, read))


def options(shared, root):
    """Config of a run, in YAML."""
    path, seeds = root / "config.yaml", [yaml.safe_dump(OPTIONS), json.dumps(OPTIONS)]
    check = reading(path, lambda: load_config(path, {}))
    return Target([seed.encode() for seed in seeds], check)


def budget(shared, root):
    """What follows --budget."""
    forms = [b"12.5%", b"40MB", b"500KB", b"5", b"3%"]
    return Target(forms, lambda data: parse_budget(data.decode("utf-8", "surrogateescape")))


def request(shared, root):
    """Body of a request to the server, for both addresses."""

    def check(data):
        for kind in (TextRequest, ChatRequest):
            try:
                read_request(data, kind)
            except RequestError as refusal:
                assert refusal.status == 400 and json.dumps(refusal.body)

    chats = REQUEST | {"messages": CHATS[0]["messages"]}
    texts = REQUEST | {"prompt": "Else?"}
    return Target([json.dumps(request).encode() for request in (texts, chats)], check)


# Inputs that reached something new when `fuzz.py` ran, by target.
KEPT = ROOT / "tests" / "corpus"
# Name -> (shared, an empty directory) -> target.
TARGETS = {
    "weights-peft": lambda shared, root: adapter(shared, root, "peft", "weights"),
    "weights-mlx": lambda shared, root: adapter(shared, root, "mlx", "weights"),
    "config-peft": lambda shared, root: adapter(shared, root, "peft", "config"),
    "config-mlx": lambda shared, root: adapter(shared, root, "mlx", "config"),
    "manifest-plain": lambda shared, root: manifest(shared, root, "plain"),
    "manifest-compact": lambda shared, root: manifest(shared, root, "compact"),
    "compact": compact,
    "index": index,
    "gguf": gguf,
    "gguf-adapter": gguf_adapter,
    "rows": rows,
    "prompts": prompts,
    "options": options,
    "budget": budget,
    "request": request,
}
