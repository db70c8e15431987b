"""`deploykit data`: what it prints, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 1, 4, 4), np.uint8)


@pytest.fixture
def images(tmp_path):
    np.savez(tmp_path / "images.npz", image=IMAGES, labels=np.arange(40) % 4)


def test_pack_show_select(images, cli):
    done = cli("data", "pack", "images.npz", "-o", "d.zarr", "--mean", "0.5", "--std", "0.25", "--chunk", "64B")
    assert done.returncode == 0, done.stderr
    assert "zarr, 40 samples" in done.stdout
    assert "uint8 * (0.0156863) + (-2) to float32" in done.stdout
    shown = cli("data", "show", "d.zarr", "--json")
    told = json.loads(shown.stdout)
    assert told["verified"] and len(told["digest"]) == 64
    assert [a["shape"] for a in told["arrays"] if a["name"] == "image"] == [[40, 1, 4, 4]]
    done = cli("data", "select", "d.zarr", "-o", "part.zarr", "-n", "8")
    assert done.returncode == 0, done.stderr
    assert "8 of 40 samples of d.zarr" in done.stdout
    assert "4 classes" in done.stdout
    shown = cli("data", "show", "part.zarr")
    assert "selected: 8 of 40 samples of d.zarr, k-center on inputs, seed 0" in shown.stdout
    assert f"source: sha256 {told['digest']}" in shown.stdout
    done = cli("data", "select", "images.npz", "-o", "part.npz", "--fraction", "0.1", "--method", "herding", "--json")
    assert len(json.loads(done.stdout)["indices"]) == 4
    assert "? " not in cli("data", "show", "part.npz", "--no-verify").stdout


@pytest.mark.parametrize(
    ("args", "code", "word"),
    [
        (["pack", "images.npz", "-o", "d"], 1, ".zarr"),
        (["pack", "none.npz", "-o", "d.zarr"], 1, "does not exist"),
        (["pack", "images.npz", "-o", "d.zarr", "--mean", "0.5,0.5"], 1, "--channel-axis"),
        (["pack", "images.npz", "-o", "d.zarr", "--mean", "half"], 2, "between commas"),
        (["pack", "images.npz", "-o", "d.zarr", "--chunk", "0"], 2, "--chunk"),
        (["pack", "images.npz", "-o", "d.zarr", "--float16"], 1, "float32"),
        (["pack", "images.npz", "-o", "d.zarr", "--channel-axis", "-1"], 2, "--channel-axis goes with --mean"),
        (["select", "images.npz", "-o", "d.npz"], 2, "--fraction"),
        (["select", "images.npz", "-o", "d.npz", "-n", "3", "--fraction", "0.5"], 2, "--fraction"),
        (["select", "images.npz", "-o", "d.npz", "-n", "41"], 1, "40 samples"),
        (["select", "images.npz", "-o", "d.npz", "-n", "3"], 1, "--no-stratify"),
        (["show", "none.zarr"], 1, "does not exist"),
    ],
)
def test_what_is_refused(images, cli, tmp_path, args, code, word):
    done = cli("data", *args)
    assert done.returncode == code, done.stderr
    assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"images.npz"}


def test_every_verb_takes_it(images, cli, tmp_path):
    """A damaged store is one line about the chunk, whichever verb reads it."""
    assert cli("data", "pack", "images.npz", "-o", "d.zarr").returncode == 0
    (chunk,) = (tmp_path / "d.zarr" / "image" / "c").rglob("0/0/0/0")
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"\0")
    done = cli("data", "select", "d.zarr", "-o", "part.npz", "-n", "4")
    assert done.returncode == 1
    assert "chunk c/0/0/0/0 of 'image'" in done.stderr
    assert not (tmp_path / "part.npz").exists()
