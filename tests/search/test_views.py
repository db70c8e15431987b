"""The table, the lines below it and the Markdown of a search say what the document says."""

import copy
import re

import pytest

from deploykit.benchmarks.markdown import escape
from deploykit.search.views import COLUMNS, markdown, summary, table
from deploykit.search.wording import asked, lines_of, quality_text, runtime_text, size_text, speed_of, spent


@pytest.fixture
def document(report_data, search_data):
    return search_data.make_search(report_data)


def row_of(document, model, device):
    return next(dict(zip(COLUMNS, r, strict=True)) for r in table(document)[1] if r[:2] == (model, device))


def test_a_row_a_seat_and_a_variant_that_has_none(document):
    header, rows = table(document)
    assert header == COLUMNS
    seats = sum(len(v["seats"]) for v in document["tried"])
    assert len(rows) == seats + 3 == 19
    assert {len(row) for row in rows} == {len(COLUMNS)}
    assert row_of(document, "fused", "-")["outcome"] == "dropped in making: no pattern of a transformer in 60 nodes"
    assert row_of(document, "fp32-ts", "-")["outcome"].startswith("dropped in judging: the same graph")


def test_every_reason_to_be_dropped_is_said(document):
    said = {r[-1].split(":")[0] for r in table(document)[1]}
    assert said == {
        "winner", "tie", "on the front", "dropped in making", "dropped in judging", "dropped in screening",
        "dropped in tuning", "dropped in checking the limits", "dropped in the decision",
        "reference, dropped in the decision",
    }  # fmt: skip
    text = " ".join(r[-1] for r in table(document)[1])
    for words in ("wrong: accuracy 0.4100", "too inaccurate", "did not load", "of the leader", "slower than"):
        assert words in text


def test_the_decisions_speed_counts_and_the_first_looks_is_marked(document):
    assert row_of(document, "static", "openvino:cpu")["vs reference"] == "2.43x [2.38, 2.48]"
    assert row_of(document, "static-equalize", "openvino:cpu")["vs reference"] == "2.20x [2.09, 2.33] (screened)"
    assert row_of(document, "static-equalize", "ort:cpu")["vs reference"] == "-"
    seat = next(n.seat for n in lines_of(document) if n.label == "static on openvino:cpu")
    assert speed_of(seat).decided
    assert not speed_of(seat | {"decision": None}).decided


def test_quality_and_settings_are_said(document):
    row = row_of(document, "static", "openvino:cpu")
    assert row["quality"] == "accuracy 0.9290 (-0.0050), SQNR 31.9 dB"
    assert row["settings"] == "2 threads, hint LATENCY"
    assert row["size MB"] == "1.15"
    assert [size_text(n) for n in (None, 4321, 99_999_999)] == ["", "0.0043", "100.00"]
    assert [r[5] for r in table(document)[1] if r[0] == "simple"] == ["-", "-", "native precision"]
    assert quality_text({"sqnr_db": 20.0, "agreement": 0.98, "value": None}) == "agreement 0.9800, SQNR 20.0 dB"
    assert quality_text({"sqnr_db": None, "agreement": None}) == "no error"
    assert quality_text({"sqnr_db": None, "agreement": 0.3, "collapsed": "it is broken"}) == (
        "agreement 0.3000, it is broken"
    )
    assert quality_text(None) == ""


def test_settings_are_said_without_their_defaults():
    found = {"device": "ort:cpu", "threads": 2, "sessions": 1, "optimize": True, "precision": "native",
             "settings": {"session.x": "1"}, "machine": {"cpu": "x"}}  # fmt: skip
    assert runtime_text(found) == "threads 2, precision native, session.x 1"
    assert runtime_text({"sessions": 1, "optimize": False}) == "optimize no"
    assert runtime_text({"sessions": True}) == "sessions yes"
    assert runtime_text(None) == "defaults"


def test_the_summary_has_verdict_front_budget_failures_and_notes(document):
    lines = summary(document)
    assert lines[0] == document["headline"]
    assert lines[1].startswith("  front/static (fastest): static on openvino:cpu, 2.43x [2.38, 2.48], 1.15 MB")
    text = "\n".join(lines)
    assert "took 171 s of 180 s: 11 variants, 9 made, on 16 seats; 1 came from the cache" in text
    assert "no difference outside the noise: static-auto on openvino:cpu" in text
    assert "Imagined CPU 2, 8 cores: 1.90x" in text
    assert "failed: judge fp16 on openvino:cpu: f16" in text
    assert lines[-1] == "note: calibrated on 256 samples"
    document["tied"] = [document["winner_seat"]]
    assert "no difference" not in " ".join(summary(document))
    document["front"] *= 5
    assert "  and 12 more on the front" in summary(document)


@pytest.mark.parametrize(("state", "words"), [("running", "still running"), ("interrupted", "was interrupted")])
def test_an_unfinished_search_says_so(document, state, words):
    document |= {"state": state, "winner": None, "front": [], "phases": [], "trials": [], "tied": []}
    assert words in summary(document)[-2]
    assert words in markdown(document)


def test_what_was_asked_for_is_said(document):
    assert asked(document) == (
        "objective latency, accuracy down by at most 0.01, at most 40 ms, batch 1, devices ort:cpu, openvino:cpu"
    )
    document["wish"]["goal"] = dict.fromkeys(document["wish"]["goal"])
    document["wish"] |= {"budget_s": None, "batch": [1, 8]}
    assert "no accuracy asked for" in asked(document)
    assert "batch 1, 8" in asked(document)
    assert spent(document).startswith("171 s: 11 variants")


def cells(line):
    return [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_markdown_has_the_front_and_everything_tried(document):
    text = markdown(document)
    lines = text.splitlines()
    assert lines[0] == f"**{escape(document['headline'])}**"
    rows = [cells(line) for line in lines if line.startswith("|")]
    assert len(rows) == (2 + 4) + (2 + 2) + (2 + 19)
    assert rows[2][:3] == ["front/static", "static on openvino:cpu", "fastest"]
    assert rows[-1][0] == "weights4"
    for words in (
        "Asked for: objective latency",
        "Took 171 s of 180 s",
        "Imagined CPU 1",
        "- calibrated on 256 samples",
    ):
        assert words in text


def test_names_cannot_break_a_table_nor_become_markup(document, page_tools):
    hostile = "a|b\n<img src=x> [x](javascript:1) `c` \x1b[31m" + page_tools.HOSTILE
    document = copy.deepcopy(document)
    document["headline"] = document["notes"][0] = document["tried"][2]["name"] = hostile
    document["tried"][2]["seats"]["ort:cpu"]["label"] = document["front"][0]["path"] = hostile
    document["tried"][3]["dropped"]["reason"] = hostile
    lines = markdown(document).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 6 + 4 + 21
    assert {len(cells(row)) for row in rows[-19:]} == {len(COLUMNS)}
    assert not re.search(r"(?<!\\)[<`\[]", "".join(lines[0:1] + rows))
    for text in ["\n".join(cell) for cell in table(document)[1]] + ["\n".join(summary(document))]:
        assert "\x1b" not in text
        assert "\u202e" not in text
    assert all("\n" not in line for line in summary(document))
