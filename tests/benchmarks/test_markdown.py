import copy
import re

from deploykit.benchmarks.markdown import escape, pipe_table, to_markdown
from deploykit.benchmarks.report import Report, table


def cells(line):
    return [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_headline_table_environment_and_notes(report_data):
    report = Report(report_data.make_report())
    lines = to_markdown(report).splitlines()
    assert lines[0].startswith("**winner: int8 on ort:cpu, 1.91x")
    rows = [cells(line) for line in lines if line.startswith("|")]
    header, body = table(report)
    assert rows[0] == list(header)
    assert len(rows) == 2 + len(body) == 7
    assert {len(row) for row in rows} == {len(header)}
    assert rows[2][0] == "fp32"
    assert f"{report.candidates[2]['median_ms']:.3f}" in rows[4]
    text = "\n".join(lines)
    for words in ("Scenario latency, 5 rounds of 2 s", "noise floor 1.2%", "Imagined CPU 1", "onnxruntime 1.24.0",
                  "- one note of the measurement", "- bad on openvino:cpu: wrong outputs"):  # fmt: skip
        assert words in text


def test_drift_and_interrupts_are_said(report_data):
    data = report_data.make_report()
    data["candidates"][0]["drift"] = {"ratio": 1.31, "flagged": True}
    data["interrupted"] = True
    text = to_markdown(Report(data))
    assert "fp32 on ort:cpu was not steady: the second half of a round took 1.31 times" in text
    assert "an interrupt ended the measurement early" in text


def test_names_cannot_break_the_table_nor_become_markup(report_data):
    data = copy.deepcopy(report_data.make_report())
    data["candidates"][1]["name"] = "a|b\n<img src=x> [x](javascript:1) `c` *d* _e_ \\"
    lines = to_markdown(Report(data)).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 7
    assert len({len(cells(row)) for row in rows}) == 1
    assert not re.search(r"(?<!\\)[<`*_\[]", cells(rows[3])[0])


def test_escape_shows_text_as_it_is():
    assert escape("a_b|c") == r"a\_b\|c"
    assert escape("1.05x (fine)") == "1.05x (fine)"


def test_columns_of_words_stand_to_the_left():
    assert pipe_table(("a", "b", "c", "d"), [("1", "2", "3", "4")]) == [
        "| a | b | c | d |",
        "| --- | --- | ---: | --- |",
        "| 1 | 2 | 3 | 4 |",
    ]
