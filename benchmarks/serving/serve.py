"""A pack served to many clients at once: rate and first token, beside stock mlx-lm's server.

    python -m benchmarks.serving.serve --library DIR [--adapters 8] [--clients 1,4,16]
        [--requests 3]

Held-out prompts of eight tasks, greedy answers of 32 tokens at most, streamed. *one*: all of them
under one task's adapter; *mixed*: each under its own task's. Every reply of `d2c-mlx serve` is
compared with what the base answers offline under the same adapter. Stock mlx-lm (mixed only, its
adapter named in every request) is `mlx_lm.server` on the same base in float32 with the same BLAS;
it gets fewer requests, because it loads the model again for each change. Servers are processes of
their own on the same cores as the clients; seconds are those of the clients, start-up is not in
them.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

import openai

from benchmarks import command_line
from benchmarks.common import load_library
from benchmarks.stock_models import torch_base
from d2c_mlx.models.tasks import load_task
from d2c_mlx.packs.pack import PackInfo
from d2c_mlx.packs.write import write_pack
from d2c_mlx.utils.device import environment
from d2c_mlx.utils.files import write_json

TOKENS = 32
STOCK = "import sys, d2c_mlx; from mlx_lm.server import main; sys.argv[0] = 'mlx_lm.server'; main()"


@contextmanager
def server(code, *arguments):
    """A server in a process of its own; the address is what it prints, or where it was told."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
    for line in process.stdout:
        found = re.search(r"http://\S+:\d+/v1|port (\d+)", line)
        if found:
            port = found.group(1)
            break
    else:
        raise SystemExit(f"{command} did not start")
    # What it logs is read, or it would wait.
    ThreadPoolExecutor(1).submit(lambda: [None for _ in process.stdout])
    try:
        yield f"http://127.0.0.1:{port}/v1" if port else found.group(0)
    finally:
        process.terminate()
        process.wait()


def ask(api, job, options):
    """`(text, seconds to its first token, tokens)`."""
    started, first, words, usage = time.perf_counter(), None, [], None
    stream = api.chat.completions.create(
        messages=job["messages"], max_tokens=TOKENS, temperature=0, stream=True,
        stream_options={"include_usage": True}, **options(job),
    )  # fmt: skip
    for one in stream:
        if one.choices and one.choices[0].delta.content:
            first = first or time.perf_counter() - started
            words.append(one.choices[0].delta.content)
        usage = one.usage or usage
    return "".join(words), first or time.perf_counter() - started, usage.completion_tokens


def measure(url, jobs, n_clients, options):
    """All jobs by so many clients."""
    with openai.OpenAI(base_url=url, api_key="-", max_retries=0, timeout=600) as api:
        ask(api, jobs[0], options)  # not counted
        started = time.perf_counter()
        with ThreadPoolExecutor(n_clients) as pool:
            replies = list(pool.map(lambda job: ask(api, job, options), jobs))
        seconds = time.perf_counter() - started
    tokens = sum(n for _, _, n in replies)
    return [text for text, _, _ in replies], {
        "clients": n_clients, "requests": len(jobs), "tokens": tokens,
        "seconds": round(seconds, 2), "tokens_per_s": round(tokens / seconds, 2),
        "requests_per_s": round(len(jobs) / seconds, 3),
        "first_token_s": round(statistics.median(first for _, first, _ in replies), 3),
    }  # fmt: skip


def offline(base, adapter, messages):
    """The answer of the base under an adapter, alone."""
    tokenizer = base.tokenizer
    prompt = tokenizer.apply_chat_template([dict(m) for m in messages], add_generation_prompt=True)
    base.attach(adapter)
    words = tokenizer.detokenizer
    for token in base.answer(prompt, TOKENS):
        if token not in tokenizer.eos_token_ids:
            words.add_token(token)
    words.finalize()
    return words.text


def messages_of(row):
    """A row's prompt as messages."""
    if "messages" in row:
        return row["messages"][:-1]
    return [{"role": "user", "content": row["prompt"]}]


class Requests:
    """Prompts of held-out rows, one task after the other, and their answers offline."""

    def __init__(self, base, adapters, tests):
        """Take the base, and by task an adapter and rows."""
        self._base, self._adapters, self._tests, self._known = base, adapters, tests, {}
        self.names = list(adapters)

    def first(self, n):
        """The first n of them."""
        tasks = [(i // len(self.names), self.names[i % len(self.names)]) for i in range(n)]
        return [{"task": name, "messages": messages_of(self._tests[name][i])} for i, name in tasks]

    def differing(self, jobs, texts, task):
        """How many texts are not what the base answers offline, under the job's task or this."""
        found = 0
        for job, text in zip(jobs, texts):
            name = task or job["task"]
            key = name, json.dumps(job["messages"])
            if key not in self._known:
                self._known[key] = offline(self._base, self._adapters[name], job["messages"])
            found += text != self._known[key]
        return found


def measure_ours(pack, requests, options):
    """Rows of `d2c-mlx serve`: all clients on one adapter, and each on its own task's."""
    code = "from d2c_mlx_cli.main import main; main()"
    with server(code, "serve", pack.path, "--port", 0) as url:
        for n in map(int, options.clients.split(",")):
            jobs = requests.first(max(8, n * options.requests))
            for kind, task in (("one", requests.names[0]), ("mixed", None)):
                texts, row = measure(
                    url, jobs, n, lambda job, task=task: {"model": task or job["task"]}
                )
                yield {"server": "d2c-mlx", "adapters": kind, **row,
                       "not_as_offline": requests.differing(jobs, texts, task)}  # fmt: skip


def measure_stock(pack, requests, options, model):
    """Rows of `mlx_lm.server`, which loads the model again for each change of adapter."""

    def named(job):
        adapter = str(pack.adapter_path(job["task"]))
        return {"model": str(model), "extra_body": {"adapters": adapter}}

    with server(STOCK, "--model", model, "--port", 8979, "--log-level", "INFO") as url:
        for n in map(int, options.clients.split(",")):
            _, row = measure(url, requests.first(options.stock_requests), n, named)
            yield {"server": "mlx_lm.server", "adapters": "mixed", **row}


def float_model(base, directory):
    """The base in float32 as mlx-lm's server loads it."""
    directory.mkdir()
    torch_base(base, directory)
    for file in base.path.iterdir():
        if file.name.startswith(("token", "chat_template")):
            (directory / file.name).write_bytes(file.read_bytes())
    return directory


def main():
    """Measure, print, write."""
    parser = command_line(__doc__, __spec__, "serve.json")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--requests", type=int, default=3, help="of each client; 8 in all at least")
    parser.add_argument("--stock-requests", type=int, default=8)
    options = parser.parse_args()
    base, adapters, paths, _ = load_library(options.library, 1, options.adapters)
    names = [path.name for path in paths]
    tests = {name: load_task(options.library / "tasks" / name).test for name in names}
    requests, rows = Requests(base, dict(zip(names, adapters)), tests), []
    with tempfile.TemporaryDirectory() as directory:
        pack = write_pack(
            Path(directory) / "run" / "pack",
            [replace(one, sources=(name,)) for one, name in zip(adapters, names)],
            PackInfo(model=base.name, config_hash=base.config_hash, n_layers=base.n_layers,
                     budget=str(len(names))),
        )  # fmt: skip
        model = float_model(base, Path(directory) / "float")
        for row in chain(
            measure_ours(pack, requests, options), measure_stock(pack, requests, options, model)
        ):
            rows.append(row)
            print(json.dumps(row), flush=True)
            about = {"max_tokens": TOKENS, "environment": environment()}
            write_json(options.output, {**about, "rows": rows})


if __name__ == "__main__":
    main()
