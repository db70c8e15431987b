import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def digits():
    """The module `digits.py`, which stands beside this file: a really trained network, spoiled on request."""
    spec = importlib.util.spec_from_file_location("_digits", Path(__file__).with_name("digits.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
