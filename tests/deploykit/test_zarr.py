"""Zarr stores: what is written is read bit for bit, by Zarr's own library too; the damaged and hostile are refused."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import struct
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr

from deploykit import pack_data, show_data, zarr_reader
from deploykit.data import Dataset
from deploykit.errors import DataError
from deploykit.zarr_format import PLAIN
from deploykit.zarr_writer import Layout

N = 37
SMALL = Layout(chunk_bytes=64, file_bytes=256)
dice = np.random.default_rng(0)


def any_bits(dtype: str, shape: tuple[int, ...]) -> Any:
    """Values of a type with any bits: NaN with payloads, negative zeros, infinities."""
    if dtype == "bool":
        return dice.integers(0, 2, shape).astype(bool)
    size = np.dtype(dtype).itemsize
    return np.frombuffer(dice.bytes(int(np.prod(shape)) * size), dtype).reshape(shape)


ARRAYS: dict[str, Any] = {
    **{name: any_bits(name, (N, 3) if i % 2 else (N, 2, 2)) for i, name in enumerate(sorted(PLAIN))},
    "labels": np.arange(N, dtype=np.int64) % 5,
    "text": np.array([f"né{i}" * (i % 3) for i in range(N)]),
    "codes": np.array([b"a%d" % i for i in range(N)]),
    "nothing": np.zeros((N, 0, 2), np.float32),
    "big": np.arange(N, dtype=">f4"),
    "wide": np.arange(N * 100, dtype=np.int32).reshape(N, 100),
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All types in many small chunks, several to a file; the last chunk and the last file are not full."""
    folder = tmp_path_factory.mktemp("packed")
    np.savez(folder / "d.npz", **ARRAYS)
    pack_data(folder / "d.npz", folder / "d.zarr", layout=SMALL)
    return folder / "d.zarr"


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    text = str(caught.value)
    assert text.isprintable()
    return text


def whole(dataset: Dataset, size: int) -> dict[str, Any]:
    parts = list(dataset.batches(size))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def same(found: Any, expected: Any) -> bool:
    native = expected.astype(expected.dtype.newbyteorder("="))
    return found.dtype == native.dtype and found.shape == native.shape and found.tobytes() == native.tobytes()


def document(store: Path, array: str) -> dict[str, Any]:
    return json.loads((store / array / "zarr.json").read_bytes())


@pytest.mark.parametrize("size", [1, 5, 100])
def test_round_trip(packed: Path, size: int) -> None:
    dataset = Dataset.open(packed)
    assert dataset.length == N
    assert dataset.has_labels
    found = whole(dataset, size)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert same(found[name], array), name


def test_zarr_itself_reads_it(packed: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # text of a fixed length is an extension
        group = zarr.open_group(packed, mode="r")
        for name, array in ARRAYS.items():
            assert np.asarray(group[name][...]).tobytes() == array.astype(array.dtype.newbyteorder("=")).tobytes(), name


def test_shapes_of_chunks(packed: Path) -> None:
    """Several chunks a file where there are several, one file where they are few; checksums everywhere."""
    arrays = zarr_reader.Store(packed).arrays
    assert arrays["wide"].chunk == (1, 100)  # a row that is larger than a chunk is to be
    assert arrays["wide"].sharding is None
    assert arrays["float64"].in_file[0] > 1
    assert all("crc32c" in a.codecs and "blosc" in a.codecs for a in arrays.values())
    assert {a.sharding.checked for a in arrays.values() if a.sharding} == {True}


def test_the_same_data_are_the_same_store(packed: Path, tmp_path: Path) -> None:
    again = pack_data(packed.parent / "d.npz", tmp_path / "again.zarr", layout=SMALL)
    assert again.digest == show_data(packed, verify=False).digest
    other = pack_data(packed.parent / "d.npz", tmp_path / "other.zarr")
    assert other.digest != again.digest
    for name, values in whole(Dataset.open(tmp_path / "other.zarr"), 50).items():
        assert same(values, ARRAYS[name])


# --- stores of other origin ------------------------------------------------------------------------------------------

VALUES = dice.normal(size=(11, 4, 6)).astype(np.float32)
BLOSC = zarr.codecs.BloscCodec(cname="lz4", shuffle="bitshuffle")
FOREIGN: dict[str, dict[str, Any]] = {
    "defaults": {},
    "columns": {"chunks": (4, 3, 4)},
    "raw": {"chunks": (4, 4, 6), "compressors": None},
    "gzip": {"chunks": (4, 4, 6), "compressors": zarr.codecs.GzipCodec()},
    "blosc": {"chunks": (4, 4, 6), "compressors": [BLOSC, zarr.codecs.Crc32cCodec()]},
    "checked inside": {"chunks": (4, 4, 6), "compressors": [zarr.codecs.Crc32cCodec(), zarr.codecs.ZstdCodec(level=3)]},
    "shards": {"chunks": (2, 2, 3), "shards": (4, 4, 6)},
    "index first": {
        "chunks": (4, 4, 6), "compressors": None,
        "serializer": zarr.codecs.ShardingCodec(chunk_shape=(2, 4, 6), index_location="start"),
    },
    "big endian": {"chunks": (4, 4, 6), "serializer": zarr.codecs.BytesCodec(endian="big")},
    "dots": {"chunks": (4, 4, 6), "chunk_key_encoding": {"name": "default", "separator": "."}},
    "old keys": {"chunks": (4, 4, 6), "chunk_key_encoding": {"name": "v2", "separator": "/"}},
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_stores_of_other_origin(tmp_path: Path, kind: str) -> None:
    group = zarr.create_group(tmp_path / "d.zarr")
    made = group.create_array("x", shape=VALUES.shape, dtype="float32", **FOREIGN[kind])
    made[...] = VALUES
    group.create_group("notes")  # not data
    for size in (1, 3, 100):
        found = whole(Dataset.open(tmp_path / "d.zarr"), size)
        assert found.keys() == {"x"}
        assert same(found["x"], VALUES)
    assert show_data(tmp_path / "d.zarr").verified == "every chunk decoded"


def test_chunks_that_were_not_written_are_fill(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "d.zarr")
    made = group.create_array("x", shape=(10, 2), chunks=(2, 2), dtype="float32", fill_value=np.nan)
    made[4:6] = 1
    group.create_array("y", shape=(10, 4), chunks=(1, 2), shards=(2, 4), dtype="int8", fill_value=7)[3, :2] = 1
    found = whole(Dataset.open(tmp_path / "d.zarr"), 3)
    assert np.isnan(found["x"]).sum() == 16
    assert (found["y"] == 7).sum() == 38


def test_one_array_is_a_dataset(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "images.zarr", data=VALUES)
    assert same(Dataset.open(tmp_path / "images.zarr").head(100)["images"], VALUES)


# --- reading a part --------------------------------------------------------------------------------------------------


def test_a_part_is_read_from_its_chunks(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    inner = zarr_reader.decode_chunk

    def counted(meta: Any, raw: bytes) -> Any:
        decoded.append(meta.name)
        return inner(meta, raw)

    monkeypatch.setattr(zarr_reader, "decode_chunk", counted)
    store = zarr_reader.Store(packed)
    assert not decoded
    read = store.rows(("int16",))
    step = store.arrays["int16"].chunk[0]
    assert step > 1
    assert same(read(step + 1, 2 * step)["int16"], ARRAYS["int16"][step + 1 : 2 * step])
    assert decoded == ["int16"]
    read(step, step + 1)  # the block is still there
    assert len(decoded) == 1
    read(2 * step - 1, 2 * step + 1)
    assert len(decoded) == 2
    decoded.clear()
    few = list(Dataset.open(packed).take([3, 20, 21], 2))
    assert [len(part["labels"]) for part in few] == [2, 1]
    assert same(np.concatenate([part["text"] for part in few]), ARRAYS["text"][[3, 20, 21]])
    assert decoded.count("wide") == 3
    assert decoded.count("labels") <= 2


def test_only_the_bytes_of_a_chunk_are_read(tmp_path: Path) -> None:
    """Of a file of many chunks: its index, and one of them. A damaged neighbour does not matter."""
    values = dice.integers(0, 255, (64, 100), np.uint8)
    np.savez(tmp_path / "d.npz", x=values)
    pack_data(tmp_path / "d.npz", tmp_path / "d.zarr", layout=Layout(chunk_bytes=400, file_bytes=10**6))
    (file,) = (tmp_path / "d.zarr" / "x" / "c").rglob("0/0")
    raw = bytearray(file.read_bytes())
    raw[50] ^= 1
    file.write_bytes(raw)
    read = zarr_reader.Store(tmp_path / "d.zarr").rows()
    assert same(read(60, 64)["x"], values[60:])
    assert "[0, 0] in c/0/0 of 'x'" in refused(lambda: read(0, 64))


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """16 MiB through chunks of 64 KiB: what is read at once, the file that is being filled, and copies of these."""
    rows = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=(2**14, 256))
    rows[:] = np.arange(256)
    rows.flush()
    del rows
    layout = Layout(chunk_bytes=2**16, file_bytes=2**20, level=1)
    np.savez(tmp_path / "tiny.npz", x=VALUES)
    pack_data(tmp_path / "tiny.npz", tmp_path / "tiny.zarr", layout=layout)  # imports, and what they allocate once
    tracemalloc.start()
    try:
        pack_data(tmp_path, tmp_path / "d.zarr", layout=layout)
        packing = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        for batch in Dataset.open(tmp_path / "d.zarr").batches(64):
            assert batch["x"][0, 3] == 3
        reading = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert packing < 10 * 2**20
    assert reading < 2**21


# --- damage ----------------------------------------------------------------------------------------------------------


def files_of(store: Path) -> list[Path]:
    return sorted(path for path in store.rglob("*") if path.is_file())


def test_a_changed_byte_is_found(packed: Path, tmp_path: Path) -> None:
    """In a chunk always, and it is named; in metadata wherever it changes what they say."""
    draw = random.Random(0)
    store = tmp_path / "d.zarr"
    shutil.copytree(packed, store)
    files = files_of(store)
    chunks = [file for file in files if file.name != "zarr.json"]
    for file in [*draw.sample(chunks, 25), *(f for f in files if f.name == "zarr.json")]:
        good = file.read_bytes()
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        file.write_bytes(bad)
        try:
            show_data(store)
        except DataError as exc:
            where = file.relative_to(store)
            if file in chunks:
                assert f"{'/'.join(where.parts[1:])} of {where.parts[0]!r}" in str(exc)
        else:
            assert file not in chunks
            for name, values in whole(Dataset.open(store), 50).items():
                assert same(values, ARRAYS[name])
        file.write_bytes(good)
    show_data(store)


def test_what_is_missing_or_cut_off(packed: Path, tmp_path: Path) -> None:
    store = tmp_path / "d.zarr"
    shutil.copytree(packed, store)
    file = store / "wide" / "c" / "7" / "0"
    good = file.read_bytes()
    for length in (0, 3, 15, len(good) - 1):
        file.write_bytes(good[:length])
        assert "chunk c/7/0 of 'wide'" in refused(lambda: whole(Dataset.open(store), 4))
    file.unlink()
    assert "not there" in refused(lambda: whole(Dataset.open(store), 4))
    assert same(next(Dataset.open(store).batches(7))["wide"], ARRAYS["wide"][:7])  # what is before it can be read
    file.write_bytes(good)
    shutil.rmtree(store / "codes")
    assert "changed" in refused(lambda: Dataset.open(store))


def test_other_values_with_right_checksums(packed: Path, tmp_path: Path) -> None:
    """A chunk of another place is a good chunk; the hashes tell."""
    store = tmp_path / "d.zarr"
    shutil.copytree(packed, store)
    shutil.copyfile(store / "wide" / "c" / "7" / "0", store / "wide" / "c" / "8" / "0")
    whole(Dataset.open(store), 50)
    assert "not those that were packed" in refused(lambda: show_data(store))


# --- hostile stores --------------------------------------------------------------------------------------------------

CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}]
SHARDS = {
    "chunk_shape": [1, 4], "codecs": CODECS, "index_codecs": [*CODECS, {"name": "crc32c"}], "index_location": "end",
}  # fmt: skip


def grid(*shape: int) -> dict[str, Any]:
    return {"name": "regular", "configuration": {"chunk_shape": list(shape)}}


def shards(**change: Any) -> list[Any]:
    return [{"name": "sharding_indexed", "configuration": {**SHARDS, **change}}]


def scaling(**told: Any) -> dict[str, Any]:
    return {"attributes": {"deploykit": {"scaling": {"dtype": "float32", **told}}}}


HOSTILE: dict[str, dict[str, Any]] = {
    "rows without end": {"shape": [2**60, 4]},
    "more rows than were filled": {"shape": [2**40, 4]},
    "a row of everything": {"shape": [4, 2**40], "chunk_grid": grid(4, 2**40)},
    "a row of many chunks": {"shape": [4, 2**24], "chunk_grid": grid(4, 1)},
    "no shape": {"shape": None},
    "a negative shape": {"shape": [-1, 4]},
    "a shape of truths": {"shape": [True, 4]},
    "dimensions": {"shape": [1] * 100},
    "chunks of nothing": {"chunk_grid": grid(0, 4)},
    "chunks of other rank": {"chunk_grid": grid(4)},
    "another grid": {"chunk_grid": {"name": "rectilinear", "configuration": {}}},
    "objects": {"data_type": "object"},
    "strings of any length": {"data_type": "string"},
    "bits": {"data_type": "r9999999999"},
    "a struct": {"data_type": {"name": "structured", "configuration": {"fields": []}}},
    "endless text": {"data_type": {"name": "fixed_length_utf32", "configuration": {"length_bytes": 2**40}}},
    "a pickle": {"codecs": [{"name": "numcodecs.pickle"}]},
    "a pickle inside": {"codecs": [*CODECS, {"name": "numcodecs.pickle", "configuration": {}}]},
    "vlen": {"codecs": [{"name": "vlen-utf8"}]},
    "a filter": {"codecs": [{"name": "transpose", "configuration": {"order": [1, 0]}}, *CODECS]},
    "two compressors": {"codecs": [*CODECS, {"name": "gzip"}, {"name": "gzip"}]},
    "no codecs": {"codecs": []},
    "codecs that are none": {"codecs": [[[]], 3]},
    "shards in shards": {"codecs": shards(codecs=[{"name": "sharding_indexed"}])},
    "chunks that do not fill shards": {"codecs": shards(chunk_shape=[3, 4])},
    "an index of everything": {"shape": [2**30, 4], "chunk_grid": grid(2**30, 4), "codecs": shards()},
    "keys elsewhere": {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "/../../"}}},
    "a transformer": {"storage_transformers": [{"name": "x"}]},
    "attributes that are none": {"attributes": [1]},
    "a scaling of words": scaling(scale=["1"], offset=[0]),
    "a scaling of other shape": scaling(scale=[1, 2], offset=[1, 2]),
    "a scaling to objects": scaling(dtype="object"),
    "an old format": {"zarr_format": 2},
}  # fmt: skip


def write_store(folder: Path, change: dict[str, Any], codecs: list[Any] = CODECS) -> Path:
    """A store of one array `x`, int8[4, 4] in a chunk, that Zarr 3 reads, before it is changed."""
    told = {
        "zarr_format": 3, "node_type": "array", "shape": [4, 4], "data_type": "int8", "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4, 4]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}}, "codecs": codecs,
    }  # fmt: skip
    (folder / "x" / "c" / "0").mkdir(parents=True)
    (folder / "x" / "c" / "0" / "0").write_bytes(bytes(range(16)))
    (folder / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    (folder / "x" / "zarr.json").write_text(json.dumps({**told, **change}))
    return folder


def test_the_store_before_it_is_changed(tmp_path: Path) -> None:
    found = whole(Dataset.open(write_store(tmp_path / "d.zarr", {})), 3)
    assert same(found["x"], np.arange(16, dtype=np.int8).reshape(4, 4))


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_metadata(tmp_path: Path, kind: str) -> None:
    store = write_store(tmp_path / "d.zarr", HOSTILE[kind])
    tracemalloc.start()
    try:
        refused(lambda: Dataset.open(store))
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "text", ["", "[]", "nul", '"group"', "{}", '{"zarr_format": 3}', "[" * 10**5, '{"zarr_format": ' + "1" * 5000 + "}",
             '{"zarr_format": 3, "node_type": "group", "x": "' + "x" * 2**21 + '"}', "\xff\xfe"]
)  # fmt: skip
def test_documents_that_are_none(tmp_path: Path, text: str) -> None:
    store = write_store(tmp_path / "d.zarr", {})
    for file in (store / "x" / "zarr.json", store / "zarr.json"):
        file.write_text(text, encoding="latin-1")
        refused(lambda: Dataset.open(store))


def test_links_and_pipes(tmp_path: Path) -> None:
    """Nothing outside of the store is read, and nothing blocks."""
    store = write_store(tmp_path / "d.zarr", {})
    chunk = store / "x" / "c" / "0" / "0"
    chunk.rename(tmp_path / "secret")
    chunk.symlink_to(tmp_path / "secret")
    assert "link" in refused(lambda: whole(Dataset.open(store), 4))
    chunk.unlink()
    os.mkfifo(chunk)
    assert "regular" in refused(lambda: whole(Dataset.open(store), 4))
    chunk.unlink()
    chunk.mkdir()
    refused(lambda: whole(Dataset.open(store), 4))
    shutil.rmtree(store / "x" / "c")
    (tmp_path / "elsewhere" / "0").mkdir(parents=True)
    (tmp_path / "secret").rename(tmp_path / "elsewhere" / "0" / "0")
    (store / "x" / "c").symlink_to(tmp_path / "elsewhere")
    assert "link" in refused(lambda: whole(Dataset.open(store), 4))
    (store / "x").rename(tmp_path / "array")
    (store / "x").symlink_to(tmp_path / "array")
    assert "link" in refused(lambda: Dataset.open(store))


def checked(data: bytes) -> bytes:
    return data + google_crc32c.value(data).to_bytes(4, "little")


def blosc_claim(size: int) -> bytes:
    return struct.pack("<4B3I", 2, 1, 4 << 5, 1, size, size, 20) + b"\0\0\0\0"


BOMBS: dict[str, tuple[str, bytes]] = {
    "gzip": ("gzip", gzip.compress(bytes(2**25))),
    "gzip that is cut off": ("gzip", gzip.compress(bytes(16))[:-4]),
    "gzip of too little": ("gzip", gzip.compress(bytes(15))),
    "blosc": ("blosc", blosc_claim(2**31 - 1)),
    "blosc of too little": ("blosc", blosc_claim(8)),
    "blosc that is none": ("blosc", blosc_claim(16)),
    "blosc by another codec": ("blosc", struct.pack("<4B3I", 2, 1, 0, 1, 16, 16, 20) + b"\0\0\0\0"),
    "blosc, empty": ("blosc", b""),
    "zstd": ("zstd", b"\x28\xb5\x2f\xfd\xe0" + (2**40).to_bytes(8, "little") + bytes(8)),
    "zstd that does not say": ("zstd", b"\x28\xb5\x2f\xfd\x00\x58" + bytes(8)),
    "zstd that is none": ("zstd", b"\x28\xb5\x2f\xfd\x20\x10" + b"\xff" * 8),
    "zstd, empty": ("zstd", b""),
    "raw": ("", bytes(2**20)),
    "raw of too little": ("", bytes(3)),
}


@pytest.mark.parametrize("sharded", [False, True], ids=["files", "shards"])
@pytest.mark.parametrize("kind", BOMBS)
def test_bombs(tmp_path: Path, kind: str, sharded: bool) -> None:
    """A chunk that would be anything but 16 bytes is refused before there is room for it; its checksum is right."""
    codec, data = BOMBS[kind]
    codecs: list[Any] = [*CODECS, *([{"name": codec, "configuration": {}}] if codec else []), {"name": "crc32c"}]
    data = checked(data)
    if sharded:
        codecs = shards(chunk_shape=[4, 4], codecs=codecs)
        data += checked(struct.pack("<2Q", 0, len(data)))
    store = write_store(tmp_path / "d.zarr", {}, codecs)
    (store / "x" / "c" / "0" / "0").write_bytes(data)
    dataset = Dataset.open(store)
    tracemalloc.start()
    try:
        assert "of 'x'" in refused(lambda: list(dataset.batches(4)))
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("entry", [(0, 2**63), (2**63, 16), (2**64 - 1, 16), (5, 16), (0, 0)])
def test_indexes_that_point_elsewhere(tmp_path: Path, entry: tuple[int, int]) -> None:
    codecs = shards(chunk_shape=[4, 4])
    store = write_store(tmp_path / "d.zarr", {}, codecs)
    index = checked(struct.pack("<2Q", *entry))
    (store / "x" / "c" / "0" / "0").write_bytes(bytes(16) + index)
    if entry == (5, 16):  # inside of the file: another value, not another place
        whole(Dataset.open(store), 4)
    else:
        refused(lambda: whole(Dataset.open(store), 4))


def test_format_2_is_told(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "d.zarr", zarr_format=2).create_array("x", data=VALUES)
    assert "format 2" in refused(lambda: Dataset.open(tmp_path / "d.zarr"))


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    assert "does not exist" in refused(lambda: Dataset.open(tmp_path / "d.zarr"))
    (tmp_path / "d.zarr").mkdir()
    assert "no .npy files" in refused(lambda: Dataset.open(tmp_path / "d.zarr"))
    zarr.create_group(tmp_path / "e.zarr")
    assert "no arrays" in refused(lambda: Dataset.open(tmp_path / "e.zarr"))
