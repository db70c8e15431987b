"""What a training does to its process, and takes back: logging, signals, randomness."""

from __future__ import annotations

import contextlib
import logging
import random
import signal
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from deploykit.extras import require


def load_libraries() -> None:
    """Import what a training needs, without what the libraries say about one another.

    Raises:
        MissingDependencyError: One is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("torch", "pytorch_lightning", "tensorboardX"):
            require(name, extra="train")


@contextlib.contextmanager
def silent_lightning() -> Iterator[None]:
    """Keep Lightning's advice off the terminal, for as long as it trains for us."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Take the first SIGINT or SIGTERM as a wish to stop after this step; the second one interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def untouched_randomness() -> Iterator[None]:
    """Leave the random state of the process as it was."""
    torch = require("torch", extra="train")
    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
