"""The page: whole, safe, and with the report's numbers in its plots; in a browser too, where there is one."""

import base64
import copy
import hashlib
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from deploykit.benchmarks.page import to_html
from deploykit.benchmarks.page_candidates import medians_ms, samples_ms
from deploykit.benchmarks.page_drawing import Axis, clean, fit, labels_of
from deploykit.benchmarks.reading import parse_report
from deploykit.benchmarks.report import Report

# Beside the tests' folders, which are no packages.
spec = importlib.util.spec_from_file_location("_page_tools", Path(__file__).parents[1] / "page_tools.py")
tools = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tools)
HOSTILE, Page, read_png = tools.HOSTILE, tools.Page, tools.read_png

ALL = ["candidates", "pareto", "speed", "distributions", "timeline", "tuning", "sweep", "rates", "layers", "placement",
       "notes", "environment", "raw"]  # fmt: skip


@pytest.fixture(scope="module")
def full(report_data):
    return report_data.add_optional(report_data.make_report())


@pytest.fixture(scope="module")
def page(full):
    return Page(to_html(Report(full)))


def test_sections_appear_with_their_data(report_data, full, page):
    assert page.sections() == ALL
    plain = report_data.make_report()
    plain["notes"] = []
    assert set(ALL) - set(Page(to_html(Report(plain))).sections()) == {"tuning", "sweep", "rates", "layers", "notes"}
    alone = copy.deepcopy(plain)
    alone["candidates"] = alone["candidates"][:1]
    alone["candidates"][0]["placement"] = None
    alone["winner"] |= {"candidates": ["fp32 on ort:cpu"], "against_reference": None}
    assert not {"speed", "placement"} & set(Page(to_html(Report(alone))).sections())


def test_nothing_is_loaded_from_anywhere(full):
    text = to_html(Report(full))
    parsed = Page(text)
    assert not {tag for tag, _, _ in parsed.elements} & {
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "image",
        "use",
    }
    loading = {"src", "href", "xlink:href", "srcset", "action", "data", "background", "poster"}
    assert not [(tag, a) for tag, a, _ in parsed.elements if loading & set(a)]
    assert not re.search(r"https?://|//[a-z]|\burl\(|@import|@font-face|fetch\(|XMLHttp|import\(", text, re.IGNORECASE)
    policy = next(a["content"] for t, a, _ in parsed.elements if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_no_styles_or_handlers_in_attributes(page):
    """The security policy would refuse them."""
    assert not [a for _, a, _ in page.elements if "style" in a or any(k.startswith("on") for k in a)]


def test_hostile_names_stay_text(full):
    data = copy.deepcopy(full)
    for c in data["candidates"]:
        c["name"] = c["model"] = c["device"] = c["status"] = HOSTILE
        c["placement"]["compute_precisions"] = {HOSTILE: 2}
        c["placement"]["asked"] = HOSTILE
    data["notes"] = [HOSTILE]
    data["winner"]["candidates"] = [f"{HOSTILE} on {HOSTILE}"]
    data["environment"]["machine"]["cpu"] = HOSTILE
    data["environment"]["packages"] = {HOSTILE: HOSTILE}
    data["settings"]["inputs"] = HOSTILE
    data["explain"] = {HOSTILE: data["explain"]["int8 on ort:cpu"]}
    explained = data["explain"][HOSTILE]
    explained["layers"][0] |= {"name": HOSTILE, "op": HOSTILE, "precision": HOSTILE, "kernel": HOSTILE}
    explained["findings"][0] |= {"what": HOSTILE, "cure": HOSTILE, "nodes": [HOSTILE], "severity": HOSTILE}
    for trial in data["tuning"]["trials"]:
        trial |= {
            "label": HOSTILE,
            "model": HOSTILE,
            "device": HOSTILE,
            "stage": HOSTILE,
            "settings": {HOSTILE: HOSTILE},
        }
    text = to_html(parse_report(json.dumps(data), "x"))
    text.encode("utf-8")  # no lone surrogate is left
    parsed = Page(text)
    plain = Page(to_html(Report(full)))
    assert {t for t, _, _ in parsed.elements} == {t for t, _, _ in plain.elements}
    assert sum(t == "script" for t, _, _ in parsed.elements) == 2
    assert not [a for _, a, _ in parsed.elements if any(k.startswith("on") for k in a)]
    assert json.loads(parsed.embedded())["candidates"][0]["name"] == HOSTILE
    assert "\u202e" not in text


def test_pareto_shows_the_reports_numbers(full, page):
    marks = page.marks("pareto", "circle")
    assert sorted(c for c, _ in marks) == [0, 1, 2, 3, 4]
    by = dict(marks)
    for n, c in enumerate(full["candidates"]):
        assert float(by[n]["data-y"]) == pytest.approx(c["accuracy"]["accuracy"], rel=1e-4)
        if "median_ms" in c:
            assert float(by[n]["data-x"]) == pytest.approx(c["median_ms"], rel=1e-4)
        else:
            assert "data-x" not in by[n]
    # Places go with the values: left is faster, up is more accurate, areas are sizes.
    assert float(by[3]["cx"]) < float(by[2]["cx"]) < float(by[0]["cx"])
    assert float(by[3]["cy"]) > float(by[2]["cy"]) > float(by[0]["cy"])
    ratio = full["candidates"][2]["size_bytes"] / full["candidates"][0]["size_bytes"]
    assert (float(by[2]["r"]) / float(by[0]["r"])) ** 2 == pytest.approx(ratio, rel=0.01)
    hollow = {c for c, a in marks if "hollow" in a["class"]}
    assert hollow == {3, 4}
    assert by[2]["data-front"] == "yes"
    assert "data-front" not in by[3]  # faster, but out of the race


def test_ties_are_shown_as_ties(full):
    data = copy.deepcopy(full)
    data["winner"] |= {"verdict": "tie", "candidates": ["fp32 on ort:cpu", "simple on ort:cpu"]}
    parsed = Page(to_html(Report(data)))
    assert {c for c, a in parsed.marks("pareto", "circle") if a.get("data-tie")} == {0, 1}
    assert sum(t == "tie for first" for t, _ in parsed.texts) == 2
    speed = dict(parsed.marks("speed", "circle"))
    assert "hollow" in speed[1]["class"]
    assert "solid" in speed[2]["class"]


def test_without_labels_the_axis_is_the_cosine(report_data):
    data = report_data.make_report(labelled=False)
    parsed = Page(to_html(Report(data)))
    marks = dict(parsed.marks("pareto", "circle"))
    assert float(marks[0]["data-y"]) == 1.0
    assert float(marks[2]["data-y"]) == pytest.approx(data["candidates"][2]["outputs"]["cosine"])
    assert any("cosine of the outputs" in t for t, _ in parsed.texts)


def test_intervals_are_drawn(full, page):
    for c, attrs in page.marks("speed", "circle"):
        told = full["candidates"][c]["against_reference"]
        found = [float(attrs[k]) for k in ("data-low", "data-x", "data-high")]
        assert found == pytest.approx([told["low"], told["ratio"], told["high"]])
    lines = [a for t, a, _ in page.elements if t == "line" and a.get("class") == "interval"]
    assert len(lines) == 2 * 3  # at a desk and on a phone
    assert all(float(a["x1"]) < float(a["x2"]) for a in lines)


def test_histograms_count_every_sample(full, page):
    marks = page.marks("distributions", "path")
    assert [c for c, _ in marks] == [0, 1, 2, 3]
    for c, attrs in marks:
        counts = [int(n) for n in attrs["data-counts"].split()]
        assert sum(counts) + int(attrs["data-beyond"]) == samples_ms(full["candidates"][c]).size
        assert int(attrs["data-beyond"]) < 0.01 * sum(counts)
    ticks = page.marks("distributions", "line")
    found = {(c, int(a["data-p"])): float(a["data-x"]) for c, a in ticks}
    assert found[2, 99] == pytest.approx(full["candidates"][2]["p99_ms"], rel=1e-4)
    assert len(found) == 12


def test_the_timeline_has_every_round(full, page):
    marks = page.marks("timeline", "circle")
    for n, c in enumerate(full["candidates"][:4]):
        own = [(float(a["data-x"]), float(a["data-y"])) for owner, a in marks if owner == n]
        want = list(zip([r["started_s"] for r in c["rounds"]], medians_ms(c["rounds"]), strict=True))
        assert own == [pytest.approx(pair, rel=1e-4) for pair in want]
    assert sum(owner is None for owner, _ in marks) == len(full["reference_again"])


def test_tuner_sweep_and_rates(full, page):
    cells = page.marks("tuning", "rect")
    values = sorted((int(a["data-threads"]), float(a["data-value"])) for _, a in cells)
    kept = [t for t in full["tuning"]["trials"] if t.get("status", "ok") == "ok"]
    assert len(kept) == len(full["tuning"]["trials"]) - 2
    trials = sorted((t["threads"], t["median_ms"]) for t in kept)
    assert values == [pytest.approx(pair, rel=1e-4) for pair in trials]
    assert len({a["fill"] for _, a in cells}) > 3
    for section, key, x, y, full_mark in (
        ("sweep", "sweep", "concurrency", "throughput_per_s", lambda c, p: p == c["knee"]),
        ("rates", "rates", "rate_per_s", "p99_ms", lambda c, p: p["met"]),
    ):
        marks = page.marks(section, "circle")
        for n in range(3):
            c = full["candidates"][n]
            own = [(float(a["data-x"]), float(a["data-y"]), "solid" in a["class"]) for o, a in marks if o == n]
            assert [
                (pytest.approx(p[x], rel=1e-4), pytest.approx(p[y], rel=1e-4), full_mark(c, p)) for p in c[key]
            ] == own
    objective = [a["data-objective"] for t, a, _ in page.elements if "data-objective" in a]
    assert objective == ["20", "20"]


def test_the_slowest_layers_and_what_was_found(full, page):
    bars = [float(a["data-value"]) for _, a in page.marks("layers", "rect")]
    times = sorted((layer["time_us"] for layer in full["explain"]["int8 on ort:cpu"]["layers"]), reverse=True)
    assert bars == pytest.approx(times[:15], rel=1e-4)
    said = " ".join(t for t, above in page.texts if any(a.get("id") == "layers" for _, a in above))
    assert "a QuantizeLinear stands alone before the pooling" in said
    assert "deploykit quantize repair" in said
    assert "3 more layers" in said
    assert "One run takes 2.1 ms, 110 GFLOP/s (31% of what this machine can)" in said
    assert "a note of the profiler" in said


def test_every_plot_and_mark_says_what_it_is(page):
    for tag, attrs, _ in page.elements:
        if tag == "svg":
            assert attrs["aria-label"]
            assert attrs["role"] == "group"
    marks = sum("m" in (a.get("class") or "").split() for _, a, _ in page.elements)
    titles = sum(t == "title" and any(o == "svg" for o, _ in above) for t, _, above in page.elements)
    assert marks == titles > 100


def test_ids_are_unique_and_headline_reasons_and_notes_stand_there(full, page):
    ids = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    said = " ".join(t for t, _ in page.texts)
    assert "winner: int8 on ort:cpu, 1.91x" in said
    assert "wrong outputs: cosine 0.3100 is below 0.95" in said
    assert full["notes"][0] in said


def test_more_candidates_than_colours(report_data):
    data = report_data.make_report()
    for n in range(12):
        data["candidates"].append(copy.deepcopy(data["candidates"][2]) | {"name": f"copy{n}"})
    assert len(Page(to_html(Report(data))).marks("pareto", "circle")) == 17


@pytest.mark.parametrize("values", [[5.0], [1.0, 1.0], [0.999999, 1.0], [1e-6, 1e6], [3.0, 4.0, 1000.0], [0.0, 1e9]])
@pytest.mark.parametrize("log", [False, None])
def test_axes_hold_their_values_and_label_them(values, log):
    axis = fit(values, 10, 500, log=log)
    assert all(10 <= axis.at(v) <= 500 for v in values)
    ticks = axis.ticks(7)
    assert 1 <= len(ticks) <= 16
    assert all(axis.low <= t <= axis.high for t in ticks)
    labels = labels_of(ticks)
    assert len(set(labels)) == len(labels)


def test_a_log_axis_is_one():
    axis = Axis(1, 100, 0, 200, log=True)
    assert axis.at(10) == pytest.approx(100)
    assert {1.0, 10.0, 100.0} <= set(axis.ticks(8))


def test_control_characters_are_spelled_out():
    assert clean("a\x1b[31mb\u202e") == "a\\x1b[31mb\\u202e"


# --- in a browser ----------------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(tools.BROWSER is None, reason=tools.NO_BROWSER)


@needs_browser
def test_the_page_runs_in_a_browser(full, tmp_path, browse):
    path = tmp_path / "page.html"
    path.write_text(to_html(Report(full)), encoding="utf-8")
    done = browse(path, "--dump-dom")
    assert "CONSOLE" not in done.stderr
    parsed = Page(re.sub(r"^.*?<html", "<html", done.stdout, flags=re.DOTALL))
    assert parsed.sections() == ALL
    # Its script ran to the end: it read the embedded report, and took over the tooltips.
    body = next(a for t, a, _ in parsed.elements if t == "body")
    assert body["data-ready"] == str(len(full["candidates"]))
    assert not [t for t, _, above in parsed.elements if t == "title" and any(o == "svg" for o, _ in above)]


PROBE = """
var seen = {};
var box = document.querySelector('input[data-toggle="2"]');
function shown() {
  return [].filter.call(document.querySelectorAll('.wide [data-c="2"]'), function (e) {
    return e.style.display !== "none";
  }).length;
}
seen.before = shown(); box.click(); seen.hidden = shown(); box.click(); seen.after = shown();
var mark = document.querySelector("#pareto .wide .m");
mark.dispatchEvent(new PointerEvent("pointermove", { bubbles: true, pointerType: "mouse", clientX: 9, clientY: 9 }));
seen.tip = document.getElementById("tip").textContent;
var make = URL.createObjectURL;
URL.createObjectURL = function (blob) { seen.bytes = blob.size; seen.type = blob.type; return make.call(URL, blob); };
document.getElementById("download").click();
document.body.dataset.seen = JSON.stringify(seen);
"""


@needs_browser
def test_toggles_tooltips_and_the_download_work(full, tmp_path, browse):
    """A probe is let in beside the page's own script, by its hash as well."""
    path, text = tmp_path / "page.html", to_html(Report(full))
    digest = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    text = text.replace("script-src ", f"script-src &#x27;sha256-{digest}&#x27; ")
    path.write_text(text.replace("</body>", f"<script>{PROBE}</script></body>"), encoding="utf-8")
    done = browse(path, "--dump-dom")
    assert "CONSOLE" not in done.stderr
    parsed = Page(re.sub(r"^.*?<html", "<html", done.stdout, flags=re.DOTALL))
    seen = json.loads(next(a["data-seen"] for t, a, _ in parsed.elements if t == "body"))
    assert seen["before"] == seen["after"] > 5
    assert seen["hidden"] == 0
    assert "on ort:cpu" in seen["tip"]
    assert seen["type"] == "application/json"
    assert seen["bytes"] == len(parsed.embedded().encode())


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, 1), (500, 0)])
def test_the_page_is_drawn(full, tmp_path, browse, width, scheme):
    path, image = tmp_path / "page.html", tmp_path / "page.png"
    path.write_text(to_html(Report(full)), encoding="utf-8")
    browse(
        path,
        f"--screenshot={image}",
        f"--window-size={width},1200",
        f"--blink-settings=preferredColorScheme={scheme}",
        "--force-device-scale-factor=0.5",
    )
    pixels = read_png(image.read_bytes())
    assert pixels.shape[:2] == (600, width // 2)
    corner = pixels[-1, 0, :3].astype(int)
    assert (corner.mean() > 200) == (scheme == 1)  # light or dark, as asked for
    drawn = (np.abs(pixels[..., :3].astype(int) - corner).max(-1) > 40).mean()
    assert 0.02 < drawn < 0.5
    # Colours, not only ink.
    assert (np.ptp(pixels[..., :3].astype(int), axis=-1) > 50).mean() > 0.001
