"""What a job found before it was ended: a file that grows by a line for each thing that it begins or has done."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def teller(path: str | None) -> Callable[[Mapping[str, Any]], None]:
    """Appends lines to a file that begins anew; to none where it is another machine's."""
    if path is None or not Path(path).parent.is_dir():
        return lambda line: None
    Path(path).write_text("", encoding="utf-8")

    def tell(line: Mapping[str, Any]) -> None:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    return tell


def read_so_far(path: Path) -> tuple[dict[str, dict[str, Any]], str | None]:
    """What a job told before it was ended.

    Returns:
        What was found, by name, and what was under way; None where nothing was.
    """
    found: dict[str, dict[str, Any]] = {}
    now = None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return found, now
    for line in lines:
        try:
            told = json.loads(line)
        except ValueError:  # half a line
            break
        now = told.get("began")
        if "judged" in told:
            found[told["judged"]] = told["entry"]
    return found, now
