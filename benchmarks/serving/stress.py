"""Requests of every kind against one server: is the right adapter in every answer, is nothing left?

    python -m benchmarks.serving.stress --library DIR [--adapters 24] [--requests 10000]
        [--clients 32]

The pack has half the adapters, a directory all of them, memory room for a third: answers streamed
and whole, adapters that are loaded, asked and unloaded, adapters that the first request loads,
clients that leave, and bytes that are no request. An answer of two tokens
tells the likeliest tokens' log-probabilities, which no two adapters share; they are compared with
those of the base under that adapter alone. An answer is *wrong* if it is another adapter's, and
*other* if it is nobody's. After every part the server must be idle, and at the end its threads,
files and sockets be those of the start. Then it gets SIGTERM while it streams.
"""

import http.client
import itertools
import json
import os
import random
import socket
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Barrier

import mlx.core as mx

from benchmarks import command_line
from benchmarks.common import load_library
from benchmarks.serving.servers import OURS, cpu_seconds, health, server
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.write import write_pack
from d2c_mlx.utils.device import environment
from d2c_mlx.utils.files import write_json

TOKEN, TOKENS, TOP = "stress", 2, 5
_SHARED = "Numbers in German words. 7: sieben. 12: zwölf. 30:"
PROMPTS = ("the quick brown fox", "Number: 896", "Who is it?", _SHARED, _SHARED + " dreißig. 8:")
# Nats by which an answer may differ from that of its adapter alone; any two adapters differ more.
TOLERANCE = 0.01
# In which a server must be gone after SIGTERM: 10 to end what runs, 5 to send it, and some.
STOP_SECONDS = 20
GARBAGE = (
    b"\x00\x01\x02\r\n\r\n", b"POST / HTTP/1.1\r\n", b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
    b"POST /v1/completions HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}", b"GET /" + b"x" * 20_000,
    b"GET /%C2%9B31mX%E2%80%AE HTTP/1.1\r\nHost: x\r\n\r\n", b"X" * 3000 + b" / HTTP/1.0\r\n\r\n",
)  # fmt: skip


def schema(content):
    """The fields of a completion that has to keep to a JSON schema."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": content}}
    return "/v1/completions", {"response_format": form}


def chain(n):
    """A schema of n references, each to the next."""
    parts = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(n)}
    return {"$defs": {**parts, f"d{n}": {"type": "string"}}, "$ref": "#/$defs/d0"}


# Paths and fields of what must be refused, and never ends or stops a server.
_LOAD, _CHAT = "/v1/load_lora_adapter", "/v1/chat/completions"
_LOOPS = 2 * "{% for i in range(6000) %}" + 2 * "{% endfor %}"
REFUSED = (
    schema(chain(3000)), schema({"$ref": "#/nowhere"}), schema({"type": "nothing"}),
    schema({"type": "string", "allOf": [{"pattern": f"a.{{{i}}}b"} for i in range(60)]}),
    ("/v1/completions", {"prompt": "ab " * 300_000}), ("/v1/completions", {"logit_bias": {"x": 1}}),
    (_CHAT, {"messages": [{"role": "user", "content": "x"}],
             "chat_template_kwargs": {"chat_template": _LOOPS}}),
    *((_LOAD, {"lora_name": name, "lora_path": "x"})
      for name in ("", "auto", "a\nb", "\x1b[31m", ".hidden", "a/b", "x" * 500_000)),
    *((_LOAD, {"lora_name": "x", "lora_path": path}) for path in ("../x", "/etc", "\0", "nobody")),
)  # fmt: skip


@dataclass(frozen=True)
class Stress:
    """Questions to a server, and the answers that it must give.

    Attributes:
        address: host and port.
        answers: name of an adapter -> prompt -> its answer, see `answers_of`.
        served: names that the server knows from the start.
        files: names in the server's directory, which `load_lora_adapter` takes as paths.
    """

    address: tuple[str, int]
    answers: dict[str, dict[str, tuple[float, ...]]]
    served: list[str]
    files: list[str]

    def load(self):
        """Load every file under its own name."""
        for file in self.files:
            status, text = self.post(
                "/v1/load_lora_adapter", {"lora_name": file, "lora_path": file}
            )
            if status != 200:
                raise SystemExit(text)

    def one(self, i):
        """Do one thing, by a dice of its own; what came of it in a word."""
        dice = random.Random(i)
        kind = dice.random()
        prompt = dice.choice(PROMPTS)
        if kind < 0.1:
            return self._leave(dice, prompt)
        if kind < 0.2:
            with suppress(OSError):
                self.send(dice.choice(GARBAGE), wait=dice.random() < 0.5)
            return "garbage"
        if kind < 0.3:
            path, fields = dice.choice(REFUSED)
            model = {} if path == _LOAD else {"model": dice.choice(self.served), "prompt": prompt}
            status, _ = self.post(path, {**model, **fields})
            return "refused" if 400 <= status < 500 else f"refused with {status}"
        if kind < 0.45:
            return self._come_and_go(f"own-{i}", dice.choice(self.files), prompt)
        # The first more often than the last.
        names = [*self.served, *self.files]
        name = names[int(len(names) * dice.random() ** 3)]
        return self.ask(name, name, prompt, dice.random() < 0.5)

    def ask(self, name, adapter, prompt=PROMPTS[0], stream=False):
        """Ask a name; whether the answer is that adapter's."""
        body = {"model": name, "prompt": prompt, "max_tokens": TOKENS, "stream": stream,
                "logprobs": True, "top_logprobs": TOP}  # fmt: skip
        status, said = self.post("/v1/completions", body)
        if status != 200:
            return f"status {status}"
        lines = [line[6:] for line in said.splitlines() if line.startswith("data: {")]
        parts = [json.loads(one)["choices"][0]["logprobs"] for one in lines if stream]
        parts = parts or [json.loads(said)["choices"][0]["logprobs"]]
        tokens = [one for part in parts if part for one in part["content"]]
        found = [top["logprob"] for one in tokens for top in one["top_logprobs"]]
        if difference(found, self.answers[adapter][prompt]) < TOLERANCE:
            return "right"
        others = [difference(found, one[prompt]) for one in self.answers.values()]
        return "wrong" if min(others) < TOLERANCE else "other"

    def _come_and_go(self, name, file, prompt):
        status, _ = self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": file})
        if status != 200:
            return f"load {status}"
        found = self.ask(name, file, prompt)
        status, _ = self.post("/v1/unload_lora_adapter", {"lora_name": name})
        return found if status == 200 else f"unload {status}"

    def _leave(self, dice, prompt):
        body = {"model": dice.choice(self.served), "prompt": prompt, "max_tokens": 100,
                "stream": dice.random() < 0.5}  # fmt: skip
        content = request("/v1/completions", body)
        with suppress(OSError):
            self.send(content[: dice.randrange(1, 2 * len(content))], wait=False)
        return "left"

    def post(self, path, body):
        """`(status, text)` of a reply; one that says that the server is full is asked for again."""
        while True:
            head, said = self.send(request(path, body)).split(b"\r\n\r\n", 1)
            status = int(head.split()[1])
            if status != 503:
                return status, said.decode()
            time.sleep(0.05)

    def send(self, content, wait=True):
        """Send bytes; what comes back, if that is waited for."""
        with socket.create_connection(self.address, timeout=600) as connection:
            connection.sendall(content)
            parts = iter(lambda: connection.recv(65536), b"") if wait else ()
            return b"".join(parts)

    def run(self, numbers, n_clients):
        """How often each came of them."""
        with ThreadPoolExecutor(n_clients) as pool:
            return Counter(pool.map(self.one, numbers))


def request(path, body):
    """The bytes of a request."""
    content = json.dumps(body).encode()
    head = f"Host: localhost\r\nContent-Length: {len(content)}\r\n"
    key = f"Authorization: Bearer {TOKEN}\r\n\r\n"
    return f"POST {path} HTTP/1.0\r\n{head}{key}".encode() + content


def state(stress):
    """A server's counts, read once no request is open."""
    while (counts := health(stress.address, TOKEN)).pop("open"):
        time.sleep(0.2)
    return {"d2c_mlx_adapter_loads_total": counts["adapters_loaded"],
            "d2c_mlx_adapter_evictions_total": counts["adapters_evicted"]}  # fmt: skip


def resources(process):
    """Memory, threads, files and sockets of a process."""
    return {
        "resident_bytes": process.memory_info().rss, "threads": process.num_threads(),
        "files": process.num_fds(), "sockets": len(process.net_connections()),
    }  # fmt: skip


def difference(found, known):
    """Most nats between two answers; infinite if one is empty. One may have ended earlier."""
    return max((abs(x - y) for x, y in zip(found, known)), default=float("inf"))


def answers_of(base, adapters):
    """Each adapter's answers: for every token the likeliest ones' log-probabilities, in order.

    Raises:
        SystemExit: two adapters cannot be told apart.
    """
    found = {}
    for name, one in adapters.items():
        base.attach(one)
        found[name] = dict.fromkeys(PROMPTS, ())
        rows = [base.tokenizer.encode(prompt) for prompt in PROMPTS]
        for _ in range(TOKENS):
            # Later tokens do not change earlier ones, so padding on the right does no harm.
            length = max(map(len, rows))
            logits = base.model(mx.array([row + [0] * (length - len(row)) for row in rows]))
            for i, prompt in enumerate(PROMPTS):
                last = logits[i, len(rows[i]) - 1].astype(mx.float32)
                likely = mx.sort(last - mx.logsumexp(last))[: -TOP - 1 : -1].tolist()
                found[name][prompt] += tuple(likely)
                rows[i] = [*rows[i], last.argmax().item()]
    for (one, x), (other, y) in itertools.combinations(found.items(), 2):
        for prompt in PROMPTS:
            if difference(x[prompt], y[prompt]) < 2 * TOLERANCE:
                raise SystemExit(f"{one} and {other} answer {prompt!r} alike")
    return found


def stopped(address, process, served):
    """SIGTERM while 16 streams run: how they end, and how long the server takes to end."""

    def stream(name):
        connection = http.client.HTTPConnection(*address, timeout=600)
        body = {"model": name, "prompt": "Once", "max_tokens": 400, "stream": True}
        headers = {"Authorization": f"Bearer {TOKEN}"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        reply = connection.getresponse()
        reply.readline()
        streaming.wait(600)
        # IncompleteRead would be a stream that was cut.
        with closing(connection), reply:
            return reply.read().split(b"data: ")[-1]

    streaming = Barrier(17)
    with ThreadPoolExecutor(16) as pool:
        last = pool.map(stream, itertools.islice(itertools.cycle(served), 16))
        streaming.wait(600)
        started = time.perf_counter()
        process.terminate()
        last, code = list(last), process.wait(10 * STOP_SECONDS)
    ends = Counter("done" if one.startswith(b"[DONE]") else
                   "told" if b"the server stops" in one else "cut" for one in last)  # fmt: skip
    return {"seconds": round(time.perf_counter() - started, 1), "exit_code": code, **ends}


def main():
    """Run, print, write."""
    parser = command_line(__doc__, __spec__, "stress.json")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--adapters", type=int, help="number of the library's  [default: all]")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--part", type=int, default=500, help="requests between two looks at it")
    parser.add_argument("--clients", type=int, default=32)
    options = parser.parse_args()
    base, adapters, paths, _ = load_library(options.library, 1, options.adapters)
    named = {path.name: replace(one, sources=(path.name,)) for path, one in zip(paths, adapters)}
    served = list(named)[: max(1, len(named) // 2)]
    nbytes = sum(sum(base.module_shapes[p]) * x.rank * 4 for p, x in adapters[0].modules.items())
    room = max(1, len(named) // 3)
    answers = answers_of(base, named)
    with tempfile.TemporaryDirectory() as directory:
        pack = write_pack(
            Path(directory) / "run" / "pack", [named[name] for name in served],
            Manifest(model=base.name, config_hash=base.config_hash, n_layers=base.n_layers,
                     budget=str(len(served))),
        )  # fmt: skip
        folder = Path(directory) / "adapters"
        for name, one in named.items():
            one.save(folder / f"file-{name}", base.n_layers)
            answers[f"file-{name}"] = answers[name]
        command = [*OURS, pack.path, "--token", TOKEN, "--adapter-dir", folder,
                   "--adapter-memory", f"{(room + 1.5) * nbytes / 1e6:.1f}MB"]  # fmt: skip
        del base, adapters
        about = {"requests": options.requests, "clients": options.clients, "tokens": TOKENS,
                 "adapters": len(named), "room": room, "environment": environment(),
                 "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS")}  # fmt: skip
        with server(command) as (address, process):
            stress = Stress(address, answers, served, [f"file-{name}" for name in named])
            stress.load()
            measure(stress, process, options, about)


def measure(stress, process, options, about):
    """Part after part, and the state after each; then the end."""
    numbers, rows, result = itertools.count(), [], {**about, "start": {}}
    result["start"] = {**state(stress), **resources(process)}
    for _ in range(options.requests // options.part):
        started, used = time.perf_counter(), cpu_seconds(process)
        found = stress.run(itertools.islice(numbers, options.part), options.clients)
        seconds, used = time.perf_counter() - started, cpu_seconds(process) - used
        rows.append({"outcomes": dict(found.most_common()), "seconds": round(seconds, 1),
                     "cpu_seconds": round(used, 1), "load": os.getloadavg()[0], **state(stress),
                     **resources(process)})  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
        write_json(options.output, {**result, "rows": rows})
    stop = stopped(stress.address, process, stress.served[: about["room"]])
    print(json.dumps(stop))
    write_json(options.output, {**result, "rows": rows, "stop": stop})


if __name__ == "__main__":
    main()
