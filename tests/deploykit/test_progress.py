"""What frameworks print goes to the log, and the way back to the terminal survives whatever happens."""

import os
import sys
import warnings
from pathlib import Path

import pytest

from deploykit.progress import quiet


def test_everything_goes_to_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    with quiet(log):
        print("printed")
        print("to stderr", file=sys.stderr)
        os.write(2, b"native\n")
        warnings.warn("a warning", stacklevel=1)
    os.write(1, b"back")
    out, err = capfd.readouterr()
    assert (out, err) == ("back", "")
    text = log.read_text()
    assert all(word in text for word in ("printed", "to stderr", "native", "a warning"))


@pytest.mark.parametrize("fails", [False, True])
def test_a_full_disk_does_not_swallow_the_terminal(capfd: pytest.CaptureFixture[str], fails: bool) -> None:
    try:
        with quiet(Path("/dev/full")):
            print("lost")
            if fails:
                raise ValueError("the block's own error")
    except ValueError as exc:
        assert fails and "own error" in str(exc)
    os.write(2, b"back")
    assert capfd.readouterr().err == "back"
