import pytest

from deploykit.errors import RecipeError
from deploykit.recipe import Recipe, dump


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "empty"),
        ("[export", "not TOML"),
        ("[nosuch]\n", "one of"),
        ("[export]\n", "source"),
        ("[export]\nsource = 3\n", "source"),
        ("[export]\nsource = 'x'\ntypo = 1\n", "typo"),
        ("[simplify]\n", "no model"),
        ("export = 3\n", "table"),
        ("[export]\nsource='x'\n[benchmark]\n[simplify]\nmodel='benchmark'\n", "benchmark"),
        ("['../up']\nstep='export'\nsource='x'\n", "step name"),
        ("[export]\nsource='x'\n[benchmark]\nrounds=1\n", "rounds"),
        ("[export]\nsource='x'\n[quantize-static]\ndata='d'\nsmooth=2.0\n", "smooth"),
        ("[export]\nsource='x'\n[quantize-static]\ndata='d'\nbias_correction='slow'\n", "bias_correction"),
        ("[export]\nsource='x'\n[quantize-static]\ndata='d'\nengine='vitis'\n", "engine"),
        ("[finetune]\nsource='x'\n", "data"),
        ("[finetune]\nsource='x'\ndata='d'\nmetric='bleu'\n", "metric"),
    ],
)
def test_errors_say_what_to_mend(tmp_path, text, word):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(tmp_path / "r.toml")
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dump_round_trips_odd_strings(tmp_path):
    tables = {"export": {"source": 'a "b"\\c\n\x7f\u00e9', "dims": {"a b": 3}, "dynamic": ["x:0=batch"]}}
    (tmp_path / "r.toml").write_text(dump(tables), encoding="utf-8")
    step = Recipe.load(tmp_path / "r.toml").steps["export"]
    assert step.source == tables["export"]["source"]
    assert step.dims == tables["export"]["dims"]
