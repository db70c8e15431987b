"""Models that are really trained, in seconds, on data that come with scikit-learn."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from sklearn import datasets
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

_THEMES = {
    "sport": "the team won the match after a late goal and the coach praised every player on the field",
    "food": "stir the soup slowly and add salt, garlic, crème fraîche and herbs before the dish is served",
    "space": "the rocket left its orbit and the probe sent pictures of a distant planet and two icy moons",
}


def images() -> tuple[Any, Any]:
    """Digits as [1797, 8, 8, 1] in 0..1, and their labels."""
    pixels, labels = datasets.load_digits(return_X_y=True)
    return (pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1), labels


def forest() -> Any:
    pixels, labels = datasets.load_digits(return_X_y=True)
    return RandomForestClassifier(30, random_state=0).fit(pixels[:1200], labels[:1200]), pixels[1200:]


def table() -> Any:
    """Columns of several dtypes, string classes."""
    frame = datasets.load_wine(as_frame=True).data[["alcohol", "malic_acid", "hue"]]
    frame["magnesium"] = datasets.load_wine(as_frame=True).data["magnesium"].astype(int)
    frame["tint"] = np.where(frame["hue"] > 1, "red", np.where(frame["hue"] > 0.8, "amber", "brown"))
    labels = np.array(["Barolo", "Grignolino", "Barbera"])[datasets.load_wine().target]
    columns = ColumnTransformer(
        [
            ("numbers", StandardScaler(), ["alcohol", "malic_acid", "magnesium"]),
            ("tint", OneHotEncoder(handle_unknown="ignore"), ["tint"]),
        ]
    )
    return make_pipeline(columns, LogisticRegression(max_iter=500)).fit(frame, labels), frame


def sentences() -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(0)
    made = [
        (" ".join(rng.choice(words.split(), 8)).capitalize(), theme)
        for _ in range(60)
        for theme, words in _THEMES.items()
    ]
    return [text for text, _ in made], [theme for _, theme in made]


def text() -> Any:
    texts, themes = sentences()
    return make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression()).fit(
        texts[:120], themes[:120]
    ), texts[120:]


@functools.cache
def network() -> Any:
    """A small convolutional net with batch normalization, channels last."""
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            layers.Conv2D(16, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPooling2D(),
            layers.DepthwiseConv2D(3, padding="same"),
            layers.Conv2D(32, 1, activation="gelu"),
            layers.Dropout(0.2),
            layers.Flatten(),
            layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    pixels, labels = images()
    model.fit(pixels[:1200], labels[:1200], epochs=6, verbose=0)
    assert model.evaluate(pixels[1200:], labels[1200:], verbose=0)[1] > 0.8
    return model


def keras_factory() -> Any:
    return network(), images()[0][1200:1204]


def keras_file(path: Path) -> Path:
    network().save(path)
    return path


def saved_model(path: Path) -> Path:
    network().export(path, verbose=False)
    return path


def tflite(path: Path, saved: Path, quantized: bool = False) -> Path:
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(str(saved))
    if quantized:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([row[None]] for row in images()[0][:100])
    path.write_bytes(converter.convert())
    return path
