"""Calibration in parts: the bits of one run, whoever does the parts and in whatever order they are added."""

from __future__ import annotations

import random

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from deploykit.data import Dataset
from deploykit.errors import DataError, OptimizationError
from deploykit.optimizers import StaticConfig, optimize
from deploykit.runtimes import open_session
from deploykit.search.executor import LocalExecutor
from deploykit.search.shards import STATE, cut, merge_job, shard_job

CONFIG = StaticConfig(batch_size=16, calibration="mse")
SAMPLES = 250  # no multiple of the batch


def opener(path):
    return open_session(path, threads=1).run


@pytest.fixture
def whole(digits_net, tmp_path):
    """The state of one run over all data, with the quantized model that it made."""
    state, made = tmp_path / "whole.npz", tmp_path / "whole.onnx"
    config = StaticConfig(**{**asdict(CONFIG), "save_calibration": str(state), "max_samples": SAMPLES})
    quantize(digits_net, config, made, Dataset.open(digits_net.parent / "calib.npz"))
    return state, made


def asdict(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def quantize(model, config, target, data):
    return optimize(model, config, target, check=lambda _: None, open_model=opener, data=data)


def arrays(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def merged(executor, model, shards, folders, **options):
    futures = [executor.submit(shard_job(model, s, CONFIG, "ort:cpu", "net.onnx"), folders()) for s in shards]
    done = [f.result() for f in futures]
    states = [d.folder / STATE for d in done]
    random.Random(len(shards)).shuffle(states)
    total = executor.submit(merge_job(states), folders()).result()
    assert total.value["samples"] == sum(d.value["samples"] for d in done) == SAMPLES
    return total.folder / STATE


@pytest.mark.parametrize("count", [1, 3, 7])
def test_parts_add_up_to_the_bits_of_one_run(digits_net, whole, tmp_path, folders, count):
    data = Dataset.open(digits_net.parent / "calib.npz")
    shards = cut(data, digits_net, StaticConfig(**{**asdict(CONFIG), "max_samples": SAMPLES}), tmp_path, count)
    sizes = [len(arrays(s)["x"]) for s in shards]
    assert len(sizes) == count and sum(sizes) == SAMPLES and all(size % 16 == 0 for size in sizes[:-1])
    with LocalExecutor(2) as executor:
        state = merged(executor, digits_net, shards, folders)
    found, wanted = arrays(state), arrays(whole[0])
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])
    assert state.read_bytes() == whole[0].read_bytes()


def test_a_model_is_quantized_with_merged_states_alone(digits_net, whole, tmp_path):
    state, one_run = whole
    for name, data, only in (("alone", None, False), ("beside", Dataset.open(digits_net.parent / "calib.npz"), True)):
        config = StaticConfig(**{**asdict(CONFIG), "merge": (str(state),), "merge_only": only})
        made = quantize(digits_net, config, tmp_path / f"{name}.onnx", data)
        assert made.params["samples"] == SAMPLES
        assert (tmp_path / f"{name}.onnx").read_bytes() == one_run.read_bytes()


def test_what_needs_data_says_so(digits_net, whole, tmp_path):
    for changed in ({"bias_correction": "fast"}, {"rounding": "adaround"}):
        config = StaticConfig(**{**asdict(CONFIG), "merge": (str(whole[0]),), **changed})
        with pytest.raises(OptimizationError, match="need data to run on"):
            quantize(digits_net, config, tmp_path / "none.onnx", None)
    with pytest.raises(OptimizationError, match="nothing to merge"):
        quantize(digits_net, StaticConfig(merge_only=True), tmp_path / "none.onnx", Dataset.from_arrays({"x": [1]}))
    assert not (tmp_path / "none.onnx").exists()


def test_parts_are_the_batches_of_one_run(tmp_path):
    """Also of a stream whose pieces are no whole batches, and for a model with a batch of its own."""

    def pieces(size):
        for start, stop in ((0, 10), (10, 13), (13, 33)):
            for first in range(start, stop, size):
                yield {
                    "x": np.arange(first, min(first + size, stop))[:, None],
                    "labels": np.zeros(min(size, stop - first)),
                }

    for dim, batches in (("n", [[4, 4, 2], [3], [4, 4, 4], [4, 4]]), (4, [[4, 4, 4], [4, 4, 4], [4, 4]])):
        model = helper.make_model(
            helper.make_graph(
                [helper.make_node("Relu", ["x"], ["y"])], "g",
                [helper.make_tensor_value_info("x", TensorProto.FLOAT, [dim, 1])],
                [helper.make_tensor_value_info("y", TensorProto.FLOAT, [dim, 1])],
            )
        )  # fmt: skip
        folder = tmp_path / str(dim)
        folder.mkdir()
        onnx.save(model, folder / "m.onnx")
        shards = cut(Dataset("stream", pieces), folder / "m.onnx", StaticConfig(batch_size=4), folder, 3)
        found = [Dataset.open(s) for s in shards]
        assert [[len(b["x"]) for b in d.batches(4)] for d in found] == batches
        assert [v for d in found for b in d.batches(4) for v in b["x"][:, 0].tolist()] == list(
            range(33 if dim == "n" else 32)
        )
        assert all(d.names == ("x",) for d in found)
    with pytest.raises(DataError, match="no batch of 4 samples"):
        cut(Dataset.from_arrays({"x": np.zeros((3, 1))}), tmp_path / "4" / "m.onnx", StaticConfig(), tmp_path, 3)


def test_borders_inside_a_batch_would_be_seen(digits_net, whole, tmp_path, folders):
    """So the tests above can fail: large activations are sampled, and where hangs on the batch."""
    data = Dataset.open(digits_net.parent / "calib.npz")
    rows = data.head(SAMPLES)["x"]
    files = []
    for name, part in (("a", rows[:37]), ("b", rows[37:])):
        files.append(tmp_path / f"{name}.npz")
        np.savez(files[-1], x=part)
    with LocalExecutor(1) as executor:
        state = merged(executor, digits_net, files, folders)
    assert not np.array_equal(arrays(state)["counts"], arrays(whole[0])["counts"])
