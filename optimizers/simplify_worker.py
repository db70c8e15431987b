"""Child process of `simplify`: simplifies one model a line until its standard input ends.

Request: `{"tool": "onnxsim"|"onnxslim", "source": "IN.onnx", "target": "OUT.onnx", "fold_limit_bytes": 1048576}`.
Answer: `{"failed": null}`, or the reason. Both are JSON on one line.

Run by path and importing nothing of DeployKit, so that a crash, a hang or an import of torch stays in here.
"""

import json
import os
import sys
from typing import Any

# protobuf refuses messages of 2 GiB.
_INLINE_LIMIT_BYTES = 1_900_000_000


def simplify(tool: str, source: str, target: str, fold_limit_bytes: int) -> None:
    """Simplify ``source`` into ``target``, folding no constant beyond the limit; raises where it cannot."""
    import onnx

    model = onnx.load(source)
    if tool == "onnxsim":
        # Measured: its start takes 2.0 s without torch and 5.9 s with it, for checks that are not asked for here.
        sys.modules["torch"] = None  # type: ignore[assignment]
        import onnxsim

        simplified, equal = onnxsim.simplify(model, tensor_size_threshold=f"{fold_limit_bytes}B")
        if not equal:
            raise SystemExit("onnxsim's own check found different outputs")
    else:
        import onnxslim

        simplified = onnxslim.slim(model, size_threshold=fold_limit_bytes)
    del model
    if sum(len(tensor.raw_data) for tensor in simplified.graph.initializer) >= _INLINE_LIMIT_BYTES:
        location = os.path.basename(target) + ".data"  # noqa: PTH119 - the start of this process is waited for
        onnx.save(simplified, target, save_as_external_data=True, location=location, size_threshold=1024)
    else:
        onnx.save(simplified, target)


def _answer(request: dict[str, Any]) -> str | None:
    try:
        simplify(request["tool"], request["source"], request["target"], request["fold_limit_bytes"])
    except (Exception, SystemExit) as exc:  # noqa: BLE001 - whatever a simplifier raises is its answer
        lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
        kind = "" if isinstance(exc, SystemExit) else type(exc).__name__
        return ": ".join(part for part in (kind, lines[0] if lines else "") if part)[:200] or "it gave no reason"
    return None


def main() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the simplifiers print is no answer
    for line in sys.stdin:
        answers.write(json.dumps({"failed": _answer(json.loads(line))}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
