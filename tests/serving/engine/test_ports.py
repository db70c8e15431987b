"""How a port is closed: nobody is let in any more, and whoever was is served."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import threading
from types import SimpleNamespace

import pytest

from deploykit.serving import servers
from deploykit.serving.servers import HttpServer
from deploykit.serving.v2_types import Limits

ASKED = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def ask(port: int) -> str:
    """What becomes of a request on a connection of its own."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as link:
            link.sendall(ASKED)
            return link.makefile("rb").readline().decode().strip()
    except OSError as exc:
        return type(exc).__name__


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can keep connections out of a port that still listens")
def test_who_comes_between_the_last_look_and_the_end_is_refused_and_not_cut_off(monkeypatch):
    """The system takes connections until the port is closed, whether or not somebody looks for them."""
    late: list[str] = []

    class Spare:
        """The port, of which it seems that nobody waits at it: then, somebody comes."""

        def __init__(self, real):
            self.real = real

        def __enter__(self):
            return self

        def __exit__(self, *_):
            port = self.real.getsockname()[1]
            thread = threading.Thread(target=lambda: late.append(ask(port)))
            thread.start()
            thread.join(0.3)  # let in, it has sent its request by now
            self.real.close()
            thread.join()

        def accept(self):
            return self.real.accept()

    async def run():
        server = HttpServer(app, Limits(), "127.0.0.1", 0)
        await server.start()
        assert await asyncio.to_thread(ask, server.port) == "HTTP/1.1 200 OK"
        real = server._socket
        monkeypatch.setattr(
            server, "_socket",
            SimpleNamespace(dup=lambda: Spare(real.dup()), setsockopt=real.setsockopt, close=real.close),
        )  # fmt: skip
        await server.stop(0.1)

    asyncio.run(run())
    assert late == ["ConnectionRefusedError"]


def test_who_waits_at_the_port_is_served():
    async def run():
        server = HttpServer(app, Limits(), "127.0.0.1", 0)
        await server.start()
        # This blocks the loop: the system lets them in, and nobody has looked for them.
        waiting = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(50)]
        for link in waiting:
            link.sendall(ASKED)
        await server.stop()
        for link in waiting:
            with link:
                assert link.recv(100).startswith(b"HTTP/1.1 200 OK")
        assert await asyncio.to_thread(ask, server.port) == "ConnectionRefusedError"

    asyncio.run(run())


def test_a_connection_that_is_still_being_made_is_waited_for():
    async def run():
        server = HttpServer(app, Limits(), "127.0.0.1", 0)
        await server.start()
        loop = asyncio.get_running_loop()
        asking, made = socket.socketpair()
        asking.sendall(ASKED)
        made.setblocking(False)
        take = server._take

        async def slowly():  # as a handshake of TLS is
            await asyncio.sleep(0.5)
            await take(made)

        task = loop.create_task(slowly())
        server._late.add(task)
        task.add_done_callback(server._late.discard)
        await server.stop(30.0)
        assert task.done()
        asking.settimeout(60)
        with contextlib.closing(asking):
            assert asking.recv(100).startswith(b"HTTP/1.1 200 OK")

    asyncio.run(run())


def test_a_system_without_such_filters_closes_its_ports_too(monkeypatch):
    monkeypatch.setattr(servers, "_SO_ATTACH_FILTER", 10_000)

    async def run():
        server = HttpServer(app, Limits(), "127.0.0.1", 0)
        await server.start()
        assert await asyncio.to_thread(ask, server.port) == "HTTP/1.1 200 OK"
        await server.stop()
        assert await asyncio.to_thread(ask, server.port) == "ConnectionRefusedError"

    asyncio.run(run())
