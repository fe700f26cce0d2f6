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
from pathlib import Path

import openai

from benchmarks import RESULTS, command_line
from benchmarks.common import load_library
from benchmarks.stock_models import torch_base
from d2c_mlx.models.tasks import load_task
from d2c_mlx.packs.pack import PackInfo
from d2c_mlx.packs.write import write_pack
from d2c_mlx.utils.device import environment
from d2c_mlx.utils.files import write_json

RESULT = RESULTS / "serve.json"
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
    """What the base answers under an adapter, alone."""
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


def main():
    """Measure, print, write."""
    parser = command_line(__doc__, __spec__)
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--requests", type=int, default=3, help="of each client; 8 in all at least")
    parser.add_argument("--stock-requests", type=int, default=8)
    options = parser.parse_args()
    base, adapters, paths, _ = load_library(options.library, 1, options.adapters)
    names = [path.name for path in paths]
    tests = [load_task(options.library / "tasks" / name).test for name in names]
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        pack = write_pack(
            Path(directory) / "run" / "pack",
            [replace(one, sources=(name,)) for one, name in zip(adapters, names)],
            PackInfo(
                model=base.name,
                config_hash=base.config_hash,
                n_layers=base.n_layers,
                budget=str(len(names)),
            ),
        )
        known = {}

        def differing(jobs, texts, task):
            found = 0
            for job, text in zip(jobs, texts):
                name = task or job["task"]
                key = name, json.dumps(job["messages"])
                if key not in known:
                    adapter = adapters[names.index(name)]
                    known[key] = offline(base, adapter, job["messages"])
                found += text != known[key]
            return found

        def jobs_of(n):
            return [{"task": names[i % len(names)],
                     "messages": messages_of(tests[i % len(names)][i // len(names)])}
                    for i in range(n)]  # fmt: skip

        def add(row):
            rows.append(row)
            print(json.dumps(row), flush=True)
            write_json(RESULT, {"max_tokens": TOKENS, "environment": environment(), "rows": rows})

        code = "from d2c_mlx_cli.main import main; main()"
        with server(code, "serve", pack.path, "--port", 0) as url:
            for n in map(int, options.clients.split(",")):
                jobs = jobs_of(max(8, n * options.requests))
                for kind, task in (("one", names[0]), ("mixed", None)):
                    texts, row = measure(
                        url, jobs, n, lambda job, task=task: {"model": task or job["task"]}
                    )
                    add({"server": "d2c-mlx", "adapters": kind, **row,
                         "not_as_offline": differing(jobs, texts, task)})  # fmt: skip
        plain = Path(directory) / "float"
        plain.mkdir()
        torch_base(base, plain)
        for file in base.path.iterdir():
            if file.name.startswith(("token", "chat_template")):
                (plain / file.name).write_bytes(file.read_bytes())
        with server(STOCK, "--model", plain, "--port", 8979, "--log-level", "INFO") as url:

            def named(job):
                where = str(pack.adapter_path(job["task"]))
                return {"model": str(plain), "extra_body": {"adapters": where}}

            for n in map(int, options.clients.split(",")):
                texts, row = measure(url, jobs_of(options.stock_requests), n, named)
                add({"server": "mlx_lm.server", "adapters": "mixed", **row})


if __name__ == "__main__":
    main()
