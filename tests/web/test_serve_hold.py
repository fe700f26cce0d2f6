"""`serve` with clients that hold what others need, pages of strangers, and a server that stops."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from click.testing import CliRunner
from d2c_mlx_cli.main import cli
from helpers.served import counts_at, counts_when, post, raw, serving

from d2c_mlx.serve.jobs import Limits

HEALTH = b"GET /health HTTP/1.0\r\n\r\n"
LONG = {"model": "wide", "prompt": "the", "max_tokens": 60, "stream": True,
        "logit_bias": {str(i): 100 for i in range(20, 200)}}  # fmt: skip


def read_all(connection):
    connection.settimeout(60)
    return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.fixture
def trickle():
    """`trickle(server, start)`: a client that sends a byte now and then, until it is cut off."""
    stopped = threading.Event()
    with ExitStack() as stack:

        def open_one(server, start):
            connection = stack.enter_context(socket.create_connection(server.address))
            connection.sendall(start)

            def send():
                try:
                    while not stopped.wait(0.02):
                        connection.sendall(b"x")
                except OSError:
                    pass

            thread = threading.Thread(target=send)
            thread.start()
            stack.callback(thread.join)
            return connection

        stack.callback(stopped.set)
        yield open_one


@pytest.mark.parametrize("start", [b"GET /health", HEALTH[:-2] + b"X: ", post(LONG)[:-90]])
def test_a_request_that_trickles_in_has_a_deadline(start, pack, mixed, trickle):
    with serving(pack, mixed, limits=Limits(seconds=0.3)) as server:
        reply = read_all(trickle(server, start))
        assert b" 408 " in reply and b"send it at once" in reply
        assert b" 200 " in raw(server, HEALTH)


def test_why_a_large_request_was_refused_can_be_read(pack, mixed):
    """Bytes that nobody reads would reset a connection that is closed at once."""
    with serving(pack, mixed, limits=Limits(body_nbytes=100)) as server:
        assert b" 413 " in raw(server, post(b" " * 20_000_000))


def test_who_is_slow_goes_when_all_places_are_taken(pack, mixed):
    """And no request that is there already: others are told that all places are taken."""
    endless = post(LONG | {"max_tokens": 500})
    limits = Limits(batch=1, queue=1, spare=0, seconds=600, drain_seconds=0)
    with serving(pack, mixed, limits=limits) as server, ExitStack() as stack:

        def connect(content):
            one = stack.enter_context(socket.create_connection(server.address))
            one.sendall(content)
            return one

        slow = [connect(b"GET /health HTTP/1.1\r\n") for _ in range(2)]
        assert b" 200 " in raw(server, HEALTH)
        # The one that came first had to go.
        assert b" 408 " in read_all(slow[0]) and b"needed by another" not in raw(server, HEALTH)
        streams = [connect(endless) for _ in range(2)]
        assert b" 408 " in read_all(slow[1])
        counts_at(server, "d2c_mlx_open", 2)
        refused = raw(server, b"")
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert json.loads(refused.split(b"\r\n\r\n")[1])["error"]["code"] == "overloaded"
        assert all(one.recv(12) == b"HTTP/1.1 200" for one in streams[:1])


def test_a_connection_serves_one_request_after_another(pack, mixed):
    """Each with a deadline of its own; two that come at once are answered in turn."""
    with serving(pack, mixed, limits=Limits(seconds=0.5)) as server:
        with socket.create_connection(server.address) as connection:
            ask = HEALTH.replace(b"1.0", b"1.1").replace(
                b"\r\n\r\n", b"\r\nHost: localhost\r\n\r\n"
            )
            for n in (1, 2, 1):
                connection.sendall(ask * n)
                found = b""
                while found.count(b'"ok"}') < n:
                    found += connection.recv(65536)
                time.sleep(0.3)
            connection.sendall(ask[:9])
            assert b" 408 " in read_all(connection)


def test_who_takes_no_reply_is_cut_off(pack, mixed):
    """As soon as neither side's buffers hold more."""
    with serving(pack, mixed, limits=Limits(seconds=0.3)) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.connect(server.address)
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 4000)
        key, before = 'd2c_mlx_replies_total{status="200"}', 0
        while (now := counts_at(server, key, 1)[key]) != before:
            before = now
            time.sleep(1)
        try:
            assert read_all(client).count(b"HTTP/1.1 200") < 4000
        except ConnectionResetError:
            pass


def test_only_names_of_this_server_are_answered(pack, mixed):
    """A page whose name was led to this machine is no other origin for its browser."""

    def status(*hosts, method="GET"):
        lines = "".join(f"Host: {one}\r\n" for one in hosts)
        reply = raw(server, f"{method} /v1/models HTTP/1.0\r\n{lines}\r\n".encode())
        return int(reply.split()[1]), reply

    with serving(pack, mixed) as server:
        for host in (
            "localhost",
            "LocalHost:8080",
            "127.0.0.1:1",
            "[::1]:80",
            "[::1]",
            "localhost.",
        ):
            assert status(host)[0] == 200, host
        for host in ("evil.example", "evil.example:8080", "localhost.evil.example", "", "10.0.0.7",
                     "localhost:8080@evil.example", "[::1].evil.example"):  # fmt: skip
            for method in ("GET", "POST", "OPTIONS"):
                code, reply = status(host, method=method)
                assert code == 421 and b"--allowed-host" in reply and b"wide" not in reply, host
        assert status("localhost", "evil.example")[0] == 400 and status()[0] == 200
    with serving(pack, mixed, hosts=("box.lan", "*")) as server:
        assert [status(one)[0] for one in ("box.lan:80", "10.0.0.7", "[fd00::1]:80", "a.lan")] == [
            200, 200, 200, 421]  # fmt: skip


def test_a_token_is_compared_as_bytes(pack, mixed):
    token = "ключ-é\x85"
    with serving(pack, mixed, token=token) as server:
        for sent, code in ((token, 200), (token[:-1], 401), ("", 401), ("k" * 9, 401)):
            line = b"Authorization: Bearer " + sent.encode() + b"\r\n"
            assert (
                int(raw(server, b"GET /metrics HTTP/1.0\r\n" + line + b"\r\n").split()[1]) == code
            )


def test_a_token_that_clients_cannot_send_is_refused_at_once(pack):
    for token in ("ключ", "two words", "tab\t", " "):
        refused = CliRunner().invoke(cli, ["serve", str(pack.path), "--token", token])
        assert refused.exit_code == 2 and "--token: found characters" in refused.output


def test_a_server_that_stops_lets_streams_end_and_no_one_wait(pack, mixed, trickle):
    """What does not end in time ends with an error, as do those that were never accepted."""
    with ThreadPoolExecutor(8) as pool, socket.socket() as late:
        with serving(pack, mixed, limits=Limits(batch=2, queue=4, drain_seconds=60)) as server:
            ended = [pool.submit(raw, server, post(LONG)) for _ in range(5)]
            counts_at(server, "d2c_mlx_open", 1)
            trickle(server, b"GET")
            server.stop()
            counts_when(server, lambda _: not server.service.scheduler.accepts)
            late.connect(server.address)
            late.sendall(post(LONG))
        replies = [one.result() for one in ended]
        # Some may have come too late.
        assert all(b"data: [DONE]" in one or b" 503 " in one for one in replies)
        assert any(b"data: [DONE]" in one for one in replies)
        assert b" 503 " in read_all(late)
        with serving(pack, mixed, limits=Limits(batch=2, queue=4, drain_seconds=0)) as server:
            endless = post(LONG | {"max_tokens": 500})
            ended = [pool.submit(raw, server, endless) for _ in range(5)]
            counts_at(server, "d2c_mlx_open", 5)
        # Before its headers a reply has a status, after them an event.
        assert all(b'"error": {"message": "the server stops"' in one.result() for one in ended)


@pytest.mark.slow
def test_sigterm_ends_every_stream(pack, model_path):
    code = "from d2c_mlx_cli.main import main; main()"
    command = [sys.executable, "-c", code, "serve", str(pack.path), "--model", str(model_path)]
    with subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True) as process:
        port = int(process.stdout.readline().split("/v1")[0].rpartition(":")[2])

        def ask(content):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(content)
                return read_all(connection)

        with ThreadPoolExecutor(48) as pool:
            replies = [pool.submit(ask, post(LONG)) for _ in range(48)]
            # Some run, some wait, some are not even accepted.
            while not re.search(rb"d2c_mlx_open [^0]", ask(b"GET /metrics HTTP/1.0\r\n\r\n")):
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            ended = [one.result() for one in replies]
        assert process.wait(60) == 0
        assert all(b"[DONE]" in one or b'"error"' in one for one in ended)
