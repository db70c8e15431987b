"""Looking at pages: their elements, and what a browser makes of them."""

import os
import shutil
import signal
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np

VOID = {"meta", "input"}
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'><!--\u202e\x00\ud800 & ]]>"
BROWSER = next((b for b in ("chromium", "chromium-browser", "google-chrome", "chrome") if shutil.which(b)), None)
NO_BROWSER = "no chromium or chrome is installed to open the page in"


class Page(HTMLParser):
    """Elements as (tag, attributes, ancestors), texts, and errors of nesting."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop()[0] == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.texts.append((data, tuple(self.open)))

    def sections(self):
        return [a["id"] for tag, a, _ in self.elements if tag == "section"]

    def marks(self, section, tag, *, width="wide"):
        """Drawn marks of one section, in the desk's version, with the candidate that they belong to."""
        found = []
        for name, attrs, above in self.elements:
            inside = any(t == "section" and a.get("id") == section for t, a in above)
            shown = any("class" in a and a["class"] == width for _, a in above)
            if name == tag and inside and shown and "m" in (attrs.get("class") or "").split():
                owner = next((a["data-c"] for _, a in reversed(above) if "data-c" in a), None)
                found.append((None if owner is None else int(owner), attrs))
        return found

    def embedded(self):
        return "".join(t for t, above in self.texts if above and above[-1][1].get("id") == "report")


def browse(profile, path, *options):
    """Open a page in a headless browser that keeps its things in a folder; gives its standard output and error."""
    # The start of a browser hangs once in a while on a busy machine; a page that hangs does so in both.
    for attempt in range(2):
        command = [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
            f"--user-data-dir={profile}-{attempt}", "--virtual-time-budget=2000", *options, path.as_uri(),
        ]  # fmt: skip
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
            start_new_session=True,
        )  # fmt: skip
        try:
            stdout, stderr = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its renderers too, which hold the pipes
            process.communicate()
            continue
        assert process.returncode == 0, stderr[-2000:]
        return SimpleNamespace(stdout=stdout, stderr=stderr)
    raise AssertionError(f"the browser did not come to an end with {path}, twice")


def read_png(data):
    """Pixels of an 8-bit RGB or RGBA file, shape [height, width, channels]."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, packed = 8, b""
    while place < len(data):
        size, kind = struct.unpack(">I4s", data[place : place + 8])
        if kind == b"IHDR":
            width, height, depth, color = struct.unpack(">IIBB", data[place + 8 : place + 18])
            assert depth == 8
        packed += data[place + 8 : place + 8 + size] if kind == b"IDAT" else b""
        place += size + 12
    channels = {2: 3, 6: 4}[color]
    lines = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + width * channels)
    rows = np.zeros((height + 1, width + 1, channels), np.uint8)  # a border of zeros above and to the left
    for n in range(height):
        rows[n + 1, 1:] = unfilter(int(lines[n, 0]), lines[n, 1:].reshape(width, channels), rows[n])
    return rows[1:, 1:]


def unfilter(kind, line, above):
    if kind == 0:
        return line
    if kind == 1:
        return np.cumsum(line, axis=0, dtype=np.uint8)
    if kind == 2:
        return line + above[1:]
    made = np.zeros((len(line) + 1, line.shape[1]), np.int64)
    up = above.astype(np.int64)
    for x in range(1, len(made)):
        left, over, corner = made[x - 1], up[x], up[x - 1]
        if kind == 3:
            guess = (left + over) // 2
        else:
            first = left + over - corner
            a, b, c = abs(first - left), abs(first - over), abs(first - corner)
            guess = np.where((a <= b) & (a <= c), left, np.where(b <= c, over, corner))
        made[x] = (line[x - 1] + guess) % 256
    return made[1:].astype(np.uint8)
