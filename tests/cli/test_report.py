"""`deploykit report`, and the views that `benchmark` writes."""

import json

import pytest


@pytest.fixture
def report(report_data, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report_data.add_optional(report_data.make_report(samples=60))), encoding="utf-8")
    return path


def test_a_report_is_shown_again(cli, report):
    done = cli("report", "report.json")
    assert done.returncode == 0, done.stderr
    assert "winner: int8 on ort:cpu" in done.stdout
    assert "wrong outputs: cosine 0.3100" in done.stdout


def test_views_are_written_and_never_overwritten(cli, report, tmp_path):
    done = cli("report", "report.json", "--html", "page.html", "--markdown", "table.md")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "int8 on ort:cpu" in page
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table.startswith("**winner: int8")
    assert cli("report", "report.json", "--markdown", "-").stdout == table
    (tmp_path / "page.html").write_text("mine", encoding="utf-8")
    done = cli("report", "report.json", "--html", "page.html", "--markdown", "other.md")
    assert done.returncode == 1
    assert "page.html exists" in done.stderr
    assert "--html" in done.stderr
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "other.md").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "does not exist"), ("{", "only part of it"), ('{"schema_version": 9, "candidates": []}', "version 9")],
)
def test_other_files_are_refused_in_one_line(cli, tmp_path, content, words):
    if content is not None:
        (tmp_path / "x.json").write_text(content, encoding="utf-8")
    done = cli("report", "x.json", "--html", "page.html")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert not (tmp_path / "page.html").exists()


@pytest.fixture
def best(report_data, search_data, tmp_path):
    folder = tmp_path / "best"
    folder.mkdir()
    (folder / "optimize.json").write_text(json.dumps(search_data.make_search(report_data)), encoding="utf-8")
    (folder / "benchmark.json").write_text(json.dumps(report_data.make_report(samples=60)), encoding="utf-8")
    (folder / "recipe.toml").write_text("[export]\nsource = 'x'\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["best", "best/optimize.json"])
def test_a_search_is_shown_again(cli, best, name):
    done = cli("report", name)
    assert done.returncode == 0, done.stderr
    assert "dropped in making: no pattern of a transformer" in done.stdout
    assert "static on openvino:cpu, 2.43x" in done.stdout
    assert "took 171 s of 180 s" in done.stdout


def test_views_of_a_search_are_written_and_never_overwritten(cli, best, tmp_path):
    done = cli("report", "best", "--html", "page.html", "--markdown", "table.md")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    for section in ("pareto", "tree", "distributions", "recipe"):
        assert f'id="{section}"' in page
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table.startswith("**static on openvino:cpu")
    assert cli("report", "best", "--markdown", "-").stdout == table
    done = cli("report", "best", "--html", "page.html")
    assert done.returncode == 1
    assert "page.html exists" in done.stderr


def test_a_benchmark_of_a_search_is_a_report(cli, best):
    assert "winner: int8 on ort:cpu" in cli("report", "best/benchmark.json").stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda best: (best / "optimize.json").unlink(), "a directory without optimize.json"),
        (lambda best: (best / "optimize.json").write_text("{}"), "no report"),
        (lambda best: (best / "optimize.json").write_text('{"schema_version": 1, "wish": 0}'), "damaged document"),
        (lambda best: (best / "benchmark.json").write_text("{"), "benchmark.json is no JSON"),
    ],
)
def test_damaged_searches_are_refused_in_one_line(cli, best, change, words):
    change(best)
    done = cli("report", "best")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_usage(cli, report):
    assert cli("report").returncode == 2
    assert cli("report", "report.json", "--html", "x", "--markdown", "./x").returncode == 2
    assert cli("report", "report.json", "--html", "-").returncode == 2
    assert cli("report", "report.json", "--html", "no/such/folder.html").returncode == 1


def test_the_schema_is_printed(cli):
    done = cli("report", "--schema")
    assert done.returncode == 0
    assert json.loads(done.stdout)["properties"]["schema_version"]["enum"] == [1, 2]
    assert cli("report", "--schema", "benchmark").stdout == done.stdout
    assert "tried" in json.loads(cli("report", "--schema", "optimize").stdout)["properties"]
    assert cli("report", "--schema", "report.json").returncode == 2
    assert cli("report", "report.json", "--schema").returncode == 2


def test_benchmark_looks_at_the_places_before_it_measures(cli, conv_model, tmp_path):
    (tmp_path / "taken.md").write_text("mine", encoding="utf-8")
    for options, words in (
        (["--markdown", "taken.md"], "taken.md exists"),
        (["--html", "no/folder.html"], "cannot write to no"),
    ):
        done = cli("benchmark", "-m", conv_model, *options, "-o", "r.json")
        assert done.returncode == 1
        assert words in done.stderr
        assert "measure" not in done.stderr
    assert cli("benchmark", "-m", conv_model, "-o", "same", "--html", "same").returncode == 2
    assert not (tmp_path / "r.json").exists()
