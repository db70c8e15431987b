"""Child process of `simplify`: python simplify_worker.py onnxsim|onnxslim IN.onnx OUT.onnx.

Run by path and importing nothing of DeployKit, so that a crash, a hang or an import of torch stays in here.
"""

import sys


def main(tool: str, source: str, target: str) -> None:
    """Simplify ``source`` into ``target``; raises where it cannot."""
    import onnx

    model = onnx.load(source)
    if tool == "onnxsim":
        import onnxsim

        simplified, equal = onnxsim.simplify(model)
        if not equal:
            raise SystemExit("onnxsim's own check found different outputs")
    else:
        import onnxslim

        simplified = onnxslim.slim(model)
    large = simplified.ByteSize() >= 1_900_000_000
    if large:
        onnx.save(simplified, target, save_as_external_data=True, location="model.onnx.data", size_threshold=1024)
    else:
        onnx.save(simplified, target)


if __name__ == "__main__":
    main(*sys.argv[1:4])
