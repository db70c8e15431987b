"""Certificates: read once, used by every port, and read again where they were renewed."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.errors import DeploykitError
from deploykit.extras import require


@dataclass(frozen=True, slots=True)
class Certificates:
    """What a server shows, and what it asks for.

    Attributes:
        chain: Its certificate chain, PEM.
        key: Its private key, PEM.
        client_ca: What clients' certificates have to be signed with, PEM; None: they need none.
        context: All of that, for HTTP.
    """

    chain: bytes
    key: bytes
    client_ca: bytes | None
    context: ssl.SSLContext

    def same(self, other: Certificates) -> bool:
        """Whether the files held the same."""
        return (self.chain, self.key, self.client_ca) == (other.chain, other.key, other.client_ca)


def read_certificates(cert: str | None, key: str | None, client_ca: str | None) -> Certificates | None:
    """What the files hold, if it can be used; None where there is to be no TLS.

    Raises:
        DeploykitError: A file is missing, or holds no certificate, or they do not belong together.
    """
    if cert is None or key is None:
        if cert is not None or key is not None or client_ca is not None:
            raise DeploykitError("TLS needs a certificate and its key", hint="give --tls-cert and --tls-key")
        return None
    try:
        found = _read(cert, key, client_ca)
        if not found.same(_read(cert, key, client_ca)):
            raise ValueError("they changed while they were read")
    except (OSError, ValueError) as exc:  # SSLError is an OSError
        raise DeploykitError(
            f"the certificates cannot be used ({exc})", expected="PEM files that belong together"
        ) from exc
    return found


def _read(cert: str, key: str, client_ca: str | None) -> Certificates:
    # The context has to be made of the files themselves.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key, password=_no_password)
    if client_ca is not None:
        context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    roots = None if client_ca is None else Path(client_ca).read_bytes()
    return Certificates(Path(cert).read_bytes(), Path(key).read_bytes(), roots, context)


def _no_password() -> str:
    raise ValueError("the private key has a password")


class GrpcCertificates:
    """Certificates of a gRPC port, which asks for news at every handshake, in a thread of its own.

    Args:
        first: What it begins with.
    """

    def __init__(self, first: Certificates) -> None:
        grpc = require("grpc", extra="serve")
        self._news: Any = None
        self.credentials = grpc.dynamic_ssl_server_credentials(
            _configuration(first), self._take, require_client_authentication=first.client_ca is not None
        )

    def renew(self, found: Certificates) -> None:
        """Use others from the next connection on."""
        self._news = _configuration(found)

    def _take(self) -> Any:
        news, self._news = self._news, None
        return news


def _configuration(found: Certificates) -> Any:
    grpc = require("grpc", extra="serve")
    return grpc.ssl_server_certificate_configuration([(found.key, found.chain)], root_certificates=found.client_ca)
