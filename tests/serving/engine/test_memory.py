"""Freed memory stays with the process where the C library can be told so."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

_CODE = """
import json, resource, sys
import numpy as np
from deploykit.serving.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        held = [np.ones(150_000, np.float32) for _ in range(8)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
usual = faults()
told = keep_freed_memory()
faults()
json.dump([usual, told, faults()], sys.stdout)
"""


def test_blocks_of_tensors_size_are_not_mapped_anew() -> None:
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=True)
    usual, told, kept = json.loads(done.stdout)
    glibc = sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc"
    assert told is glibc
    if glibc:
        assert usual > 10_000, "the C library keeps such blocks by itself: is `memory.py` still needed?"
        assert kept < usual / 20
