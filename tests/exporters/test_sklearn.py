"""scikit-learn: the estimator's own predictions, on real rows, in the precision that keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skops.io
from sklearn import datasets
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import KMeans
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis
from sklearn.ensemble import (
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.feature_extraction.text import HashingVectorizer, TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multioutput import MultiOutputClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC, SVR, LinearSVC
from sklearn.tree import DecisionTreeRegressor

from deploykit import artifact, pipeline
from deploykit.benchmarks.parity import Verdict, compare
from deploykit.errors import ExportError, SourceError
from deploykit.exporters import ExportOptions, Source, Way, export
from deploykit.exporters.sklearn_source import SklearnSource
from deploykit.runtimes import open_session

LABELLED = ("label", "probabilities")


def _right(source: Source, way: Way, path: Path) -> str:
    """Why the exported graph is wrong; empty where every case is as the estimator has it."""
    export(source, way, path)
    cases = source.cases_for(way)
    with open_session(path, "ort:cpu") as session:
        found = compare([c.outputs for c in cases], [session.run(c.feeds) for c in cases])
    return "" if found.verdict is Verdict.PASSED else found.reason


def _first_right(source: Source, folder: Path) -> str:
    """The first way that gives a right graph, as `deploykit export` would choose."""
    return next(str(way) for way in source.ways if not _right(source, way, folder / f"{way}.onnx"))


def _source(estimator: Any, rows: Any, **options: Any) -> SklearnSource:
    return SklearnSource(estimator, ExportOptions(**options), "test", rows)


CLASSIFIERS = {
    "logistic": (LogisticRegression(max_iter=300), LABELLED),
    "svc": (SVC(), ("label", "scores")),
    "linear-svc": (LinearSVC(), ("label", "scores")),
    "calibrated": (CalibratedClassifierCV(LinearSVC()), LABELLED),
    "forest": (RandomForestClassifier(20, random_state=0), LABELLED),
    "shallow-forest": (RandomForestClassifier(10, max_depth=3, random_state=0), LABELLED),
    "boosting": (GradientBoostingClassifier(n_estimators=5), LABELLED),
    "hist-boosting": (HistGradientBoostingClassifier(max_iter=5), LABELLED),
    "mlp": (MLPClassifier(max_iter=20, random_state=0), LABELLED),
    # Not on the pixels: they are integers, and which of equally distant neighbours counts is nobody's promise.
    "neighbours": (make_pipeline(PCA(10), KNeighborsClassifier()), LABELLED),
    "bayes": (GaussianNB(), LABELLED),
    "discriminant": (QuadraticDiscriminantAnalysis(reg_param=0.5), LABELLED),
    "pipeline": (make_pipeline(StandardScaler(), PCA(10), SVC()), ("label", "scores")),
}
REGRESSORS = {
    "ridge": Ridge(),
    "svr": SVR(),
    "tree": make_pipeline(StandardScaler(), DecisionTreeRegressor(random_state=0)),
    "forest": RandomForestRegressor(10, random_state=0),
    "boosting": GradientBoostingRegressor(n_estimators=20),
    "hist-boosting": HistGradientBoostingRegressor(max_iter=20),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers(name: str, tmp_path: Path) -> None:
    estimator, outputs = CLASSIFIERS[name]
    pixels, labels = datasets.load_digits(return_X_y=True)
    source = _source(estimator.fit(pixels[:900], labels[:900]), pixels[900:1500])
    assert tuple(s.name for s in source.signature.outputs) == outputs
    assert _first_right(source, tmp_path) == "skl2onnx"
    assert max(c.sizes["batch"] for c in source.cases) == 600  # all rows of the example


@pytest.mark.parametrize("name", REGRESSORS)
def test_regressors(name: str, tmp_path: Path) -> None:
    rows, target = datasets.load_diabetes(return_X_y=True)
    source = _source(REGRESSORS[name].fit(rows[:300], target[:300]), rows)
    # Scaled rows lie on the thresholds of a tree that was grown until every leaf is pure.
    assert _first_right(source, tmp_path) == ("skl2onnx in float64" if name == "tree" else "skl2onnx")


@pytest.mark.parametrize("labels", [["no", "yes"], [False, True], [3, 7]])
def test_two_classes_tie_as_in_scikit_learn(labels: list[Any], tmp_path: Path) -> None:
    rows, target = datasets.load_breast_cancer(return_X_y=True)
    # An even number of trees on few rows: votes often tie.
    forest = RandomForestClassifier(6, random_state=0).fit(rows[:60], np.array(labels)[target[:60]])
    shares = forest.predict_proba(rows[60:])
    assert (shares[:, 0] == shares[:, 1]).any()
    source = _source(forest, rows[60:])
    assert _right(source, source.ways[0], tmp_path / "m.onnx") == ""


def test_float64_is_taken_where_float32_predicts_otherwise(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    seconds = 1.7e9 + rng.uniform(0, 1000, (400, 1))  # float32 knows only every 128th of them
    late = (seconds[:, 0] > 1.7e9 + 500).astype(int)
    model = make_pipeline(StandardScaler(), RandomForestClassifier(10, random_state=0)).fit(seconds, late)
    source = _source(model, seconds)
    assert [str(way) for way in source.ways] == ["skl2onnx", "skl2onnx in float64"]
    assert "values differ" in _right(source, source.ways[0], tmp_path / "m32.onnx")
    assert _right(source, source.ways[1], tmp_path / "m64.onnx") == ""


def test_columns_with_gaps_in_both_precisions(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    frame = pandas.DataFrame({"age": rng.normal(40, 9, 90), "visits": rng.integers(0, 9, 90), "spare": 1.0})
    frame["town"] = rng.choice(["Oslo", "Århus", "Turku"], 90)
    frame.loc[::7, "age"] = np.nan
    labels = (frame["visits"] > 4).astype(int)
    columns = ColumnTransformer(
        [
            ("n", make_pipeline(SimpleImputer(), StandardScaler()), ["age", "visits"]),
            ("t", OneHotEncoder(), ["town"]),
        ]
    )
    source = _source(make_pipeline(columns, LogisticRegression()).fit(frame, labels), frame)
    assert [str(s) for s in source.signature.inputs] == [
        "age: float32[batch, 1]", "visits: int64[batch, 1]", "town: string[batch, 1]",
    ]  # fmt: skip
    for way in source.ways:
        assert _right(source, way, tmp_path / f"{way}.onnx") == ""


def test_words_of_any_script(tmp_path: Path) -> None:
    texts = ["Crème BRÛLÉE à la carte", "naïve Übermut im Café", "a plain English sentence", "ещё один текст"] * 3
    model = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(texts, ["fr", "de", "en", "ru"] * 3)
    source = _source(model, texts)
    assert _right(source, source.ways[0], tmp_path / "m.onnx") == ""


def test_clusters_and_outliers(tmp_path: Path) -> None:
    rows = datasets.load_wine().data
    for number, model in enumerate(
        (KMeans(3, n_init=1, random_state=0), IsolationForest(n_estimators=5, random_state=0))
    ):
        source = _source(model.fit(rows), rows)
        assert [s.name for s in source.signature.outputs] == ["label", "scores"]
        assert _right(source, source.ways[0], tmp_path / f"{number}.onnx") == ""


class Custom(TransformerMixin, BaseEstimator):
    def fit(self, rows: Any, target: Any = None) -> Custom:
        self.fitted_ = True
        return self

    def transform(self, rows: Any) -> Any:
        return rows


WINE = datasets.load_wine()
TEXTS = ["aa bb", "bb cc"]


def _logistic() -> Any:
    return LogisticRegression(max_iter=9).fit(WINE.data, WINE.target)


def _texts() -> Any:
    return make_pipeline(TfidfVectorizer(), Ridge()).fit(TEXTS, [0, 1])


def _several() -> Any:
    return MultiOutputClassifier(GaussianNB()).fit(WINE.data, np.stack([WINE.target] * 2, 1))


@pytest.mark.parametrize(
    ("make", "rows", "kind", "said"),
    [
        (LogisticRegression, WINE.data, SourceError, "LogisticRegression is not fitted"),
        (lambda: make_pipeline(StandardScaler(), SVC()), WINE.data, SourceError, "not fitted"),
        (_logistic, WINE.data[:, :4], SourceError, "does not take the rows"),
        (_logistic, WINE.data[0], SourceError, "one row"),
        (_texts, "aa bb", SourceError, "one string"),
        (_texts, ["aa", None], SourceError, "NoneType"),
        (_texts, None, SourceError, "--data"),
        (_several, WINE.data, SourceError, "several labels"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_a_source(make: Any, rows: Any, kind: Any, said: str, message: Any) -> None:
    estimator = make()
    assert said in message(kind, lambda: _source(estimator, rows))


@pytest.mark.parametrize(
    ("make", "rows", "said"),
    [
        (lambda: make_pipeline(Custom(), Ridge()).fit(WINE.data, WINE.target), WINE.data, "Custom"),
        (lambda: make_pipeline(HashingVectorizer(n_features=8), Ridge()).fit(["aa bb", "bb cc"], [0, 1]),
         ["aa bb", "bb cc"], "no converter for sklearn.feature_extraction.text.HashingVectorizer"),
    ],
)  # fmt: skip
def test_what_has_no_onnx_form_is_named(make: Any, rows: Any, said: str, message: Any, tmp_path: Path) -> None:
    source = _source(make(), rows)
    assert said in message(ExportError, lambda: export(source, source.ways[0], tmp_path / "m.onnx"))
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [({"way": "torchscript"}, "for PyTorch"), ({"dynamic": ("X:1=features",)}, "axis of features")],
)
def test_options_of_no_meaning(options: dict[str, Any], said: str, message: Any) -> None:
    model = Ridge().fit(WINE.data, WINE.target)
    assert said in message(ExportError, lambda: _source(model, WINE.data, **options))


def test_fixed_shapes_and_float64_on_request(tmp_path: Path) -> None:
    model = Ridge().fit(WINE.data, WINE.target)
    fixed = _source(model, WINE.data[:4], dynamic=("none",))
    assert str(fixed.signature.inputs[0]) == "X: float32[4, 13]"
    assert _right(fixed, fixed.ways[0], tmp_path / "fixed.onnx") == ""
    wide = _source(model, WINE.data, inputs=("X=float64[batch,13]",))
    assert str(wide.signature.inputs[0]) == "X: float64[batch, 13]"
    assert [str(way) for way in wide.ways] == ["skl2onnx in float64"]


def test_skops_trusts_no_strange_type(opened: Any, message: Any, tmp_path: Path) -> None:
    model = make_pipeline(Custom(), Ridge()).fit(WINE.data, WINE.target)
    skops.io.dump(model, tmp_path / "m.skops")
    text = message(SourceError, lambda: opened(tmp_path / "m.skops"))
    assert "Custom" in text
    assert "skops.io.load" in text
    (tmp_path / "bad.skops").write_bytes((tmp_path / "m.skops").read_bytes()[:300])
    assert "cannot read" in message(SourceError, lambda: opened(tmp_path / "bad.skops"))
    skops.io.dump({"not": "a model"}, tmp_path / "dict.skops")
    assert "holds dict" in message(SourceError, lambda: opened(tmp_path / "dict.skops"))


def test_from_a_file_to_an_artifact(tmp_path: Path) -> None:
    """Real data through `--data`, golden cases, and the record of how it was made."""
    pixels, labels = datasets.load_digits(return_X_y=True)
    skops.io.dump(RandomForestClassifier(10, random_state=0).fit(pixels[:900], labels[:900]), tmp_path / "m.skops")
    np.savez(tmp_path / "eval.npz", X=pixels[900:], labels=labels[900:])
    made = pipeline.export(tmp_path / "m.skops", tmp_path / "out", data=tmp_path / "eval.npz", devices=["ort:cpu"])
    assert isinstance(made, artifact.Artifact)
    step = made.manifest.lineage[0]
    assert step.params["kind"] == "scikit-learn"
    assert set(step.tools) == {"scikit-learn", "skl2onnx", "onnx"}
    assert max(len(feeds["X"]) for feeds, _ in made.golden()) == 897
    again = pipeline.verify(tmp_path / "out", devices=["ort:cpu"])
    assert again
