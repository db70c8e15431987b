"""The demo: train on handwritten digits, then one recipe from the module to measured candidates.

python examples/digits/demo.py [OUTPUT]; OUTPUT is build/demo by default and is made anew.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILES = ("model.py", "recipe.toml")


def main(output: Path) -> None:
    """Train, run the recipe, say where the winner lies."""
    started = time.monotonic()
    if output.exists():
        if not (output / "recipe.toml").is_file():
            raise SystemExit(f"{output} exists and is no demo's; name another folder")
        shutil.rmtree(output)
    output.mkdir(parents=True)
    for name in FILES:
        shutil.copy(HERE / name, output / name)
    step([sys.executable, "model.py", "."], output)
    print(f"training: {time.monotonic() - started:.0f} s", flush=True)
    step([sys.executable, "-m", "deploykit", "run", "recipe.toml", "-o", "result"], output)
    print(f"demo: {time.monotonic() - started:.0f} s; artifacts and report: {output / 'result'}")


def step(command: list[str], folder: Path) -> None:
    """Run a command in the output folder; stop where it fails."""
    # A bare checkout has no installed deploykit: the children find this one.
    paths = [str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "DIGITS": str(folder)}
    if subprocess.run(command, cwd=folder, env=env, check=False).returncode:
        raise SystemExit(f"failed: {' '.join(command)}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/demo").resolve())
