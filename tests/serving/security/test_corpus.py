"""How many bad inputs there are, and that the table of threats names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
TABLES = {
    HERE / "test_onnx.py": ("LOCATIONS", "ENTRIES", "PLACES", "BYTES"),
    HERE / "test_files.py": ("ARCHIVES", "GOLDEN", "BROUGHT", "MANIFESTS", "RECIPES"),
    HERE.parent / "test_malformed.py": ("JSON", "OBJECTS", "INTEGERS", "BYTES", "STRINGS", "ENCODED", "RAW"),
}


def sizes(path):
    """Entries of every table at the top of a module, without importing it."""
    return {
        node.targets[0].id: len(node.value.keys)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Dict)
    }


def test_there_are_more_than_200_cases():
    found = {path: sum(sizes(path)[name] for name in names) for path, names in TABLES.items()}
    assert sum(found.values()) >= 400
    assert all(count >= 80 for count in found.values()), found


def test_every_threat_names_its_tests():
    text = (ROOT / "THREAT_MODEL.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) >= 15
    for file, function in named:
        path = ROOT / file
        assert path.is_file(), file
        assert not function or re.search(rf"^ *(async )?def {function}\(", path.read_text(encoding="utf-8"), re.M), (
            function
        )
