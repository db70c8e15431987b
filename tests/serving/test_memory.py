"""Freed memory stays where the next request finds it."""

from __future__ import annotations

import platform
import subprocess
import sys

CODE = """
import resource, numpy as np
from deploykit.serving.memory import keep_freed_memory
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        blocks = [np.ones(150_000, np.float32) for _ in range(4)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(10); plain = faults(100); told = keep_freed_memory(); faults(10); kept = faults(100)
print(told, plain, kept)
"""


def test_pages_are_not_paid_for_again():
    run = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
    told, plain, kept = run.stdout.split()
    assert told == str(platform.libc_ver()[0] == "glibc")
    if told == "True":
        assert int(kept) < 100 < int(plain)
