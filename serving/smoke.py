"""The smoke test of a bundle: its golden requests, asked of a server or in process, judged by its contract."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.artifact import Artifact, is_artifact
from deploykit.benchmarks.parity import Verdict, check_vacuity, compare, compare_lossy, without_padding
from deploykit.errors import PackageError
from deploykit.runtimes import open_session
from deploykit.runtimes.settings import RuntimeSettings
from deploykit.serving.bundles import Bundle, Contract, is_bundle
from deploykit.serving.smoke_http import Server
from deploykit.specs import Array, Signature

Case = tuple[dict[str, Array], dict[str, Array]]


def judge(cases: Sequence[Case], answers: Sequence[Mapping[str, Array]], contract: Contract) -> dict[str, Any]:
    """Compare answers with the golden ones; a parity record.

    Args:
        cases: Golden requests: inputs and outputs.
        answers: One mapping a request.
        contract: When an answer counts as the golden one.
    """
    expected = [golden for _, golden in cases]
    if contract.min_cosine is None:
        result = compare(expected, answers, bounded=contract.bounded)
    else:
        feeds = [inputs for inputs, _ in cases]
        result = compare_lossy(without_padding(expected, feeds), without_padding(answers, feeds), contract.min_cosine)
    record = result.as_dict()
    vacuous = check_vacuity(expected)
    if vacuous and result.verdict is Verdict.PASSED:
        record |= {"verdict": str(Verdict.UNVERIFIABLE), "reason": vacuous}
    return record


def accepted(record: Mapping[str, Any], contract: Contract) -> bool:
    """Whether a record is as good as the artifact's own evidence."""
    return record["verdict"] == "passed" or (record["verdict"] == "unverifiable" and contract.unverifiable)


def deviation(record: Mapping[str, Any]) -> float | None:
    """The largest absolute difference of any output; None where there is no number."""
    found = [o["max_abs"] for o in record.get("outputs", ()) if o["max_abs"] is not None]
    return max(found, default=None)


def smoke(
    path: str | Path,
    url: str | None = None,
    *,
    wire: str = "binary",
    wait_s: float = 0.0,
    timeout_s: float = 60.0,
    headers: Mapping[str, str] | None = None,
    ca: str | Path | None = None,
) -> dict[str, Any]:
    """Replay the golden requests of a bundle, or of an artifact, and judge the answers.

    Args:
        path: What `package` wrote, or an artifact.
        url: Of a server that has the model; None to run it in this process.
        wire: How tensors travel in the Open Inference Protocol: "binary" or "json".
        wait_s: How long to wait until the server says that the model is ready.
        timeout_s: For one request.
        headers: Sent with every request, such as a bearer token.
        ca: Certificates that the server's is checked with; by default those of the system.

    Returns:
        A parity record with "against", "target", "max_abs", "seconds" and "passed".

    Raises:
        PackageError: No bundle, or the server does not answer, or not as the protocol says.
        ArtifactError: An artifact that was changed.
    """
    root = Path(path)
    if is_bundle(root):
        bundle = Bundle.open(root)
        cases, contract, target = bundle.golden(), bundle.manifest.contract, bundle.manifest.target
        name, protocol, columns = bundle.manifest.name, bundle.manifest.protocol, tuple(bundle.manifest.columns)
        model, settings, signature, edited = bundle.model_path, bundle.settings, bundle.signature, bundle.edited
    elif is_artifact(root):
        cases, contract, model, settings, signature = _of_artifact(Artifact.open(root))
        name, protocol, columns, target, edited = root.resolve().name, "v2", (), "artifact", ()
    else:
        raise PackageError(f"{root} is no bundle and no artifact", hint="make one: deploykit package ARTIFACT -o DIR")
    start = time.perf_counter()
    if url is None:
        with open_session(model, tuned=settings) as session:
            against = str(session.device)
            answers = [session.run(inputs) for inputs, _ in cases]
    else:
        against = url
        server = Server(url, name, protocol, columns, wire, timeout_s, dict(headers or {}), str(ca) if ca else None)
        server.wait(wait_s)
        answers = [_restored(server.ask(inputs, signature), golden) for inputs, golden in cases]
    record = judge(cases, answers, contract)
    return {
        "against": against, "target": target, "model": name, "passed": accepted(record, contract),
        "max_abs": deviation(record), "seconds": round(time.perf_counter() - start, 3), "edited": list(edited),
    } | record  # fmt: skip


def _of_artifact(artifact: Artifact) -> tuple[list[Case], Contract, Path, RuntimeSettings, Signature]:
    from deploykit.progress import Progress
    from deploykit.serving.package_plan import choose_settings, contract_of, golden_cases

    runs = ("ort", "openvino")
    settings, _ = choose_settings(artifact, None, None, runs, "this process", Progress())
    return golden_cases(artifact), contract_of(artifact), artifact.path, settings, artifact.signature


def _restored(answer: Mapping[str, Array], golden: Mapping[str, Array]) -> dict[str, Array]:
    """Strings as numpy has them, so that they can be compared."""
    return {
        name: array.astype(str) if array.dtype.kind == "O" and name in golden else np.asarray(array)
        for name, array in answer.items()
    }
