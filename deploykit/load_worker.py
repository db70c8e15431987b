"""Child process of `inspect`: python load_worker.py ort|openvino MODEL; prints one line of JSON.

Run by path and importing nothing of DeployKit, so that a runtime that crashes or hangs does so in here.
"""

import json
import os
import sys


def main(runtime: str, path: str) -> None:
    """Load a model on the CPU and say how that went."""
    if runtime == "ort":
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime

        version = onnxruntime.__version__
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        # What the runtime would make of the graph is not asked here, and takes time.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL

        def load() -> None:
            onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    else:
        # It would report this import, from a process that may hang.
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
        import openvino

        version = openvino.__version__.split("-")[0]

        def load() -> None:
            openvino.Core().compile_model(path, "CPU")

    try:
        load()
        reason = None
    except Exception as exc:  # noqa: BLE001 - whatever the runtime says is the finding
        reason = str(exc) or type(exc).__name__
    print(json.dumps({"version": version, "reason": reason}))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:3])
