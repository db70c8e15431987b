"""Freed memory stays where the next request finds it, and what nobody can reach does not pile up."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

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


HEAPS = """
import ctypes, re, threading
from deploykit.serving.memory import keep_freed_memory
told = keep_freed_memory()
import numpy as np
ready, ended = threading.Barrier(17), threading.Event()
def work():
    kept = np.ones(20_000, np.float32)
    ready.wait()
    ended.wait()
threads = [threading.Thread(target=work) for _ in range(16)]
for thread in threads: thread.start()
ready.wait()
libc = ctypes.CDLL(None)
libc.open_memstream.restype = ctypes.c_void_p
text, size = ctypes.c_char_p(), ctypes.c_size_t()
stream = ctypes.c_void_p(libc.open_memstream(ctypes.byref(text), ctypes.byref(size)))
libc.malloc_info(0, stream)
libc.fclose(stream)
print(told, len(re.findall(rb"<heap nr=", text.value)))
ended.set()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="heaps of threads are glibc's")
def test_threads_share_heaps():
    run = subprocess.run([sys.executable, "-c", HEAPS], check=True, capture_output=True, text=True)
    assert run.stdout.split() == ["True", "2"]


PILE = """
import gc
from collections import deque
from deploykit.serving.memory import set_what_stays_aside
class Request:
    alive = most = 0
    def __init__(self):
        self.itself = self
        Request.alive += 1
        Request.most = max(Request.most, Request.alive)
    def __del__(self):
        Request.alive -= 1
modules = [[n] for n in range(300_000)]
set_what_stays_aside()
waiting = deque(maxlen=2_000)
for _ in range(450_000):
    waiting.append(Request())
print(Request.most)
"""


def test_what_nobody_can_reach_does_not_pile_up_beside_large_modules():
    run = subprocess.run([sys.executable, "-c", PILE], check=True, capture_output=True, text=True)
    assert int(run.stdout) < 50_000
