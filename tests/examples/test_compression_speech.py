"""The example of spoken keywords: what its clips, its log-mels, its networks and its commands are."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import click
import numpy as np
import pytest
import torch

from deploykit import open_session
from deploykit.cli import cli
from deploykit.optimizers import make_audio_config
from deploykit.optimizers.mel import log_mel

HERE = Path(__file__).resolve().parent.parent.parent / "examples" / "compression" / "speech"
spoken = pytest.mark.skipif(
    shutil.which("espeak-ng") is None, reason="espeak-ng, which speaks the words, is missing: apt-get install espeak-ng"
)


def _load(name: str) -> ModuleType:
    """A module of the example under a name of its own: other examples have modules of the same names."""
    known = f"compression_speech_{name}"
    spec = importlib.util.spec_from_file_location(known, HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[known] = made
    spec.loader.exec_module(made)
    return made


data, model = _load("data"), _load("model")


@pytest.fixture(scope="module")
def sounds() -> np.ndarray:
    """Clips without a voice: a gliding tone in noise, noise alone, silence, and full scale; int16 [8, 16000]."""
    dice, seconds = np.random.default_rng(0), np.arange(data.RATE) / data.RATE
    glide = np.sin(2 * np.pi * (300 + 2000 * seconds) * seconds).astype(np.float32)[2000:10000]
    clips = [data.clip(word, [glide], dice) for word in (glide, None, glide, None, glide, None)]
    square = np.sign(np.sin(2 * np.pi * 440 * seconds)) * 32767
    return np.stack([*clips, np.zeros(data.RATE, np.int16), square.astype(np.int16)])


def test_no_voice_and_no_held_out_word_or_accent_of_the_test_set_is_heard_before():
    said = {split: {u for _, u in data.plan(split, 60, 0)} for split in data.VARIANTS}
    speakers = {split: {u.variant for u in found} for split, found in said.items()}
    assert all(len(found) >= 8 for found in speakers.values())
    assert not speakers["test"] & (speakers["train"] | speakers["val"])
    assert not speakers["train"] & speakers["val"]
    before = said["train"] | said["val"]
    assert {u.accent for u in said["test"]} - {u.accent for u in before} == {"en-gb-scotland", "en-029", "it", "hr"}
    assert {u.word for u in said["test"]} - {u.word for u in before} == set(data.UNSEEN)


def test_no_other_word_is_a_keyword_and_none_stands_twice():
    words = (*data.KEYWORDS, *data.OTHERS, *data.UNSEEN)
    assert len(set(words)) == len(words)
    assert set(data.HEARD) <= set(words)
    variants = [name for found in data.VARIANTS.values() for name in found]
    assert len(set(variants)) == len(variants)


def test_a_plan_has_as_many_of_each_word_and_follows_from_its_seed():
    found = data.plan("train", 26, 3)
    assert found == data.plan("train", 26, 3) != data.plan("train", 26, 4)
    labels = [label for label, _ in found]
    assert [labels.count(n) for n in range(len(data.CLASSES))] == [26] * 11 + [0]
    assert {u.word for label, u in found if label == data.UNKNOWN} == set(data.OTHERS)
    assert all(u.word == data.KEYWORDS[label] for label, u in found if label < data.UNKNOWN)
    assert found[:5] == [pair for pair in data.plan("train", 5, 3) if pair[0] == 0], "more clips change the first ones"


@pytest.mark.parametrize("rate", [22050, 16000, 8000])
def test_resampling_keeps_a_tone_where_and_as_loud_as_it_is(rate):
    tone = np.sin(2 * np.pi * 1000 * np.arange(rate) / rate) * np.hanning(rate)
    made = data.resample(tone, rate)
    block = data.RATE // 50
    assert len(made) % block == 0
    assert np.abs(np.fft.rfft(made, data.RATE)).argmax() == 1000
    assert np.abs(made).max() == pytest.approx(1, abs=1e-3)
    assert abs(np.abs(made).argmax() - (data.RATE // 2 + block)) <= 8, "it moved"


@pytest.mark.parametrize("kind", data.NOISES)
def test_noise_is_as_loud_as_another_and_of_its_color(kind):
    voices = [np.sin(np.arange(n) / 5).astype(np.float32) for n in (3000, 5000, 16000)]
    made = data.noise(kind, voices, np.random.default_rng(1))
    assert made.shape == (data.RATE,) and np.sqrt(np.mean(made**2)) == pytest.approx(1, rel=1e-6)
    power = np.abs(np.fft.rfft(made)) ** 2
    low, high = power[100:400].mean(), power[4000:7000].mean()
    assert {"white": 0.5 < low / high < 2, "pink": 10 < low / high < 60, "babble": low / high > 100}[kind]


@pytest.mark.parametrize("snr_db", [0, 10, 20])
def test_a_clip_has_its_word_as_far_above_its_noise_as_is_drawn(monkeypatch, snr_db):
    monkeypatch.setattr(data, "SNR_DB", (snr_db, snr_db))
    monkeypatch.setattr(data, "NOISES", ("white",))
    word = np.sin(np.arange(8000) / 3).astype(np.float32)
    made = data.clip(word, [word], np.random.default_rng(snr_db)).astype(np.float64)
    spectrum = np.abs(np.fft.rfft(made)) ** 2
    near = np.abs(np.arange(len(spectrum)) - data.RATE / (2 * np.pi * 3)) < 200
    # The word is half as long as its noise.
    assert 10 * np.log10(2 * spectrum[near].sum() / spectrum[~near].sum()) == pytest.approx(snr_db, abs=1)


def test_clips_differ_in_level_and_are_the_same_again():
    word = np.sin(np.arange(8000) / 3).astype(np.float32)
    clips = [data.clip(word, [word], np.random.default_rng(seed)) for seed in range(40)]
    assert all(made.dtype == np.int16 and made.shape == (data.RATE,) for made in clips)
    assert np.array_equal(clips[3], data.clip(word, [word], np.random.default_rng(3)))
    peaks = [20 * np.log10(np.abs(made.astype(float)).max() / 32767) for made in clips]
    assert -30.1 < min(peaks) < -20 < -10 < max(peaks) <= -2.9


def test_log_mels_are_those_that_deploykit_means_by_the_same_options(sounds):
    config = make_audio_config(**{name: v for name, v in data.FRONT.items() if name not in ("mean", "std")})
    wanted = np.stack([log_mel(config, clip / 32768) for clip in sounds])
    wanted = (wanted - data.FRONT["mean"]) / data.FRONT["std"]
    found = data.log_mels(sounds)
    assert found.shape == (len(sounds), *data.SHAPE) and found.dtype == np.float32
    assert np.abs(found[:, 0] - wanted).max() < 1e-5
    assert found[6].max() == found[6].min() == pytest.approx((np.log(1e-5) + 4) / 4), "silence is the floor"
    assert (data._triangles().max(axis=1) > 0).all(), "a mel filter between two bins"


def test_a_model_takes_samples_with_the_log_mels_it_was_trained_on(sounds, tmp_path):
    student = model.student()[0]
    for part in student.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = 1.0
    student(torch.from_numpy(data.log_mels(sounds)))  # statistics as after a training: outputs hang on their inputs
    torch.onnx.export(
        student.eval(), (torch.zeros(1, *data.SHAPE),), str(tmp_path / "student.onnx"), dynamo=False,
        input_names=["sound"], output_names=["output"], dynamic_axes={"sound": {0: "batch"}, "output": {0: "batch"}},
    )  # fmt: skip
    np.savez(tmp_path / "waves.npz", sound=sounds)
    args = ["preprocess", "audio", "-m", str(tmp_path / "student.onnx"), "-o", str(tmp_path / "served")]
    cli.main([*args, *data.front_options(), "--data", str(tmp_path / "waves.npz")], standalone_mode=False)
    with open_session(tmp_path / "student.onnx", "ort:cpu") as session:
        wanted = session.run({"sound": data.log_mels(sounds)})["output"]
    with open_session(tmp_path / "served", "ort:cpu") as session:
        (taken,) = session.signature.inputs
        assert (taken.dtype, taken.shape) == ("int16", ("batch", data.RATE))
        found = session.run({"sound": sounds})["output"]
    assert np.ptp(wanted, axis=0).max() > 0.01, "the outputs tell nothing"
    assert np.abs(found - wanted).max() < 1e-3 * np.abs(wanted).max()


def test_the_student_is_that_of_hello_edge_and_the_baseline_is_many_times_as_large():
    made = {name: getattr(model, name)() for name in ("teacher", "student")}
    count = {name: sum(p.numel() for p in module.parameters()) for name, (module, _) in made.items()}
    assert 20_000 < count["student"] < 40_000 and count["teacher"] > 8 * count["student"]
    for name, (module, example) in made.items():
        assert example.shape[1:] == data.SHAPE
        assert module.eval()(example).shape == (len(example), len(data.CLASSES)) == (4, model.CLASSES)
        again = getattr(model, name)()[0]
        assert all(
            torch.equal(a, b) for a, b in zip(module.state_dict().values(), again.state_dict().values(), strict=True)
        )


def test_what_is_pruned_and_taught_has_the_weights_of_the_training(tmp_path, monkeypatch):
    other = model.teacher()[0]
    torch.nn.init.constant_(other.head.bias, 0.25)
    torch.save(other.state_dict(), tmp_path / "weights.pt")
    monkeypatch.setattr(model, "WEIGHTS", tmp_path / "weights.pt")
    assert (model.trained()[0].head.bias == 0.25).all()


@pytest.fixture(scope="module")
def compress() -> ModuleType:
    """The command's module; what it puts on the path, and the modules of short names, are taken away again."""
    path, names = list(sys.path), {name: sys.modules.pop(name, None) for name in ("common", "data")}
    try:
        return _load("compress")
    finally:
        sys.path[:] = path
        for name, module in names.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


@pytest.mark.parametrize("quick", [False, True])
def test_the_stages_are_commands_that_deploykit_reads(compress, quick):
    stages = compress.stages(quick)
    for stage in stages:
        command, words = cli, [*stage.arguments, "-o", stage.output, *(["--resume"] if stage.resumes else [])]
        while isinstance(command, click.Group):
            command = command.get_command(click.Context(command), words.pop(0))
            assert command is not None, stage
        with command.make_context("deploykit", words):
            pass
    made = {stage.output for stage in stages}
    assert {folder for _, folder in compress.common.MODELS} | {
        "test.zarr",
        compress.SERVED,
        compress.SERVED_REPORT,
    } <= made


def test_no_stage_but_the_last_measurement_sees_the_test_set(compress):
    for stage in compress.stages(False):
        seen = [word for word in stage.arguments if "test" in word or word == "waves.zarr"]
        assert not seen or stage.output in ("test.zarr", "served.json"), stage


def test_what_stands_under_the_table_comes_from_the_reports(compress, tmp_path):
    (tmp_path / "data").mkdir()
    split = {"clips": 2400, "voices": 200}
    (tmp_path / "data" / "data.json").write_text(json.dumps({"splits": {"test": split, "train": split}}))
    for file, name, accuracy in (("served.json", "served", 0.9375), ("benchmark.json", "distilled-int8", 0.9342)):
        score = {"accuracy": accuracy, "f1": 0.9111}
        rows = [{"name": name, "device": d, "accuracy": score, "median_ms": 0.25} for d in compress.common.RUNTIMES]
        (tmp_path / file).write_text(json.dumps({"candidates": rows}))
    lines = compress.further(tmp_path)
    assert "2,400 clips by 200 voices" in lines[0]
    assert len(lines) == 3 and all("accuracy 93.75 % (from log-mels 93.42 %), macro F1 91.11 %" in t for t in lines[1:])


def test_without_espeak_it_says_what_to_install_and_leaves_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, str(HERE / "data.py"), str(tmp_path / "out")],
        capture_output=True, text=True, check=False, env={"PATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert done.stderr.strip() == "espeak-ng is not installed, which speaks the words: apt-get install espeak-ng"


@spoken
def test_no_voice_is_another_one_and_each_speaks_the_same_again():
    voices = [("en-us", name) for names in data.VARIANTS.values() for name in names]
    voices += [(accent, name) for accent in data.accents_of("test")[1:] for name in ("m7", "f1")]
    said = [data.Utterance("garden", accent, name, 160, 50) for accent, name in voices]
    with ThreadPoolExecutor(2) as pool:
        spoken = list(pool.map(data.speak, said))
    assert all(0.15 < len(sound) / data.RATE <= 1 and np.abs(sound).max() == 1 for sound in spoken)
    assert len({sound.tobytes() for sound in spoken}) == len(voices), "some variant is another one, or is not heard"
    assert np.array_equal(spoken[5], data.speak(said[5]))
    assert not np.array_equal(spoken[5], data.speak(data.Utterance("left", *voices[5], 160, 50)))


@spoken
def test_splits_are_balanced_and_do_not_depend_on_the_number_of_processes():
    samples, labels, said = data.make("train", 4, 0, 2)
    assert samples.shape == (48, data.RATE) and samples.dtype == np.int16
    assert np.bincount(labels).tolist() == [4] * len(data.CLASSES)
    assert len(said) == 44
    again, same, _ = data.make("train", 4, 0, 1)
    assert np.array_equal(samples, again) and np.array_equal(labels, same)
    assert len({clip.tobytes() for clip in samples}) == len(samples)


@spoken
def test_the_files_hold_what_was_made(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "QUICK_SIZES", {"train": 2, "val": 1, "test": 1})
    told = data.write(tmp_path, quick=True)
    assert json.loads((tmp_path / "data.json").read_text())["splits"]["test"]["clips"] == 12
    assert "1." in told["espeak_ng"]
    with np.load(tmp_path / "test.npz") as test, np.load(tmp_path / "waves.npz") as waves:
        assert np.array_equal(data.log_mels(waves["sound"]), test["sound"])
        assert np.array_equal(waves["labels"], test["labels"])
    with np.load(tmp_path / "train.npz") as train, np.load(tmp_path / "calib-waves.npz") as calibration:
        assert train["sound"].shape == (24, *data.SHAPE) and calibration["sound"].shape == (12, data.RATE)
