"""Does mlx-swift itself, on Linux's CPU, get mlx-lm's numbers from our packs and exports?

mlx-swift's and mlx-swift-lm's own sources are compiled against the library of MLX's wheel. Two
places that Swift 6.0 or Linux does not have are left out of a copy: ChatSession.swift, and how a
number of JSON is told from a boolean.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.compress.quantize import compress
from d2c_mlx.packs.export import export
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.write import write_pack

ROOT = Path(__file__).parents[2]
# The model in mlx_swift.swift: two blocks of these modules.
SHAPES = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (32, 16), "self_attn.v_proj": (32, 16),
          "self_attn.o_proj": (32, 32), "mlp.gate_proj": (32, 64), "mlp.up_proj": (32, 64),
          "mlp.down_proj": (64, 32)}  # fmt: skip
# Swift module -> its folder in the checkouts, in the order of their imports.
MODULES = {
    "RealModule": "swift-numerics/Sources/RealModule",
    "IntegerUtilities": "swift-numerics/Sources/IntegerUtilities",
    "ComplexModule": "swift-numerics/Sources/ComplexModule",
    "Numerics": "swift-numerics/Sources/Numerics",
    "MLX": "mlx-swift/Source/MLX",
    "MLXNN": "mlx-swift/Source/MLXNN",
    "MLXLMCommon": "mlx-swift-lm/Libraries/MLXLMCommon",
    "D2CPack": str(ROOT / "examples/swift/Sources/D2CPack"),
    "TaskSwitch": str(ROOT / "examples/swift/mlx/Sources/TaskSwitch"),
    "Check": str(Path(__file__).with_suffix(".swift")),
}
WHEELS = ("mlx==0.31.1", "mlx-cpu==0.31.1")


def write_packs(work: Path) -> None:
    """A compact and a plain pack of two tasks, the second of few modules, and both exports."""
    rng = np.random.default_rng(0)

    def adapter(name, paths):
        modules = {}
        for i, path in enumerate(paths):
            n_in, n_out = SHAPES[path.split(".", 3)[3]]
            a, b = rng.normal(size=(n_in, 1 + i % 4)), rng.normal(size=(1 + i % 4, n_out))
            modules[path] = LoRA(*(mx.array(x.astype(np.float16)) for x in (a / 8, b / 8)))
        return Adapter(name, modules, "tiny", (name,)).uniform(mx.float16)

    paths = [f"model.layers.{i}.{key}" for i in range(2) for key in SHAPES]
    both = [adapter("one", paths), adapter("two", [paths[2], paths[9], paths[13]])]
    info = Manifest("tiny", "0" * 64, n_layers=2)
    small = [
        compress(one, {p: [(1, 4), (1 + i % 3, 3)][: 1 + i % 2] for i, p in enumerate(one.modules)})
        for one in both
    ]
    for pack in (
        write_pack(work / "compact" / "pack", small, info, {"one": 0, "two": 1}),
        write_pack(work / "plain" / "pack", both, info),
    ):
        export(pack, "mlx", pack.path.parent / "mlx")
        export(pack, "mlx-swift", pack.path.parent / "swift")


def build_mlx_c(sources: Path, work: Path) -> Path:
    """Compile mlx-c; returns the folder of MLX's library."""
    if not (work / "wheel").exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target",
                        work / "wheel", *WHEELS], check=True)  # fmt: skip
    include, lib = work / "wheel/mlx/include", (work / "wheel/mlx/lib").resolve()
    compiler = ["g++", "-std=c++20", "-O0", "-fPIC", "-w", "-I", include, "-I", sources / "mlx-c"]
    header = work / "all.h"
    header.write_text('#include "mlx/mlx.h"\n')
    if not (work / "libmlxc.so").exists():
        subprocess.run([*compiler, "-x", "c++-header", header, "-o", f"{header}.gch"], check=True)
        files = [f for f in (sources / "mlx-c/mlx/c").glob("*.cpp") if f.name != "cuda.cpp"]
        link = ["-o", work / "libmlxc.so", f"-L{lib}", "-lmlx", f"-Wl,-rpath,{lib}"]
        subprocess.run([*compiler, "-include", header, "-shared", *files, *link], check=True)
    return lib


def build_swift(sources: Path, work: Path) -> None:
    """Compile every module that has no object yet; our own always."""
    copy = work / "sources"
    if not copy.exists():
        shutil.copytree(sources / "mlx-swift-lm/Libraries", copy / "mlx-swift-lm/Libraries")
        (copy / "mlx-swift-lm/Libraries/MLXLMCommon/ChatSession.swift").unlink()
        value = copy / "mlx-swift-lm/Libraries/MLXLMCommon/Tool/Value.swift"
        value.write_text(value.read_text().replace(
            "CFGetTypeID(number) == CFBooleanGetTypeID()",
            'String(cString: number.objCType) == "c"'))  # fmt: skip
    paths = [f"-I{work}", f"-I{sources / 'mlx-swift/Source/Cmlx/include'}",
             f"-I{sources / 'swift-numerics/Sources/_NumericsShims/include'}"]  # fmt: skip
    for module, folder in MODULES.items():
        target = work / f"{module}.o"
        place = (copy if module == "MLXLMCommon" else sources) / folder
        files = [place] if place.suffix else sorted(place.rglob("*.swift"))
        # Metal is not on Linux, and mlx-swift's own package leaves its file out there.
        files = [file for file in files if not file.name.endswith("Metal.swift")]
        if target.exists() and ROOT not in place.parents:
            continue
        made = ["-emit-module", "-emit-module-path", work / f"{module}.swiftmodule", "-o", target]
        subprocess.run(["swiftc", "-wmo", "-Onone", "-parse-as-library", "-swift-version", "5",
                        "-package-name", "p", "-module-name", module, *paths, "-c", *files, *made],
                       check=True)  # fmt: skip


def main() -> None:
    """Build, run, and say what is off."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", type=Path, help="holds checkouts of mlx-swift 0.31.6,"
                        " mlx-swift-lm 1441444, mlx-c 0726ca9 and swift-numerics")  # fmt: skip
    parser.add_argument("--work", type=Path, default=Path("runs/mlx-swift"))
    options = parser.parse_args()
    work = options.work.resolve()
    shutil.rmtree(work / "packs", ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    write_packs(work / "packs")
    lib = build_mlx_c(options.sources.resolve(), work)
    build_swift(options.sources.resolve(), work)
    rpaths = [x for path in (work, lib) for x in ("-Xlinker", "-rpath", "-Xlinker", str(path))]
    subprocess.run(["swiftc", *(work / f"{module}.o" for module in MODULES), f"-L{work}", "-lmlxc",
                    f"-L{lib}", "-lmlx", *rpaths, "-o", work / "check"], check=True)  # fmt: skip
    subprocess.run([work / "check", work / "packs"], check=True)


if __name__ == "__main__":
    main()
