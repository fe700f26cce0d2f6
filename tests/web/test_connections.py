"""Clients of `serve` that hold what others need, pages of strangers, and a server that stops."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from helpers.served import GOOD, NO_END, get, n_open, post, raw, serving, until

from d2c_mlx.serve.scheduler import Limits

HEALTH = get("/health")
LONG = {"model": "wide", "prompt": "the", "max_tokens": 60, "stream": True, "logit_bias": NO_END}


def read_all(connection, trickle=False):
    """All bytes until the connection ends or is reset; `trickle` keeps sending a byte at a time."""
    connection.settimeout(0.02 if trickle else 60)
    parts = []
    with suppress(ConnectionResetError):
        while not parts or parts[-1]:
            try:
                parts.append(connection.recv(65536))
            except TimeoutError:
                assert trickle
                with suppress(OSError):
                    connection.sendall(b"x")
    return b"".join(parts)


def test_a_request_that_trickles_in_has_a_deadline(pack, model_path):
    """Its head, its headers, its body; the next one on a connection has one of its own."""
    with serving(pack, model_path, limits=Limits(seconds=0.5, body_nbytes=10_000)) as server:
        for start in (b"GET /health", HEALTH[:-2] + b"X: ", post(LONG)[:-90]):
            with socket.create_connection(server.address) as connection:
                connection.sendall(start)
                reply = read_all(connection, trickle=True)
            assert b" 400 " in reply and b"send it at once" in reply
            assert b" 200 " in raw(server, HEALTH)
        with socket.create_connection(server.address) as connection:
            ask = HEALTH.replace(b"1.0", b"1.1")
            for n in (1, 2, 1):
                connection.sendall(ask * n)
                answers = b""
                while answers.count(b'"ok"') < n:
                    answers += connection.recv(65536)
                time.sleep(0.3)
            connection.sendall(ask[:9])
            assert b"send it at once" in read_all(connection)
        # Answered without its body, which never comes: there is no second reply, only an end.
        with socket.create_connection(server.address) as connection:
            connection.sendall(post(LONG).replace(b"/v1/", b"/no/").replace(b"1.0", b"1.1")[:-90])
            reply = read_all(connection)
            assert b" 404 " in reply and b"send it at once" not in reply
        until(lambda: not server._server.server_state.connections)


def test_who_takes_no_reply_is_cut_off(pack, model_path):
    """As soon as neither side's buffers hold more."""
    limits = Limits(seconds=0.3)
    with serving(pack, model_path, limits=limits) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(server.address)
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
        connections = server._server.server_state.connections
        until(lambda: connections)
        until(lambda: not connections)
        assert read_all(connection).count(b"HTTP/1.1 200") < 1000


def status_of(server, *lines, method="GET", path="/v1/models"):
    content = "\r\n".join((f"{method} {path} HTTP/1.0", *lines, "", ""))
    return int(raw(server, content.encode()).split()[1])


def test_only_names_of_this_server_are_answered(server):
    """A page whose name was led to this machine is no other origin for its browser."""
    for host in ("localhost", "LocalHost:8080", "127.0.0.1:1", "[::1]:80", "[::1]"):
        assert status_of(server, f"Host: {host}") == 200, host
    for host in ("evil.example:8080", "localhost.evil.example", "", "10.0.0.7",
                 "localhost:8080@evil.example", "[::1].evil.example"):  # fmt: skip
        for method in ("GET", "POST", "OPTIONS"):
            assert status_of(server, f"Host: {host}", method=method) == 400, host
    assert status_of(server) == 400


def test_pages_and_tokens_that_are_allowed(server, pack, model_path):
    """A token is compared as bytes."""
    page, token = "http://localhost:3000", "ключ-é\x85"
    asks = ("Host: localhost", f"Origin: {page}", "Access-Control-Request-Method: POST",
            "Access-Control-Request-Headers: authorization,content-type")  # fmt: skip
    assert status_of(server, *asks, method="OPTIONS") == 400
    assert status_of(server, *asks[:2]) == 403
    assert status_of(server, "Host: localhost", "Origin: http://localhost") == 200
    hosts = ("localhost", "box.lan")
    with serving(pack, model_path, token=token, origins=[page], hosts=hosts) as other:
        allowed = raw(other, get("/v1/completions", *asks[1:], method="OPTIONS"))
        assert b" 200 " in allowed and f"allow-origin: {page}".encode() in allowed
        assert b"allow-headers: authorization,content-type" in allowed
        refused = raw(other, post(GOOD, Origin=page))
        assert b" 401 " in refused and f"allow-origin: {page}".encode() in refused
        assert b"expose-headers: X-D2C-Route" in refused
        for sent, code in ((token, 200), (token[:-1], 401), ("", 401), ("k" * 9, 401)):
            for scheme in ("Bearer", "bearer", "BEARER"):
                line = f"Authorization: {scheme} {sent}\r\n\r\n".encode()
                reply = raw(other, get("/health?x=1")[:-2] + line)
                assert int(reply.split()[1]) == code
        for host, code in (("box.lan:80", 200), ("a.lan", 400)):
            assert status_of(other, f"Host: {host}", path="/") == code


def test_a_server_that_stops_lets_streams_end_and_no_one_wait(pack, model_path):
    """Answers that are not done in time end with an error, and so do waiting connections."""
    with ThreadPoolExecutor(8) as pool, socket.socket() as late:
        limits = Limits(batch=2, queue=4, drain_seconds=60)
        with serving(pack, model_path, limits=limits) as server:
            ended = [pool.submit(raw, server, post(LONG)) for _ in range(5)]
            until(lambda: n_open(server))
            raw(server, b"GET", wait=False)
            server.stop()
            until(lambda: not server.service.scheduler.accepts)
            late.connect(server.address)
            late.sendall(post(LONG))
        replies = [reply.result() for reply in ended]
        # Some may have come too late.
        assert all(b"data: [DONE]" in reply or b" 503 " in reply for reply in replies)
        assert any(b"data: [DONE]" in reply for reply in replies)
        assert b" 503 " in read_all(late)
        limits = Limits(batch=2, queue=4, drain_seconds=0)
        with serving(pack, model_path, limits=limits) as server:
            endless = post(LONG | {"max_tokens": 500})
            ended = [pool.submit(raw, server, endless) for _ in range(5)]
            until(lambda: n_open(server) == 5)
        # Before its headers a reply has a status, after them an event.
        assert all(b"the server stops" in reply.result() for reply in ended)
