"""Any file is the document of a search, or an error that says what it is; what was read can be shown."""

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploykit.benchmarks.report import Report
from deploykit.errors import BenchmarkError, DeploykitError, SearchError
from deploykit.search.page import to_html
from deploykit.search.reading import as_document, is_search, read_beside, read_document
from deploykit.search.schema import search_schema, what_is_wrong
from deploykit.search.views import markdown, summary, table

LIMITED = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@pytest.fixture(scope="module")
def document(report_data, search_data):
    return search_data.make_search(report_data)


@pytest.fixture
def best(document, report_data, tmp_path):
    folder = tmp_path / "best"
    folder.mkdir()
    (folder / "optimize.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def test_a_document_comes_back_whole(best, document):
    assert read_document(best) == read_document(best / "optimize.json") == as_document(document, "x")
    found = read_document(best)
    for key, value in document.items():
        if key not in ("tried", "trials", "environment"):
            assert found[key] == value
    assert [v["name"] for v in found["tried"]] == [v["name"] for v in document["tried"]]
    assert found["tried"][2]["seats"]["ort:cpu"]["decision"]["ratio"] == 1.03


def test_what_a_document_leaves_out_is_nothing(document):
    bare = copy.deepcopy(document)
    for key in ("phases", "trials", "failures", "notes", "machines", "tied", "winner", "winner_seat", "reference"):
        del bare[key]
    for variant in bare["tried"]:
        del variant["steps"], variant["cached"], variant["nodes"]
    show(bare)  # as the search hands it over, too
    found = as_document(bare, "x")
    assert found["machines"] == found["tied"] == []
    assert found["winner"] is None
    show(found)


def test_a_search_that_runs_has_said_little(document):
    begun = {"schema_version": 1, "run": "0a", "wish": document["wish"], "winner": None, "state": "running"}
    assert is_search(begun)
    found = as_document(begun, "x")
    assert summary(found)[0] == "nothing is found yet"
    show(found)
    best = begun | {"headline": "best so far: x", "winner": "interim/0-x", "spent_s": 3.5}
    assert summary(as_document(best, "x"))[0] == "best so far: x"


def test_a_first_look_that_failed_has_no_figures(document):
    data = copy.deepcopy(document)
    seat = data["tried"][0]["seats"]["openvino:cpu"]
    seat |= {"screening": {"status": "failed: signal 9"}, "dropped": {"phase": "screen", "reason": "failed: signal 9"}}
    found = as_document(data, "x")
    assert table(found)[1][1][4] == "-"
    show(found)


def test_keys_of_later_versions_are_kept(document):
    assert as_document(document | {"later": {"x": 1}}, "x")["later"] == {"x": 1}


def test_what_stands_beside_is_read(best, report_data):
    assert read_beside(best).benchmark is None
    assert read_beside(best).recipe is None
    report = report_data.make_report(rounds=3, samples=20)
    (best / "benchmark.json").write_text(Report(report).to_json(), encoding="utf-8")
    (best / "recipe.toml").write_text("[export]\n", encoding="utf-8")
    beside = read_beside(best / "optimize.json")
    assert beside.benchmark.data["created"] == report["created"]
    assert beside.recipe == "[export]\n"
    (best / "benchmark.json").write_text("{", encoding="utf-8")
    with pytest.raises(BenchmarkError, match="only part of it"):
        read_beside(best)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["no JSON", "deploykit optimize"]),
        (b'{"schema_version": 1, "tri', ["only part of it"]),
        (b"[1]", ["no document of a search"]),
        (b'{"schema_version": 2, "wish": {}}', ["version 2", "update"]),
        (b'{"schema_version": true, "wish": {}}', ["version True"]),
        (b'{"schema_version": 1, "wish": {}}', ["damaged"]),
        (b"[" * 200_000, ["nested too deeply"]),
    ],
)
def test_what_is_none_says_so(tmp_path, content, words):
    path = tmp_path / "optimize.json"
    path.write_bytes(content)
    with pytest.raises(SearchError) as caught:
        read_document(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint
    for word in words:
        assert word in str(caught.value)


def test_places_that_are_none(tmp_path):
    with pytest.raises(SearchError, match="does not exist"):
        read_document(tmp_path / "missing.json")
    with pytest.raises(SearchError, match=r"a directory without optimize\.json"):
        read_document(tmp_path)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda d: d.pop("environment"), "environment: missing"),
        (lambda d: d["tried"][0].pop("name"), "tried.0.name"),
        (lambda d: d["tried"][1].update(dropped=None), "tried.1: dropped without a reason"),
        (lambda d: d["tried"][0]["seats"]["ort:cpu"].update(dropped=None), "tried.0.seats.ort:cpu"),
        (lambda d: d["tried"][0]["seats"]["ort:cpu"].update(status="lost"), "tried.0.seats.ort:cpu.status"),
        (lambda d: d["tried"][2].update(parent="nobody"), "no variant 'nobody'"),
        (lambda d: d["tried"][0].update(parent="static"), "a circle"),
        (lambda d: d["tried"][2].update(name="fp32"), "a second variant of the name 'fp32'"),
        (lambda d: d["front"][0].update(ratio=0), "front.0.ratio"),
        (lambda d: d["wish"].update(objective="beauty"), "wish.objective"),
        (lambda d: d["environment"].pop("machine"), "environment.machine"),
        (lambda d: d["phases"][0].update(seconds=float("nan")), "phases.0.seconds"),
    ],
)
def test_damage_is_named_by_its_place(document, change, place):
    data = copy.deepcopy(document)
    change(data)
    with pytest.raises(SearchError, match="damaged") as caught:
        as_document(data, "o.json")
    assert place in str(caught.value)


def test_searches_and_reports_are_told_apart(document, report_data):
    assert is_search(document)
    assert not is_search(report_data.make_report(rounds=3, samples=20))
    assert not is_search([])


def test_the_schema_is_draft_2020_12_and_versioned(document):
    schema = search_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["properties"]["schema_version"]["const"] == 1
    assert {"wish", "state", "schema_version"} <= set(schema["required"])
    names = {part.split('"')[0] for part in json.dumps(schema).split('"#/$defs/')[1:]}
    assert names <= set(schema["$defs"])
    assert what_is_wrong(document) is None


def show(document):
    table(document)
    "\n".join(summary(document)).encode()
    markdown(document).encode()
    to_html(document).encode()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def leaves(value, path=()):
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], (*path, key))
    elif isinstance(value, list):
        for n in range(len(value)):
            yield from leaves(value[n], (*path, n))
    if path:
        yield path


@LIMITED
@given(st.data())
def test_a_document_with_one_spoiled_value_is_shown_or_refused(document, data):
    """No mutation of one value gets past the reader and breaks a view."""
    spoiled = copy.deepcopy(document)
    path = data.draw(st.sampled_from(list(leaves(spoiled))))
    place = spoiled
    for key in path[:-1]:
        place = place[key]
    if data.draw(st.booleans()):
        place[path[-1]] = data.draw(JSON)
    else:
        del place[path[-1]]
    try:
        found = as_document(json.loads(json.dumps(spoiled)), "fuzz.json")
    except DeploykitError:
        return
    show(found)


def test_a_document_that_no_search_wrote_is_not_read_for_minutes(best):
    with (best / "optimize.json").open("r+b") as file:
        file.truncate(17 * 2**20)
    with pytest.raises(SearchError, match=r"optimize\.json is larger than 16777216 bytes"):
        read_document(best)
