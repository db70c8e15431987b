"""`deploykit benchmark --explain`: in the report, below the table, and where the device refuses the model."""

import json

QUICK = ("--rounds", 3, "--seconds", 0.02, "--warmup", 0)


def test_each_candidate_is_explained_in_the_report_and_below_the_table(run_cli, conv_model, tmp_path):
    places = ("ort:cpu", "ort:AzureExecutionProvider")
    devices = [word for place in places for word in ("--device", place)]
    done = run_cli("benchmark", "-m", conv_model, *devices, *QUICK, "--explain", "-o", "report.json")
    assert done.returncode == 0, done.stderr
    explained = json.loads((tmp_path / "report.json").read_text())["explain"]
    labels = [f"{conv_model.name} on {place}" for place in places]
    assert list(explained) == labels
    below = done.stdout[done.stdout.index("noise floor") :]
    for label, found in explained.items():
        assert f"\n{label}:\n" in below
        for finding in found["findings"]:
            assert finding["cure"] in below
    assert explained[labels[0]]["layers"][0]["time_us"] > 0
    assert explained[labels[0]]["peak"]["fp32_gflops"] > 0
    (refused,) = explained[labels[1]]["findings"]
    assert (refused["kind"], refused["severity"]) == ("wrong-provider", "high")
    assert "--device ort:cpu" in refused["cure"]


def test_a_refused_reference_is_an_error_with_the_cure(cli, conv_model):
    done = cli("benchmark", "-m", conv_model, "--device", "ort:AzureExecutionProvider", *QUICK, "--explain")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the reference")
    assert "--device ort:cpu" in last
    assert "Traceback" not in done.stderr


def test_the_recipe_of_it_runs(cli, conv_model, tmp_path):
    from deploykit.recipe import Recipe

    done = cli("benchmark", "-m", conv_model, "--explain", "--dry-run")
    assert "explain = true" in done.stdout
    (tmp_path / "recipe.toml").write_text(done.stdout)
    assert Recipe.load(tmp_path / "recipe.toml").steps["benchmark"].explain is True
