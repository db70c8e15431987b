"""kill -9 at random moments, and on: python benchmarks/suite/optimize_kill.py [--kills N]

A trained classifier is searched once to the end. Then a search for the same, with a cache of its own, is killed with
all its children after a random time and resumed, again and again, until it was killed so many times; the last one runs
to the end. The objective is size, all else is as ever: who wins among those that are equally fast is left to chance,
killed or not. Whatever stands in the output after a kill has to open as an artifact that gives its golden
classes; in the end the winner has to be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import deploykit
from deploykit.artifact import Artifact
from deploykit.errors import DeploykitError


def command(folder: Path, output: str, budget: float, *, resume: bool) -> list[str]:
    """The search."""
    return [
        sys.executable, "-m", "deploykit", "optimize", f"{folder / 'net.py'}:net", "-o", str(folder / output), "--data",
        str(folder / "calib.npz"), "--eval", str(folder / "eval.npz"), "--metric", "accuracy", "--max-drop", "0.01",
        "--objective", "size", "--budget", str(budget),
        "--cache", str(folder / f"cache-{output}"), *(["--resume"] if resume else []),
    ]  # fmt: skip


def check(output: Path) -> str:
    """What stands there: nothing yet, or a winner that is whole and right."""
    if not (output / "optimize.json").is_file():
        return "nothing yet"
    document = json.loads((output / "optimize.json").read_text(encoding="utf-8"))
    if document["winner"] is None:
        return "no winner yet"
    artifact = Artifact.open(output / document["winner"])
    (feeds, expected), *_ = artifact.golden()
    with deploykit.load(output) as session:
        got = session.run(feeds)
    same = all((got[name].argmax(-1) == expected[name].argmax(-1)).all() for name in expected)
    if not same:
        raise SystemExit(f"{output}: the winner {document['winner']} does not give its golden classes")
    return f"{document['state']}, {document['winner']}"


def main() -> int:
    """Print every kill, and whether the winner is the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--budget", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        folder = Path(name)
        sys.path.insert(0, str(Path(__file__).parent))
        import optimize_grid

        optimize_grid.write_data(folder)
        optimize_grid.write_source(folder)
        began = time.monotonic()
        subprocess.run(command(folder, "whole", options.budget, resume=False), check=True, capture_output=True)
        whole = time.monotonic() - began
        wanted = json.loads((folder / "whole" / "optimize.json").read_text(encoding="utf-8"))
        print(f"undisturbed in {whole:.0f} s: {wanted['headline']}", flush=True)
        output, kills, finished = folder / "best", 0, 0
        while kills < options.kills:
            resume = output.exists()
            child = subprocess.Popen(
                command(folder, "best", options.budget, resume=resume), start_new_session=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            after = draw.uniform(0.5, whole)
            try:
                _, said = child.communicate(timeout=after)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.communicate()
                kills += 1
                print(f"kill {kills} after {after:.1f} s: {check(output)}", flush=True)
                continue
            if child.returncode:
                raise SystemExit(f"it failed: {said.strip().splitlines()[-1]}")
            finished += 1  # before the kill came: the same winner, and once more from the beginning
            same(wanted, output)
            shutil.rmtree(output)
            shutil.rmtree(folder / "cache-best", ignore_errors=True)
        resume = output.exists()
        subprocess.run(command(folder, "best", options.budget, resume=resume), check=True, capture_output=True)
        same(wanted, output)
        print(f"{kills} kills, {finished + 1} searches that ended, the same winner each time")
    return 0


def same(wanted: dict[str, object], output: Path) -> None:
    """Stop where the winner is another."""
    try:
        found = json.loads((output / "optimize.json").read_text(encoding="utf-8"))
        check(output)
    except (OSError, ValueError, DeploykitError) as exc:
        raise SystemExit(f"{output} is damaged: {exc}") from exc
    if found["winner"] != wanted["winner"]:
        raise SystemExit(f"another winner: {found['headline']}, not {wanted['headline']}")
    print(f"ended: {found['headline']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
