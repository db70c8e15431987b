"""Golden requests, replayed: does this artifact, on this device, still give the outputs of its source model?"""

from __future__ import annotations

from typing import Any

from deploykit.artifact import Artifact
from deploykit.benchmarks.parity import Verdict, check_vacuity, compare, compare_lossy, without_padding
from deploykit.errors import ArtifactError
from deploykit.nodes import bounded_outputs
from deploykit.runtimes import Device, open_session


def replay_golden(
    artifact: Artifact, device: str | Device = "ort:cpu", *, min_cosine: float | None = None
) -> dict[str, Any]:
    """Run the golden inputs and compare with the golden outputs.

    Args:
        artifact: Opened, so verified.
        device: Where to run.
        min_cosine: Accept other values down to this cosine, for quantized models; None for strict equality.

    Returns:
        A parity record with "verdict" and the device.

    Raises:
        ArtifactError: There are no golden cases.
        DeviceError: The device cannot be had.
    """
    cases = artifact.golden()
    if not cases:
        raise ArtifactError(f"{artifact.path} holds no golden cases", hint="make it with deploykit export")
    with open_session(artifact, device) as session:
        names = {s.name for s in session.signature.inputs}
        outputs = [session.run({k: v for k, v in inputs.items() if k in names}) for inputs, _ in cases]
    expected = [golden for _, golden in cases]
    if min_cosine is None:
        result = compare(expected, outputs, bounded=bounded_outputs(artifact.model_path))
    else:
        feeds = [inputs for inputs, _ in cases]
        result = compare_lossy(without_padding(expected, feeds), without_padding(outputs, feeds), min_cosine)
    vacuous = check_vacuity(expected)
    if vacuous and result.verdict is Verdict.PASSED:
        unverifiable = {"verdict": str(Verdict.UNVERIFIABLE), "reason": vacuous}
        return {"against": "golden", "device": str(device), **result.as_dict(), **unverifiable}
    return {"against": "golden", "device": str(device), **result.as_dict()}
