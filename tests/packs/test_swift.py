"""The reader in examples/swift: the bytes that `unpack` writes, and packs of strangers.

apt-get install swiftlang                    # or Xcode
pytest tests/packs/test_swift.py --inputs 6400         # more hostile packs
"""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers import ROOT
from helpers.adapters import COMPACT_ABOUT, DTYPES, SERVES, adapter_of, compressed
from helpers.damage import changed, damaged, rehash
from helpers.targets import KEPT

from d2c_mlx import InputError, export, load_pack, verify
from d2c_mlx.compress.compressed import BITS
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.write import write_pack

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("swift"), reason="no swift: apt-get install swiftlang"),
]
MANIFEST, COMPACT, WEIGHTS = "manifest.json", "compact.safetensors", "adapters.safetensors"
PLAIN = f"cluster-0/{WEIGHTS}"
# A pack of a few KB; one that asks for more than that is refused before.
_ADDRESSES = 2 << 30


@pytest.fixture(scope="module")
def swift():
    """`swift(*argv)`: exit code, lines of standard output and standard error."""
    build = ["swift", "build", "-c", "release", "--package-path", str(ROOT / "examples" / "swift"),
             "--scratch-path", str(ROOT / "build" / "swift")]  # fmt: skip
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = subprocess.run([*build, "--show-bin-path"], capture_output=True, text=True, check=True)

    def limit():
        # A Mac does not have this limit.
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, _ADDRESSES))

    def call(*argv):
        done = subprocess.run([f"{shown.stdout.strip()}/d2c-pack", *map(str, argv)], timeout=300,
                              capture_output=True, text=True, preexec_fn=limit)  # fmt: skip
        return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()

    return call


def plain_pack(path, adapters):
    named = [replace(adapter, sources=(adapter.name,)) for adapter in adapters]
    return write_pack(path, named, Manifest(**COMPACT_ABOUT))


def tensors(path):
    return {
        name: (str(x.dtype), x.shape, np.array(x.view(mx.uint8)).tobytes())
        for name, x in mx.load(str(path / WEIGHTS)).items()
    }


def assert_same(ours, theirs, configs=True):
    tasks = json.loads((ours / "tasks.json").read_text())
    assert tasks == json.loads((theirs / "tasks.json").read_text())
    names = {name for name in tasks.values() if name}
    assert {path.name for path in theirs.iterdir()} == {*names, "tasks.json"}
    for name in names:
        assert tensors(ours / name) == tensors(theirs / name)
        paths = (root / name / "adapter_config.json" for root in (ours, theirs))
        config, other = (json.loads(path.read_text()) for path in paths)
        assert config == other or not configs


@pytest.mark.parametrize("bits", BITS)
def test_packs_are_what_unpack_writes(swift, tmp_path, bits):
    """Widths that are no whole groups; ranks and bits that differ by module."""
    small = compressed([adapter_of("one"), adapter_of("two", mixed=True, seed=1)], bits)
    for dtype in DTYPES:
        root = tmp_path / str(dtype)
        pack = write_pack(root / "pack", small, Manifest(**COMPACT_ABOUT, dtype=dtype), SERVES)
        plain = plain_pack(root / "plain", [adapter_of(name, dtype=dtype) for name in ("a", "b")])
        for source, to, options in (
            (pack, "mlx", []), (pack, "mlx-swift", ["--own-ranks"]), (plain, "mlx", [])
        ):  # fmt: skip
            ours, theirs = (root / f"{source.storage}-{to}-{name}" for name in ("ours", "theirs"))
            export(source, to, ours)
            assert swift("unpack", *options, source.path, theirs) == (0, [], [])
            assert_same(ours, theirs)
    lines = [f"{name} cluster-{k} rank 3 14 modules" for k, name in enumerate("ab")]
    assert swift("list", plain.path) == (0, lines, [])


def read_header_index(content):
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(header["__metadata__"]["index"])


def with_index(content, index):
    """A compact file with another index in a header whose length fits."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"]["index"] = index.decode("utf-8", "replace")
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[end:]


# What asks for more than there is.
ENDLESS = [
    lambda index: index["modules"][0].__setitem__(3, "0-999999999999"),
    lambda index: index["modules"].__setitem__(0, ["*" * 250, 32, 32, "0-65535"]),
    lambda index: index["modules"][0].__setitem__(1, 1 << 62),
    lambda index: index.update(names=["x"] * 200_000, bits=[]),
    lambda index: index.update(bits=[4] * 100_000, group_size=0),
]


def hostile(packs, n, draw):
    """(pack to change, its file, bytes): what Python's fuzzing kept, and `n` more of each kind."""
    for pack, name, kind in (
        ("plain", MANIFEST, "manifest-plain"),
        ("compact", MANIFEST, "manifest-compact"),
        ("plain", "cluster-0/adapter_config.json", "config-mlx"),
    ):
        flat = json.dumps(json.loads((packs / pack / name).read_text())).encode()
        kept = [path.read_bytes() for path in sorted((KEPT / kind).iterdir())]
        for data in (*kept, *(changed(flat, draw) for _ in range(n))):
            yield pack, name, data
    for pack, name in (("compact", COMPACT), ("plain", PLAIN)):
        data = (packs / pack / name).read_bytes()
        head = 8 + int.from_bytes(data[:8], "little")
        for _ in range(3 * n):
            yield pack, name, damaged(data, draw, head)
    data = (packs / "compact" / COMPACT).read_bytes()
    index = json.dumps(read_header_index(data)).encode()
    kept = [path.read_bytes() for path in sorted((KEPT / "index").iterdir())]
    for change in ENDLESS:
        change(about := json.loads(index))
        kept.append(json.dumps(about).encode())
    for text in (*kept, *(changed(index, draw) for _ in range(2 * n))):
        yield "compact", COMPACT, with_index(data, text)
    for text in ("[" * 100_000, "[0" + ",0" * (1 << 21), "", "9" * 99):
        yield "compact", MANIFEST, text.encode()


def is_verified(path):
    try:
        return bool(verify(path))
    except InputError:
        return False


def test_hostile_packs_are_refused_without_a_crash(swift, tmp_path, request):
    """Whatever is verified here is verified by Python too; of what Python takes, little is not."""
    packs, damaged = tmp_path / "packs", []
    one, two = adapter_of("one"), adapter_of("two", mixed=True, seed=1)
    plain_pack(packs / "plain", [one, two.uniform(mx.float16)])
    write_pack(packs / "compact", compressed([one, two]), Manifest(**COMPACT_ABOUT), SERVES)
    n = request.config.getoption("--inputs") // 16
    for i, (pack, name, data) in enumerate(hostile(packs, n, random.Random(7))):
        damaged.append(tmp_path / "made" / str(i))
        shutil.copytree(packs / pack, damaged[-1], copy_function=os.link)
        (damaged[-1] / name).unlink()
        (damaged[-1] / name).write_bytes(data)
        if name != MANIFEST:
            (damaged[-1] / MANIFEST).rename(damaged[-1] / "linked")
            (damaged[-1] / MANIFEST).write_bytes((damaged[-1] / "linked").read_bytes())
            rehash(damaged[-1])
    lines = []
    for start in range(0, len(damaged), 500):
        code, out, err = swift("verify", *damaged[start : start + 500])
        assert code in (0, 2) and err == []
        lines += [line for line in out if not line.startswith(" ")]
    assert len(lines) == len(damaged) and all(line.isascii() for line in lines)
    theirs = [line == "verified" for line in lines]
    ours = list(map(is_verified, damaged))
    assert [path for path, a, b in zip(damaged, ours, theirs) if b and not a] == []
    # A number beyond 63 bits, a base that is no name, a module twice.
    assert sum(a and not b for a, b in zip(ours, theirs)) <= len(damaged) // 50
    good = [path for path, b in zip(damaged, theirs) if b]
    for path in random.Random(8).sample(good, 10):
        export(load_pack(path), "mlx", path / "ours")
        assert swift("unpack", path, path / "theirs") == (0, [], [])
        # Python copies a plain pack's config, with whatever else a stranger wrote into it.
        assert_same(path / "ours", path / "theirs", configs=False)
