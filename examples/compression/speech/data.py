"""Spoken keywords: synthetic voices say keywords and other words in noise; their samples and their log-mels.

`python data.py OUTPUT [--quick]` writes into OUTPUT

- `train.npz`, `val.npz`, `test.npz`: `sound`, log-mels [clips, 1, mels, frames] in float32, and `labels`
- `waves.npz`: the test set again, as samples [clips, 16000] in int16 at 16 kHz, and `labels`
- `calib-waves.npz`: some of the validation set in that form
- `data.json`: what was made, how, and by which version of espeak-ng

Every clip is one second. A voice is a language's accent and a variant of espeak-ng (pitch, formants, breath, roughness:
a speaker). No variant of the test set is heard in training or validation, four of its accents and some of its other
words are not either. What is random follows from the seed and the number of the clip.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

RATE = 16000  # Hz
KEYWORDS = ("yes", "no", "left", "right", "stop", "forward", "backward", "music", "volume", "garden")
CLASSES = (*KEYWORDS, "unknown", "silence")
UNKNOWN, SILENCE = len(KEYWORDS), len(KEYWORDS) + 1
# Some of them sound much like a keyword.
OTHERS = (
    "bed", "bird", "cat", "dog", "eight", "five", "four", "happy", "house", "nine", "seven", "six", "three", "zero",
    "up", "down", "on", "off", "go", "town", "coffee", "under", "light", "lift", "step", "snow",
)  # fmt: skip
# Heard in the test set only.
UNSEEN = ("learn", "follow", "winter", "yellow", "table", "number", "laugh", "rock", "note", "gold")

# "en" is British; espeak-ng 1.51 takes the name en-gb too, and then forgets the variant.
ENGLISH = ("en-us", "en", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-us-nyc")
# Voices of other languages read what such a speaker hears, and say it with their own sounds.
FOREIGN = ("es", "ro", "fi", "sw")
HELD_OUT_ENGLISH, HELD_OUT_FOREIGN = ("en-gb-scotland", "en-029"), ("it", "hr")
HEARD = {
    "yes": "ies", "no": "nou", "right": "rait", "forward": "foruord", "backward": "bakuord", "music": "miusik",
    "volume": "volium", "bird": "berd", "cat": "ket", "eight": "eit", "five": "faiv", "four": "for", "happy": "hepi",
    "house": "haus", "nine": "nain", "six": "siks", "three": "tri", "zero": "zirou", "up": "ap", "down": "daun",
    "off": "of", "go": "gou", "town": "taun", "coffee": "kofi", "under": "ander", "light": "lait", "snow": "snou",
    "learn": "lern", "follow": "folou", "winter": "uinter", "yellow": "ielou", "table": "teibol", "number": "namber",
    "laugh": "laf", "rock": "rok", "note": "nout", "gold": "gould",
}  # fmt: skip
VARIANTS = {
    "train": (
        "m1", "m2", "m3", "m5", "m6", "f1", "f2", "f4", "croak", "klatt", "klatt3", "Alex", "Andy", "Annie", "Mario",
        "Michael", "Jacky", "adam", "antonio", "aunty", "belinda", "benjamin", "boris", "gustave", "edward", "grandma",
        "iven", "john", "linda", "marcelo", "pablo", "quincy", "rob", "sandro", "steph", "victor",
    ),
    "val": ("m4", "f5", "klatt2", "Alicia", "Hugo", "paul", "norbert", "travis"),
    "test": (
        "m7", "m8", "f3", "whisper", "klatt4", "Andrea", "Denis", "Gene", "Lee", "Nguyen", "anika", "david", "grandpa",
        "michel", "shelby", "zac",
    ),
}  # fmt: skip
NOISES = ("white", "pink", "babble")
SNR_DB = (5.0, 25.0)
SIZES = {"train": 500, "val": 60, "test": 170}  # clips a class
QUICK_SIZES = {"train": 16, "val": 6, "test": 8}
CALIBRATION = 256

# Log-mels, by the names of `deploykit preprocess audio`.
FRONT: dict[str, float] = {
    "sample_rate": RATE, "n_fft": 512, "win": 480, "hop": 320, "mels": 40, "fmin": 20.0, "floor": 1e-5,
    "mean": -4.0, "std": 4.0,
}  # fmt: skip
FRAMES = 1 + RATE // 320
SHAPE = (1, 40, FRAMES)
INSTALL = "apt-get install espeak-ng"


@dataclass(frozen=True, slots=True)
class Utterance:
    """A word as it is spoken.

    Attributes:
        word: What.
        accent: espeak-ng's language.
        variant: Who: espeak-ng's variant of the voice.
        speed: Words a minute.
        pitch: 0 to 99.
    """

    word: str
    accent: str
    variant: str
    speed: int
    pitch: int


# --- what is said, and by whom ---


def words_of(split: str, label: int) -> tuple[str, ...]:
    """The words of a class in a split; silence has none."""
    if label < UNKNOWN:
        return (KEYWORDS[label],)
    if label == SILENCE:
        return ()
    return OTHERS + UNSEEN if split == "test" else OTHERS


def accents_of(split: str) -> tuple[str, ...]:
    """The accents of a split; the test set has some of its own."""
    held_out = HELD_OUT_ENGLISH + HELD_OUT_FOREIGN if split == "test" else ()
    return ENGLISH + FOREIGN + held_out


def plan(split: str, count: int, seed: int) -> list[tuple[int, Utterance]]:
    """Utterances of a split, with their classes.

    Args:
        split: "train", "val" or "test".
        count: Utterances a class.
        seed: Of all that is random.
    """
    accents, variants = accents_of(split), VARIANTS[split]
    found = []
    for label in range(len(CLASSES)):
        words = words_of(split, label)
        for number in range(count if words else 0):
            dice = _dice(seed, split, 0, label, number)
            found.append(
                (
                    label,
                    Utterance(
                        words[number % len(words)], str(dice.choice(accents)), str(dice.choice(variants)),
                        int(dice.integers(120, 230)), int(dice.integers(15, 85)),
                    ),
                )
            )  # fmt: skip
    return found


def _dice(seed: int, split: str, *numbers: int) -> np.random.Generator:
    return np.random.default_rng((seed, list(VARIANTS).index(split), *numbers))


# --- espeak-ng ---


def engine() -> str:
    """The version of espeak-ng; ends the program where it, or a voice, is missing."""
    if shutil.which("espeak-ng") is None:
        raise SystemExit(f"espeak-ng is not installed, which speaks the words: {INSTALL}")
    version = _run("--version").decode(errors="replace").split("  ")[0].strip()
    known = {
        line.split()[-1].split("/")[-1] for line in _run("--voices=variant").decode(errors="replace").splitlines()[1:]
    }
    missing = sorted({v for variants in VARIANTS.values() for v in variants} - known)
    if missing:
        raise SystemExit(f"{version} has no voice {', '.join(missing)}; Debian 12 has them: {INSTALL}")
    return version


def _run(*args: str) -> bytes:
    return subprocess.run(["espeak-ng", *args], stdin=subprocess.DEVNULL, capture_output=True, check=True).stdout


def speak(said: Utterance) -> np.ndarray:
    """Its samples, without the silence before and behind; float32 with a largest value of 1."""
    english = said.accent in ENGLISH + HELD_OUT_ENGLISH
    text = said.word if english else HEARD.get(said.word, said.word)
    wav = _run(
        "-v", f"{said.accent}+{said.variant}", "-s", str(said.speed), "-p", str(said.pitch), "--stdout", text
    )  # fmt: skip
    # The header of a stream has no true length; all behind it is sound.
    sound = np.frombuffer(wav[44 : 44 + max(0, len(wav) - 44) // 2 * 2], "<i2").astype(np.float64)
    if not sound.any():
        raise SystemExit(f"espeak-ng says nothing for {said}")
    sound = resample(sound, int.from_bytes(wav[24:28], "little"))
    loud = np.flatnonzero(np.abs(sound) > 0.01 * np.abs(sound).max())
    sound = sound[loud[0] : loud[-1] + 1][:RATE]
    return (sound / np.abs(sound).max()).astype(np.float32)


def resample(sound: np.ndarray, rate: int) -> np.ndarray:
    """Change the rate to `RATE` by Fourier transform; a whole number of 20 ms is made of it."""
    block = rate // 50
    sound = np.pad(sound, (block, block + -len(sound) % block))
    made = len(sound) // block * (RATE // 50)
    return np.fft.irfft(np.fft.rfft(sound)[: made // 2 + 1], made) * (made / len(sound))


# --- clips ---


def noise(kind: str, babble: Sequence[np.ndarray], dice: np.random.Generator) -> np.ndarray:
    """One second of noise with a root mean square of 1."""
    if kind == "babble":
        made = np.zeros(RATE)
        for number in dice.integers(len(babble), size=7):
            voice = babble[number]
            start = int(dice.integers(-len(voice) // 2, RATE - len(voice) // 2))
            begin, end = max(0, start), min(RATE, start + len(voice))
            made[begin:end] += voice[begin - start : end - start] * dice.uniform(0.5, 1)
    else:
        made = dice.standard_normal(RATE)
    if kind == "pink":
        spectrum = np.fft.rfft(made)
        made = np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 20)), RATE)
    return made / np.sqrt(np.mean(made**2) + 1e-12)


def clip(word: np.ndarray | None, babble: Sequence[np.ndarray], dice: np.random.Generator) -> np.ndarray:
    """A word somewhere in a second of noise, or noise alone; int16 [16000]."""
    made = noise(str(dice.choice(NOISES)), babble, dice)
    if word is not None:
        level = np.sqrt(np.mean(word**2)) * 10 ** (-dice.uniform(*SNR_DB) / 20)
        start = int(dice.integers(0, RATE - len(word) + 1))
        made *= level
        made[start : start + len(word)] += word
    made *= 10 ** (dice.uniform(-30, -3) / 20) / np.abs(made).max()
    return np.round(made * 32767).astype(np.int16)


def log_mels(samples: np.ndarray) -> np.ndarray:
    """int16 [clips, samples] to normalized log-mels [clips, 1, mels, frames], float32."""
    parts = [_log_mels(samples[start : start + 256]) for start in range(0, len(samples), 256)]
    return np.concatenate(parts)[:, None]


def _log_mels(samples: np.ndarray) -> np.ndarray:
    n_fft, win, hop = (int(FRONT[name]) for name in ("n_fft", "win", "hop"))
    padded = np.pad(samples / 32768.0, ((0, 0), (n_fft // 2, n_fft // 2)), mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft, axis=1)[:, ::hop]
    hann = np.pad(np.hanning(win + 1)[:-1], (n_fft - win) // 2)  # periodic
    power = np.abs(np.fft.rfft(frames * hann)) ** 2
    mels = np.maximum(power @ _triangles().T, FRONT["floor"])
    return ((np.log(mels) - FRONT["mean"]) / FRONT["std"]).transpose(0, 2, 1).astype(np.float32)


@cache
def _triangles() -> np.ndarray:
    """Mel filters [mels, n_fft // 2 + 1]: triangles that are equally wide on HTK's scale."""
    n_fft, mels = int(FRONT["n_fft"]), int(FRONT["mels"])
    low, high = (2595 * np.log10(1 + hertz / 700) for hertz in (FRONT["fmin"], RATE / 2))
    edges = 700 * (10 ** (np.linspace(low, high, mels + 2) / 2595) - 1)
    bins = np.arange(n_fft // 2 + 1) * RATE / n_fft
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return np.maximum(0, np.minimum(rising, falling))


def front_options() -> list[str]:
    """The same log-mels as options of `deploykit preprocess audio`."""
    options = [word for name, value in FRONT.items() for word in (f"--{name.replace('_', '-')}", f"{value:g}")]
    return [*options, "--dtype", "int16"]


# --- splits ---


def make(split: str, size: int, seed: int, jobs: int) -> tuple[np.ndarray, np.ndarray, list[Utterance]]:
    """All clips of a split, in an order of chance.

    Args:
        split: "train", "val" or "test".
        size: Clips a class.
        seed: Of all that is random.
        jobs: Words spoken at once.

    Returns:
        Samples [clips, 16000] in int16, classes, and what was spoken.
    """
    planned = plan(split, size, seed)
    with ThreadPoolExecutor(jobs) as pool:
        spoken = list(pool.map(speak, [said for _, said in planned]))
    babble = [word for (label, _), word in zip(planned, spoken, strict=True) if label == UNKNOWN]
    wanted: list[tuple[int, np.ndarray | None]] = [
        (label, word) for (label, _), word in zip(planned, spoken, strict=True)
    ]
    wanted += [(SILENCE, None)] * size
    order = _dice(seed, split, 1).permutation(len(wanted))
    samples = np.stack([clip(wanted[n][1], babble, _dice(seed, split, 2, int(n))) for n in order])
    return samples, np.array([wanted[n][0] for n in order], np.int64), [said for _, said in planned]


def write(folder: Path, *, quick: bool = False, seed: int = 0, jobs: int | None = None) -> dict[str, Any]:
    """Make all splits, and write them; `data.json` comes last."""
    version, started = engine(), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {
        "espeak_ng": version, "seed": seed, "classes": CLASSES, "front": FRONT, "snr_db": SNR_DB, "quick": quick,
        "splits": {},
    }  # fmt: skip
    for split, size in (QUICK_SIZES if quick else SIZES).items():
        samples, labels, spoken = make(split, size, seed, jobs or os.cpu_count() or 1)
        np.savez(folder / f"{split}.npz", sound=log_mels(samples), labels=labels)
        if split == "test":
            np.savez(folder / "waves.npz", sound=samples, labels=labels)
        if split == "val":
            np.savez(folder / "calib-waves.npz", sound=samples[:CALIBRATION])
        told["splits"][split] = {
            "clips": len(labels), "spoken_words": len(spoken), "voices": len({(s.accent, s.variant) for s in spoken}),
            "variants": VARIANTS[split], "accents": accents_of(split), "other_words": words_of(split, UNKNOWN),
        }  # fmt: skip
        print(
            f"{split}: {len(labels)} clips of {len(spoken)} spoken words, {time.monotonic() - started:.0f} s",
            flush=True,
        )
    told["seconds"] = round(time.monotonic() - started, 1)
    (folder / "data.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return told


def main(args: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Speak the words, and write clips and log-mels.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--quick", action="store_true", help="a small part")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(args)
    write(given.output, quick=given.quick, seed=given.seed)


if __name__ == "__main__":
    main(sys.argv[1:])
