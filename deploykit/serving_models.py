"""`serve`: models that answer requests over the network."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.errors import DeploykitError

if TYPE_CHECKING:
    from deploykit.serving.servers import Bound


def serve(
    models: Sequence[str | Path],
    *,
    names: Sequence[str] = (),
    host: str = "127.0.0.1",
    http_port: int = 8080,
    grpc_port: int | None = 8081,
    admin_port: int | None = None,
    device: str | None = None,
    tuned: str | Path | None = None,
    instances: int | None = None,
    threads: int | None = None,
    max_batch: int | None = None,
    force_batching: bool = False,
    max_delay_ms: float = 0.0,
    queue: int = 128,
    timeout_s: float = 60.0,
    load_timeout_s: float = 1800.0,
    worker_memory: int | None = None,
    token_file: str | Path | None = None,
    tls_cert: str | Path | None = None,
    tls_key: str | Path | None = None,
    client_ca: str | Path | None = None,
    repository_api: bool = False,
    versions: str = "latest:1",
    on_ready: Callable[[Bound], None] | None = None,
) -> int:
    """Serve models by the Open Inference Protocol, version 2, over HTTP and gRPC, until a signal ends it.

    Args:
        models: Artifact directories, directories of versions (`1/`, `2/`, ..., each an artifact), or `.onnx` files.
        names: What clients call them, one each; by default the names of the directories.
        host: Address to listen on; the default is for this machine only.
        http_port: Of HTTP; 0 for any that is free.
        grpc_port: Of gRPC; None for none.
        admin_port: Of metrics and repository control; None for none.
        device: Where they run; as their settings say, else `ort:cpu`.
        tuned: File of tuned settings, in place of those that the artifacts bring.
        instances: Processes a model, each with a session of its own; as tuned, else 1.
        threads: Threads inside one request; as tuned, else the cores are shared among the instances.
        max_batch: Most rows of requests that are joined; as tuned, else none are.
        force_batching: Join requests also where the numbers of one depend on the others, as in models that are
            quantized dynamically; without it such models answer one request at a time, and say so. Needs `max_batch`.
        max_delay_ms: How long a request may wait for others where it could run.
        queue: Requests that may wait for a model; more are refused.
        timeout_s: Seconds that any request may take.
        load_timeout_s: Seconds that a model may take to be loaded and warm.
        worker_memory: Most MiB that the process of a model on the CPU may take; the machine's memory by default.
        token_file: File of bearer tokens, one a line; every client needs one of them.
        tls_cert: File of the server's certificate chain.
        tls_key: File of its private key.
        client_ca: File of the certificates that clients' have to be signed with.
        repository_api: Whether models may be loaded and unloaded over the admin port.
        versions: Which versions of a directory of versions answer: `latest:N`, `all`, or some with commas between them.
        on_ready: Called with the ports once all models answer.

    Returns:
        0 where every accepted request was answered.

    Raises:
        DeploykitError: It cannot start.
    """
    from deploykit.serving.lifecycle import run
    from deploykit.serving.loaded import Options, Source
    from deploykit.serving.servers import Places, check_tls
    from deploykit.serving.versions import VersionPolicy

    if not models:
        raise DeploykitError("there is nothing to serve", expected="an artifact's directory")
    if names and len(names) != len(models):
        raise DeploykitError(f"{len(names)} names for {len(models)} models", expected="a name for each, or none")
    if repository_api and admin_port is None:
        raise DeploykitError("repository control is for the admin port only", hint="add --admin-port")
    if repository_api and not _is_local(host) and token_file is None and client_ca is None:
        raise DeploykitError(
            f"whoever reaches {host} could load and unload models", hint="add --token-file or --client-ca"
        )
    if force_batching and (max_batch is None or max_batch == 1):
        raise DeploykitError("nothing says how many rows are to be joined", hint="add --max-batch ROWS")
    given = [None if path is None else str(path) for path in (tls_cert, tls_key, client_ca)]
    check_tls(*given)
    called: list[str | None] = list(names) or [None] * len(models)
    policy = VersionPolicy.parse(versions)
    sources = [Source.at(model, name) for model, name in zip(models, called, strict=True)]
    if policy != VersionPolicy() and not any(source.versioned for source in sources):
        raise DeploykitError(
            f"no model has versions of which {versions!r} could choose", expected="a directory of versions 1/, 2/, ..."
        )
    options = Options(
        device=device, tuned=None if tuned is None else str(tuned), instances=instances, threads=threads,
        max_batch=max_batch, force_batching=force_batching, max_delay_s=max_delay_ms / 1e3, queue=queue,
        timeout_s=timeout_s, load_s=load_timeout_s, versions=policy,
        memory_bytes=None if worker_memory is None else worker_memory << 20,
    )  # fmt: skip
    places = Places(
        host=host, http_port=http_port, grpc_port=grpc_port, admin_port=admin_port,
        tokens=read_tokens(token_file) if token_file is not None else (),
        cert=given[0], key=given[1], client_ca=given[2], repository_api=repository_api,
    )  # fmt: skip
    return run(sources, options, places, on_ready or (lambda bound: None))


def _is_local(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_tokens(file: str | Path) -> tuple[str, ...]:
    """Bearer tokens, one a line; lines that are empty or begin with # are none.

    Raises:
        DeploykitError: The file cannot be read, or holds no token, or one that a header cannot hold.
    """
    try:
        lines = Path(file).read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeError) as exc:
        raise DeploykitError(f"cannot read the tokens in {file} ({exc})", expected="ASCII, a token a line") from exc
    found = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not found:
        raise DeploykitError(f"{file} holds no token", expected="a token a line")
    if any(not token.isprintable() or " " in token for token in found):
        raise DeploykitError(f"{file} holds a token with a blank or a control character", expected="a token a line")
    return found


def say_on_stderr() -> None:
    """Have the server say what it does: models that come and go, workers that die."""
    import logging

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("deploykit.serving")
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    uvicorn = logging.getLogger("uvicorn.error")
    uvicorn.setLevel(logging.WARNING)
    uvicorn.addHandler(handler)
