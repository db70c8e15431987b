"""Child process of `simplify` and `fuse`: rewrites one model a line until its standard input ends.

Request: `{"tool": "onnxsim", "source": "IN.onnx", "target": "OUT.onnx", "fold_limit_bytes": 1048576}`; the tool is
"onnxsim", "onnxslim", "onnxscript", or "transformers:" and a model type of `onnxruntime.transformers`.
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
    """Rewrite ``source`` into ``target``, folding no constant beyond the limit; raises where it cannot."""
    import onnx

    model = onnx.load(source)
    if tool == "onnxsim":
        # Measured: its start takes 2.0 s without torch and 5.9 s with it, for checks that are not asked for here.
        sys.modules["torch"] = None  # type: ignore[assignment]
        import onnxsim

        simplified, equal = onnxsim.simplify(model, tensor_size_threshold=f"{fold_limit_bytes}B")
        if not equal:
            raise SystemExit("onnxsim's own check found different outputs")
    elif tool == "onnxslim":
        import onnxslim

        simplified = onnxslim.slim(model, size_threshold=fold_limit_bytes)
    elif tool == "onnxscript":
        simplified = _by_rules(model, fold_limit_bytes)
    else:
        simplified = _by_fusions(model, tool.partition(":")[2])
    del model
    if sum(len(tensor.raw_data) for tensor in simplified.graph.initializer) >= _INLINE_LIMIT_BYTES:
        location = os.path.basename(target) + ".data"  # noqa: PTH119 - the start of this process is waited for
        onnx.save(simplified, target, save_as_external_data=True, location=location, size_threshold=1024)
    else:
        onnx.save(simplified, target)


def _by_rules(model: Any, fold_limit_bytes: int) -> Any:
    """The optimizer of onnxscript, then its default rules; both stay within the standard's operators."""
    from onnxscript import ir, optimizer, rewriter

    found = ir.serde.deserialize_model(model)
    # Its limits are in elements; four bytes are the most frequent kind.
    optimizer.optimize_ir(found, output_size_limit=fold_limit_bytes // 4)
    return ir.serde.serialize_model(rewriter.rewrite(found))


def _by_fusions(model: Any, model_type: str) -> Any:
    """The fusions of `onnxruntime.transformers`, without a session of ONNX Runtime: nothing fits one machine only."""
    import onnx
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    options = FusionOptions(model_type)
    # By default, masks become lengths, which is right only where padding is at the end.
    options.use_raw_attention_mask(True)
    # Made for GPUs: other layouts of images, and fusions that the CPU provider has no kernel for.
    options.enable_nhwc_conv = False
    options.enable_group_norm = False
    fused = optimizer.optimize_model(model, model_type, 0, 0, optimization_options=options, opt_level=0).model
    domains = {entry.domain for entry in fused.opset_import}
    if "com.microsoft" not in domains and any(node.domain == "com.microsoft" for node in fused.graph.node):
        fused.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return fused


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
