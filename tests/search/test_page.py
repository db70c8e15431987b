"""The page of a search: whole, safe, and with the document's numbers in its plots; in a browser too."""

import base64
import copy
import hashlib
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from deploykit.benchmarks.report import Report
from deploykit.search.page import to_html
from deploykit.search.reading import as_document

# Beside the tests' folders, which are no packages.
spec = importlib.util.spec_from_file_location("_page_tools", Path(__file__).parents[1] / "page_tools.py")
tools = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tools)
Page, HOSTILE = tools.Page, tools.HOSTILE
needs_browser = pytest.mark.skipif(tools.BROWSER is None, reason=tools.NO_BROWSER)

OWN = ["verdict", "pareto", "funnel", "tree", "table", "time", "tuning"]
DECISION = ["decision", "candidates", "speed", "distributions", "timeline"]
REST = ["recipe", "failures", "notes", "environment", "raw"]
RECIPE = '[export]\nsource = "model.py:make"\n\n[static]\nstep = "quantize-static"\n'


@pytest.fixture(scope="module")
def document(report_data, search_data):
    return as_document(search_data.make_search(report_data), "x")


@pytest.fixture(scope="module")
def benchmark(report_data):
    return Report(report_data.make_report(samples=100))


@pytest.fixture(scope="module")
def text(document, benchmark):
    return to_html(document, benchmark, RECIPE)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def said(page, section):
    return " ".join(t for t, above in page.texts if any(a.get("id") == section for _, a in above))


def test_sections_appear_with_their_data(document, page):
    assert page.sections() == OWN + DECISION + REST
    bare = copy.deepcopy(document) | {"phases": [], "trials": [], "failures": [], "notes": [], "machines": []}
    assert Page(to_html(bare)).sections() == ["verdict", "pareto", "funnel", "tree", "table", "environment", "raw"]
    begun = bare | {"tried": [], "front": [], "winner": None, "winner_seat": None, "tied": [], "state": "running"}
    assert Page(to_html(begun)).sections() == ["notes", "environment", "raw"]


def test_nothing_is_loaded_from_anywhere(text, page):
    assert not {t for t, _, _ in page.elements} & {"link", "img", "iframe", "object", "embed", "base", "image", "use"}
    loading = {"src", "href", "xlink:href", "srcset", "action", "data", "background", "poster"}
    assert not [(t, a) for t, a, _ in page.elements if loading & set(a)]
    assert not re.search(r"https?://|//[a-z]|\burl\(|@import|@font-face|fetch\(|XMLHttp|import\(", text, re.IGNORECASE)
    assert not [a for _, a, _ in page.elements if "style" in a or any(k.startswith("on") for k in a)]


def test_the_policy_allows_the_one_style_and_script_that_are_there(text, page):
    policy = next(a["content"] for t, a, _ in page.elements if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for element, directive in (("style", "style-src"), ("script", "script-src")):
        (content,) = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy


def spoil(value):
    """Every free text of a document, replaced."""
    data = copy.deepcopy(value)
    for key in ("headline", "winner", "winner_seat", "reference", "deploykit", "created"):
        data[key] = HOSTILE
    data["tied"] = data["notes"] = data["wish"]["devices"] = [HOSTILE]
    data["wish"] |= {"source": HOSTILE, "data": HOSTILE, "eval_data": HOSTILE, "executor": HOSTILE}
    data["failures"] = [{"label": HOSTILE, "error": HOSTILE}]
    data["machines"] = [{"label": HOSTILE, "winner": HOSTILE, "headline": HOSTILE}]
    data["environment"]["machine"]["cpu"] = HOSTILE
    names = {v["name"]: f"{n} {HOSTILE}" for n, v in enumerate(data["tried"])}
    for variant in data["tried"]:
        variant |= {"name": names[variant["name"]], "parent": names.get(variant["parent"]), "about": HOSTILE,
                    "steps": [{HOSTILE: HOSTILE}]}  # fmt: skip
        for seat in variant["seats"].values():
            seat |= {"label": HOSTILE, "device": HOSTILE}
            for part, key in (("dropped", "reason"), ("quality", "metric"), ("tuned", "label"), ("quality", "summary")):
                if seat[part]:
                    seat[part][key] = HOSTILE
    for entry in data["front"]:
        entry |= dict.fromkeys(("name", "path", "seat", "device", "why"), HOSTILE) | {"settings": {HOSTILE: HOSTILE}}
    for phase in data["phases"]:
        phase["name"] = HOSTILE
    for trial in data["trials"]:
        trial |= dict.fromkeys(("label", "model", "device", "stage"), HOSTILE) | {"settings": {HOSTILE: HOSTILE}}
    return data


def test_hostile_names_stay_text(document, benchmark, page):
    hostile = as_document(json.loads(json.dumps(spoil(document))), "x")
    text = to_html(hostile, benchmark, HOSTILE)
    text.encode("utf-8")  # no lone surrogate is left
    parsed = Page(text)
    assert {t for t, _, _ in parsed.elements} <= {t for t, _, _ in page.elements}
    assert sum(t == "script" for t, _, _ in parsed.elements) == 2
    assert not [a for _, a, _ in parsed.elements if any(k.startswith("on") for k in a)]
    assert json.loads(parsed.embedded())["tried"][0]["about"] == HOSTILE
    assert "\u202e" not in text


def marks(page, section, tag, width="wide"):
    return [
        (attrs, next((a["data-c"] for _, a in reversed(above) if "data-c" in a), None))
        for name, attrs, above in page.elements
        if name == tag
        and "m" in (attrs.get("class") or "").split()
        and any(a.get("id") == section for _, a in above)
        and any(a.get("class") == width for _, a in above)
    ]


def test_pareto_shows_the_documents_numbers(document, page):
    found = marks(page, "pareto", "circle")
    seats = [s for v in document["tried"] for s in v["seats"].values()]
    assert len(found) == len(seats) - 1  # one did not load
    drawn = {(a.get("data-x"), a["data-y"]) for a, _ in found}
    for seat in seats:
        if seat["quality"] is not None:
            told = seat["decision"] or seat["screening"]
            lost = seat["quality"]["parent"] - seat["quality"]["value"]
            assert (f"{told['ratio']:.6g}" if told else None, f"{lost:.6g}") in drawn
    kept = [a for a, key in found if key == "end-kept"]
    assert len(kept) == 5
    assert all("bubble" in a["class"] and a["data-front"] == "yes" for a in kept)
    assert sum(a.get("data-tie") == "yes" for a in kept) == 2
    assert {key for _, key in found} == {
        "end-kept", "end-judge", "end-screen", "end-tune", "end-limits", "end-decide",
    }  # fmt: skip
    # Left is slower, up is better.
    by = {a["data-x"] + " " + a["data-y"]: a for a, _ in found if "data-x" in a}
    fast, slow = by["2.43 0.005"], by["0.91 0.009"]
    assert float(fast["cx"]) > float(slow["cx"])
    assert float(fast["cy"]) < float(slow["cy"])
    limits = [a["data-objective"] for t, a, above in page.elements
              if t == "line" and "data-objective" in a and any(x.get("id") == "pareto" for _, x in above)]  # fmt: skip
    assert limits == ["0.01", "0.01"]


@pytest.mark.parametrize(
    ("goal", "words", "lost"),
    [
        ({"min_agreement": 0.97}, "share of changed classes", 1 - 0.9746),
        ({"min_sqnr_db": 30.0}, "error of the output", 100 * 10 ** (-31.9 / 20)),
        ({}, "error of the output", 100 * 10 ** (-31.9 / 20)),
    ],
)
def test_without_a_metric_the_axis_is_what_was_asked_for(report_data, search_data, goal, words, lost):
    data = search_data.make_search(report_data, labelled=False)
    data["wish"]["goal"] = dict.fromkeys(data["wish"]["goal"]) | goal
    parsed = Page(to_html(as_document(data, "x")))
    assert words in said(parsed, "pareto")
    (winner,) = [a for a, _ in marks(parsed, "pareto", "circle") if a.get("data-x") == "2.43"]
    assert float(winner["data-y"]) == pytest.approx(lost, rel=1e-3)


def test_a_reference_that_nobody_judged_loses_nothing(document):
    data = copy.deepcopy(document)
    data["tried"][0]["seats"]["ort:cpu"]["quality"] = None
    assert len(marks(Page(to_html(data)), "pareto", "circle")) == 15


def test_the_funnel_counts_what_was_left(page):
    told = [(int(a["data-value"]), int(a["data-dropped"])) for a, _ in marks(page, "funnel", "rect")]
    assert told == [(9, 2), (8, 1), (13, 3), (9, 4), (8, 1), (7, 1), (5, 2)]
    assert "static-nncf: nncf is not installed" in said(page, "funnel")  # in the titles of the bars


def test_the_tree_has_every_variant_under_its_parent(document, page):
    depth, reasons = {}, said(page, "tree")
    for words, above in page.texts:
        if above and above[-1][0] == "b" and any(a.get("id") == "tree" for _, a in above):
            depth[words] = sum(t == "li" for t, _ in above)
    assert set(depth) == {v["name"] for v in document["tried"]}
    assert [depth[n] for n in ("fp32", "simple", "static", "static-equalize")] == [1, 2, 3, 4]
    assert "1.65 ms at the median, 608 per s, 91 MB of memory, 8 of 9 Conv int8" in reasons
    for variant in document["tried"]:
        for told in [variant, *variant["seats"].values()]:
            if told["dropped"]:
                assert told["dropped"]["reason"] in reasons


def test_the_table_has_a_row_a_seat_and_says_why(document, page):
    rows = [above for t, a, above in page.elements if t == "tr" and any(x.get("id") == "table" for _, x in above)]
    assert len(rows) == 1 + 19
    words = said(page, "table")
    assert "in the decision: slower than static on openvino:cpu" in words
    assert "2.20x [2.09, 2.33] (screened)" in words
    assert words.count("tie for first") == 1


def test_phases_stand_where_they_ran(document, page):
    told = [float(a["data-value"]) for a, _ in marks(page, "time", "rect")]
    assert told == [p["seconds"] for p in document["phases"]]
    bars = [a for a, _ in marks(page, "time", "rect")]
    for bar, phase in zip(bars, document["phases"], strict=True):
        scale = float(bar["width"]) / phase["seconds"]
        assert scale == pytest.approx(float(bars[0]["width"]) / document["phases"][0]["seconds"], rel=1e-3)
        moved = float(bar["x"]) - float(bars[0]["x"])
        assert moved == pytest.approx(phase["began_s"] * scale, rel=1e-3, abs=0.01)
    budget = [a["data-objective"] for t, a, above in page.elements
              if "data-objective" in a and any(x.get("id") == "time" for _, x in above)]  # fmt: skip
    assert budget == ["180", "180"]


def test_trials_recipe_failures_and_machines(page):
    assert marks(page, "tuning", "rect")
    assert RECIPE.strip() in said(page, "recipe")
    assert "judge fp16 on openvino:cpu:" in said(page, "failures")
    assert "Imagined CPU 2, 8 cores" in said(page, "verdict")
    assert "No difference outside the noise to static on openvino:cpu: static-auto" in said(page, "verdict")


def test_every_plot_and_mark_says_what_it_is(page):
    for element, attrs, _ in page.elements:
        if element == "svg":
            assert attrs["aria-label"]
            assert attrs["role"] == "group"
    count = sum("m" in (a.get("class") or "").split() for _, a, _ in page.elements)
    titles = sum(t == "title" and any(o == "svg" for o, _ in above) for t, _, above in page.elements)
    assert count == titles > 60


def test_ids_are_unique_and_the_document_is_embedded(document, page):
    ids = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert as_document(json.loads(page.embedded()), "x") == document


# --- in a browser ----------------------------------------------------------------------------------------------------

PROBE = """
var seen = {};
function shown(key) {
  return [].filter.call(document.querySelectorAll('.wide [data-c="' + key + '"]'), function (e) {
    return e.style.display !== "none";
  }).length;
}
var box = document.querySelector('input[data-toggle="end-screen"]');
seen.before = shown("end-screen"); seen.other = shown("end-kept");
box.click(); seen.hidden = shown("end-screen"); seen.still = shown("end-kept"); box.click();
seen.after = shown("end-screen");
var mark = document.querySelector("#funnel .wide .m");
mark.dispatchEvent(new PointerEvent("pointermove", { bubbles: true, pointerType: "mouse", clientX: 9, clientY: 9 }));
seen.tip = document.getElementById("tip").textContent;
HTMLAnchorElement.prototype.click = function () { seen.file = this.download; };
document.getElementById("download").click();
document.body.dataset.seen = JSON.stringify(seen);
"""


@needs_browser
def test_the_page_runs_in_a_browser(document, text, tmp_path, browse):
    """A probe is let in beside the page's own script, by its hash as well."""
    path = tmp_path / "page.html"
    digest = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    probed = text.replace("script-src ", f"script-src &#x27;sha256-{digest}&#x27; ")
    path.write_text(probed.replace("</body>", f"<script>{PROBE}</script></body>"), encoding="utf-8")
    done = browse(path, "--dump-dom")
    assert "CONSOLE" not in done.stderr
    parsed = Page(re.sub(r"^.*?<html", "<html", done.stdout, flags=re.DOTALL))
    assert parsed.sections() == OWN + DECISION + REST
    body = next(a for t, a, _ in parsed.elements if t == "body")
    assert body["data-ready"] == str(len(document["tried"]))
    seen = json.loads(body["data-seen"])
    assert seen["before"] == seen["after"] >= 4
    assert seen["hidden"] == 0
    assert seen["other"] == seen["still"] >= 5
    assert seen["tip"].startswith("9 variants: variants made; 2 dropped")
    assert seen["file"] == "optimize.json"


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, 1), (500, 0)])
def test_the_page_is_drawn(text, tmp_path, browse, width, scheme):
    path, image = tmp_path / "page.html", tmp_path / "page.png"
    path.write_text(text, encoding="utf-8")
    browse(
        path,
        f"--screenshot={image}",
        f"--window-size={width},1600",
        f"--blink-settings=preferredColorScheme={scheme}",
        "--force-device-scale-factor=0.5",
    )
    pixels = tools.read_png(image.read_bytes())
    assert pixels.shape[:2] == (800, width // 2)
    corner = pixels[0, 0, :3].astype(int)
    assert (corner.mean() > 200) == (scheme == 1)  # light or dark, as asked for
    drawn = (np.abs(pixels[..., :3].astype(int) - corner).max(-1) > 40).mean()
    assert 0.02 < drawn < 0.5
    # Colours, not only ink.
    assert (np.ptp(pixels[..., :3].astype(int), axis=-1) > 50).mean() > 0.001
