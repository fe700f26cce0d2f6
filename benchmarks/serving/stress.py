"""Requests of every kind against one server: is the right adapter in every answer, is nothing left?

    python -m benchmarks.serving.stress --library DIR [--adapters 8] [--requests 10000]
        [--clients 16]

Of a pack of half the adapters and a directory with all, in memory for a quarter: answers streamed
and whole, adapters that are loaded, asked and unloaded, adapters that the first request loads,
packs that are reloaded, clients that leave, and bytes that are no request. An answer is *wrong* if
it is another adapter's, and *other* if it is no adapter's: rows of a batch are computed together,
which can change a token where two are equally likely. At the end no request, connection or adapter
may be left, and memory be that of the half-time.
"""

import itertools
import json
import random
import socket
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks import command_line
from benchmarks.common import load_library
from benchmarks.serving.serve import server
from d2c_mlx.packs.pack import PackInfo
from d2c_mlx.packs.write import write_pack
from d2c_mlx.utils.device import environment
from d2c_mlx.utils.files import write_json

TOKEN, TOKENS = "stress", 4
_SHARED = "Write the number in German words. 7: sieben. 12: zwölf. 30: dreißig. 41: "
PROMPTS = ("the quick brown fox", "x", "Who is it?", _SHARED, _SHARED + "einundvierzig. 896:")
GARBAGE = (
    b"\x00\x01\x02\r\n\r\n", b"POST / HTTP/1.1\r\n", b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
    b"POST /v1/completions HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}", b"GET /" + b"x" * 20_000,
)  # fmt: skip


@dataclass(frozen=True)
class Stress:
    """Questions to a server, and the answers that it must give.

    Attributes:
        address: host and port.
        answers: name of an adapter -> prompt -> its answer.
        served: names that the server knows from the start.
        files: names in the server's directory, which `load_lora_adapter` takes as paths.
    """

    address: tuple[str, int]
    answers: dict[str, dict[str, str]]
    served: list[str]
    files: list[str]

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
        if kind < 0.35:
            return self._come_and_go(f"own-{i}", dice.choice(self.files), prompt)
        if kind < 0.36:
            status, _ = self.post("/v1/reload", {})
            return "reloaded" if status == 200 else f"reload {status}"
        name = dice.choice([*self.served, *self.files])
        return self._ask(name, name, prompt, dice.random() < 0.5)

    def _ask(self, name, adapter, prompt, stream=False):
        body = {"model": name, "prompt": prompt, "max_tokens": TOKENS, "stream": stream}
        status, said = self.post("/v1/completions", body)
        if status != 200:
            return f"status {status}"
        if stream:
            lines = [line[6:] for line in said.splitlines() if line.startswith("data: {")]
            said = "".join(json.loads(one)["choices"][0]["text"] for one in lines)
        else:
            said = json.loads(said)["choices"][0]["text"]
        if said == self.answers[adapter][prompt]:
            return "right"
        return "wrong" if said in [one[prompt] for one in self.answers.values()] else "other"

    def _come_and_go(self, name, file, prompt):
        status, _ = self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": file})
        if status != 200:
            return f"load {status}"
        found = self._ask(name, file, prompt)
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
    head = f"Content-Length: {len(content)}\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
    return f"POST {path} HTTP/1.0\r\n{head}".encode() + content


def state(stress):
    """The metrics of a server, read once no request is open."""
    line = f"GET /metrics HTTP/1.0\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode()
    names = ("process_resident_memory_bytes", "process_open_fds", "d2c_mlx_adapter_loads_total",
             "d2c_mlx_adapter_evictions_total", "d2c_mlx_vanished_total")  # fmt: skip
    while b"\nd2c_mlx_open 0.0" not in stress.send(line):
        time.sleep(0.2)
    # A refused connection lingers for a second.
    time.sleep(2)
    found: Counter[str] = Counter()
    for row in stress.send(line).decode().splitlines():
        key, _, value = row.rpartition(" ")
        if key.partition("{")[0] in names:
            found[key.partition("{")[0]] += int(float(value))
    return dict(found)


def answers_of(base, adapters):
    """Answers of each adapter, made offline."""
    found = {}
    tokenizer = base.tokenizer
    for name, one in adapters.items():
        base.attach(one)
        found[name] = {}
        for prompt in PROMPTS:
            words = tokenizer.detokenizer
            for token in base.answer(tokenizer.encode(prompt), TOKENS):
                if token not in tokenizer.eos_token_ids:
                    words.add_token(token)
            words.finalize()
            found[name][prompt] = words.text
    return found


def main():
    """Run, print, write."""
    parser = command_line(__doc__, __spec__, "stress.json")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args()
    base, adapters, paths, _ = load_library(options.library, 1, options.adapters)
    named = {path.name: replace(one, sources=(path.name,)) for path, one in zip(paths, adapters)}
    served = list(named)[: max(1, len(named) // 2)]
    nbytes = sum(sum(base.module_shapes[p]) * x.rank * 4 for p, x in adapters[0].modules.items())
    memory = f"{(len(named) // 4 + 2) * nbytes / 1e6:.1f}MB"
    answers = answers_of(base, named)
    with tempfile.TemporaryDirectory() as directory:
        pack = write_pack(
            Path(directory) / "run" / "pack", [named[name] for name in served],
            PackInfo(model=base.name, config_hash=base.config_hash, n_layers=base.n_layers,
                     budget=str(len(served))),
        )  # fmt: skip
        folder = Path(directory) / "adapters"
        for name, one in named.items():
            one.save(folder / f"file-{name}", base.n_layers)
            answers[f"file-{name}"] = answers[name]
        code = "from d2c_mlx_cli.main import main; main()"
        with server(code, "serve", pack.path, "--port", 0, "--token", TOKEN, "--allow-changes",
                    "--adapter-dir", folder, "--adapter-memory", memory) as url:  # fmt: skip
            place = urlsplit(url)
            stress = Stress((place.hostname, place.port), answers, served,
                            [f"file-{name}" for name in named])  # fmt: skip
            measure(stress, options)


def measure(stress, options):
    """Two halves, and the state after each."""
    numbers, rows = itertools.count(), []
    for _ in range(2):
        started = time.perf_counter()
        found = stress.run(itertools.islice(numbers, options.requests // 2), options.clients)
        seconds = time.perf_counter() - started
        rows.append({"outcomes": dict(found.most_common()), "seconds": round(seconds, 1),
                     **state(stress)})  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
        write_json(options.output, {"requests": options.requests, "clients": options.clients,
                                    "rows": rows, "environment": environment()})  # fmt: skip


if __name__ == "__main__":
    main()
