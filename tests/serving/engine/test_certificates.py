"""TLS: who is let in, and certificates that are renewed while the server runs."""

from __future__ import annotations

import shutil
import signal
import socket
import ssl
import subprocess
import time
from http.client import BadStatusLine, HTTPSConnection, RemoteDisconnected

import pytest

from deploykit.errors import DeploykitError
from deploykit.serving.tls import read_certificates


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """An authority, a server and a client that it has signed, and a client that nobody has."""
    tmp_path = tmp_path_factory.mktemp("certificates")

    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=tmp_path, check=True, capture_output=True)

    new = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj"]
    openssl(*new, "/CN=tests", "-x509", "-keyout", "ca.key", "-out", "ca.pem", "-days", "2")
    (tmp_path / "names").write_text("subjectAltName=IP:127.0.0.1")
    for name in ("server", "client"):
        openssl(*new, f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        openssl(
            "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-out", f"{name}.pem", "-days", "2", "-extfile", "names",
        )  # fmt: skip
    openssl(*new, "/CN=stranger", "-x509", "-keyout", "stranger.key", "-out", "stranger.pem", "-days", "2")
    return tmp_path


def test_tls_and_client_certificates(models, server, certificates, tmp_path):
    import grpc

    models.artifact(tmp_path / "net", models.scaled, 3.0)
    at = server(
        tmp_path / "net", "--threads", "1", "--tls-cert", certificates / "server.pem",
        "--tls-key", certificates / "server.key", "--client-ca", certificates / "ca.pem",
    )  # fmt: skip

    def ask(name: str | None, port: int) -> int:
        context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
        if name is not None:
            context.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")
        connection = HTTPSConnection("127.0.0.1", port, context=context, timeout=60)
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status

    for port in (at.http, at.admin):
        assert ask("client", port) == 200
        for name in (None, "stranger"):
            with pytest.raises((ssl.SSLError, OSError, RemoteDisconnected)):
                ask(name, port)
    with pytest.raises((OSError, BadStatusLine)):
        at.ask("GET", "/v2/health/ready")

    def ready(*pair: str) -> bytes:
        key, chain = ((certificates / name).read_bytes() for name in pair) if pair else (None, None)
        credentials = grpc.ssl_channel_credentials((certificates / "ca.pem").read_bytes(), key, chain)
        with grpc.secure_channel(f"127.0.0.1:{at.grpc}", credentials) as channel:
            return channel.unary_unary("/inference.GRPCInferenceService/ServerReady")(b"", timeout=20)

    assert ready("client.key", "client.pem") == b"\x08\x01"
    for pair in ((), ("stranger.key", "stranger.pem")):
        with pytest.raises(grpc.RpcError):
            ready(*pair)


def wait_for(server, text: str) -> None:
    while text not in server.messages():
        assert server.process.poll() is None
        time.sleep(0.01)


def test_sighup_renews_certificates_on_every_port(models, server, certificates, tmp_path):
    models.artifact(tmp_path / "net", models.scaled, 3.0)
    for end in ("pem", "key"):
        shutil.copy(certificates / f"server.{end}", tmp_path / f"used.{end}")
    shutil.copy(certificates / "ca.pem", tmp_path / "used-ca.pem")
    at = server(
        tmp_path / "net", "--threads", "1", "--tls-cert", tmp_path / "used.pem",
        "--tls-key", tmp_path / "used.key", "--client-ca", tmp_path / "used-ca.pem",
    )  # fmt: skip

    def shown(port: int, client: str) -> str:
        """The name in the certificate that a port shows; gRPC's wants to hear of HTTP/2."""
        context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
        context.load_cert_chain(certificates / f"{client}.pem", certificates / f"{client}.key")
        if port == at.grpc:
            context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection(("127.0.0.1", port), timeout=60) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as sock,
        ):
            if port == at.grpc:
                sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
            else:
                sock.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            if not sock.recv(1):
                raise ConnectionResetError("the certificate was refused")
            return dict(field[0] for field in sock.getpeercert()["subject"])["commonName"]

    ports = (at.http, at.admin, at.grpc)
    assert [shown(port, "client") for port in ports] == ["server"] * 3
    # A key that belongs to another certificate, then both: what cannot be used changes nothing.
    shutil.copy(certificates / "client.pem", tmp_path / "used.pem")
    at.signal(signal.SIGHUP)
    wait_for(at, "the certificates stay as they are")
    assert [shown(port, "client") for port in ports] == ["server"] * 3
    shutil.copy(certificates / "client.key", tmp_path / "used.key")
    shutil.copy(certificates / "stranger.pem", tmp_path / "used-ca.pem")
    at.signal(signal.SIGHUP)
    wait_for(at, "new connections get the new certificates")
    assert [shown(port, "stranger") for port in ports] == ["client"] * 3
    for port in ports:
        with pytest.raises((ssl.SSLError, OSError)):
            shown(port, "client")
    at.signal(signal.SIGTERM)
    assert at.wait() == 0


def test_what_cannot_be_used(certificates):
    places = [str(certificates / name) for name in ("server.pem", "server.key", "ca.pem")]
    assert read_certificates(*places).client_ca == (certificates / "ca.pem").read_bytes()
    assert read_certificates(None, None, None) is None
    with pytest.raises(DeploykitError, match="TLS needs a certificate and its key"):
        read_certificates(None, None, places[2])
    for bad in (
        [places[0], str(certificates / "client.key"), None],
        [places[0], places[1], places[1]],
        [places[0], places[1], str(certificates / "none.pem")],
        [places[1], places[1], None],
    ):
        with pytest.raises(DeploykitError, match="cannot be used"):
            read_certificates(*bad)
