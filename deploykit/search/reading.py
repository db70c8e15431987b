"""Reading the document of a search: validated, or an error that says what it is instead."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.benchmarks.reading import REPORT, Kind, check_document, load_json, read_report, read_text
from deploykit.benchmarks.report import Report
from deploykit.errors import SearchError
from deploykit.search.schema import SCHEMA_VERSION, SearchDocument, what_is_wrong

DOCUMENT, BENCHMARK, RECIPE = "optimize.json", "benchmark.json", "recipe.toml"
SEARCH = Kind(
    f"what `deploykit optimize -o DIR` wrote: DIR, or DIR/{DOCUMENT}",
    "search anew: deploykit optimize SOURCE -o DIR",
    "document of a search",
    SearchError,
)
# As much as `Artifact.open` reads of it.
_LIMIT_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Beside:
    """What stands beside the document of a search.

    Attributes:
        benchmark: The measurement that decided; None where the search ended before it.
        recipe: Text of the recipe that makes the winner again; None where there is none.
    """

    benchmark: Report | None = None
    recipe: str | None = None


def is_search(data: Any) -> bool:
    """Whether JSON is the document of a search, and not that of a benchmark."""
    return isinstance(data, dict) and ("wish" in data or "tried" in data) and "candidates" not in data


def load_any(path: str | Path) -> tuple[Any, str]:
    """What JSON holds, of a benchmark or of a search, and the file's name; not validated.

    Args:
        path: A file, or the output of `deploykit optimize`.

    Raises:
        DeploykitError: There is no such file, or it holds no JSON.
    """
    file = place_of(path)
    kind = Kind(f"{REPORT.expected}, or {SEARCH.expected}", REPORT.hint, REPORT.noun)
    return load_json(read_text(file, kind), str(file), kind), str(file)


def read_document(path: str | Path) -> dict[str, Any]:
    """Read and validate the document of a search.

    Args:
        path: Output of `deploykit optimize`, or its `optimize.json`.

    Returns:
        The document, with null or nothing where it leaves out what it may.

    Raises:
        SearchError: There is no such file, or it holds anything else.
    """
    file = place_of(path)
    return as_document(load_json(read_text(file, SEARCH), str(file), SEARCH), str(file))


def place_of(path: str | Path) -> Path:
    """The document's file: of an output's directory the one in it.

    Raises:
        SearchError: A directory without one, or with one that no search wrote.
    """
    file = Path(path)
    if not file.is_dir():
        return file
    document = file / DOCUMENT
    if not document.exists():
        raise SearchError(f"{file} is a directory without {DOCUMENT}", expected=SEARCH.expected, hint=SEARCH.hint)
    if document.stat().st_size > _LIMIT_BYTES:
        raise SearchError(f"{document} is larger than {_LIMIT_BYTES} bytes", expected=SEARCH.expected, hint=SEARCH.hint)
    return document


def as_document(data: Any, name: str) -> dict[str, Any]:
    """The same for what JSON held.

    Args:
        data: What JSON held.
        name: What errors call it.

    Raises:
        SearchError: It is no document of a search.
    """
    check_document(data, name, SEARCH, "wish", (SCHEMA_VERSION,), what_is_wrong)
    found: dict[str, Any] = _finite(SearchDocument.model_validate(data).model_dump())
    return found


def read_beside(path: str | Path) -> Beside:
    """What stands beside a document.

    Args:
        path: As for `read_document`.

    Raises:
        DeploykitError: It is there, and it is damaged.
    """
    folder = place_of(path).parent
    benchmark, recipe = folder / BENCHMARK, folder / RECIPE
    kind = Kind("a recipe in TOML", "make it again: deploykit optimize SOURCE -o DIR", "recipe", SearchError)
    return Beside(
        read_report(benchmark) if benchmark.exists() else None,
        read_text(recipe, kind) if recipe.exists() else None,
    )


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity, though Python reads both."""
    if isinstance(value, dict):
        return {key: _finite(found) for key, found in value.items()}
    if isinstance(value, list):
        return [_finite(found) for found in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
