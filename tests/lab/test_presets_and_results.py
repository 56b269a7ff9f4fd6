"""Presets, tables, benchmark results and the environment report, outside a notebook."""

import json
from pathlib import Path

import pytest
import torch

import geomlib
from geomlib.lab import environment, output, presets, results

ROOT = Path(geomlib.__file__).parents[1]
SIZES = {
    "smoke": {"epochs": 1, "lr": 0.1},
    "quick": {"epochs": 5, "lr": 0.1},
    "full": {"epochs": 50, "lr": 1e-3},
}


# Presets


@pytest.mark.parametrize("name", presets.NAMES)
def test_a_preset_gives_its_knobs(name, capsys):
    settings = presets.choose(name, **SIZES)
    assert (settings.epochs, settings.lr, settings.preset) == (SIZES[name]["epochs"], SIZES[name]["lr"], name)
    assert presets.current() == name
    assert f"{name} (this run)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("preset", "change", "words"),
    [
        ("quik", {}, "PRESET must be one of smoke, quick, full, got 'quik'"),
        ("quick", {"full": {"epochs": 9}}, "difference between smoke and full in lr"),
        (
            "quick",
            {"quick": {"epochs": 9, "lr": 1, "width": 3}},
            "difference between smoke and quick in width",
        ),
        ("quick", {name: {"preset": 1} for name in presets.NAMES}, "no knob may be called preset"),
    ],
)
def test_faulty_presets_are_refused(preset, change, words, capsys):
    with pytest.raises(ValueError, match=words):
        presets.choose(preset, **{**SIZES, **change})
    assert capsys.readouterr().out == ""


def test_a_missing_knob_is_named_with_those_there_are():
    settings = presets.choose("quick", **SIZES)
    with pytest.raises(AttributeError, match=r"no knob is called 'epoch': this chapter has epochs, lr"):
        _ = settings.epoch


# Tables


def test_a_table_is_accessible_and_takes_the_colours_of_the_page():
    plain, html = output.table(["a", "b"], [["x<y", "1"]], caption="Two & two", marked=1)
    assert plain == "Two & two\na    b\nx<y  1"
    assert "<caption" in html
    assert "Two &amp; two" in html
    assert 'scope="col"' in html
    assert 'scope="row"' in html
    assert "x&lt;y" in html
    assert html.count("font-weight: bold") == 2
    assert "#" not in html


def test_a_ragged_table_is_refused():
    with pytest.raises(ValueError, match="rows must have 2 entries"):
        output.table(["a", "b"], [["x"]], caption="c")


# Benchmark results


@pytest.fixture
def repository(tmp_path, monkeypatch):
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    chapter = tmp_path / "book" / "sim"
    chapter.mkdir(parents=True)
    monkeypatch.chdir(chapter)
    return folder


def test_results_are_found_from_a_chapter_and_shown(repository, capsys):
    content = {
        "title": "Forward and backward",
        "columns": ["solver", "ms", "steps", "converged", "bound"],
        "rows": [["ours", 1234.56, 20, True, None], ["theirs", 12.3456, 2000, False, 1e-5]],
        "notes": ["batch of 64."],
        "protocol": "median of 7",
        "machine": {"threads": "1", "torch": "2.14"},
    }
    (repository / "solvers.json").write_text(json.dumps(content))
    results.table("solvers")
    assert capsys.readouterr().out.splitlines() == [
        "Forward and backward",
        "solver  ms    steps  converged  bound",
        "ours    1235  20     yes        –",
        "theirs  12.3  2000   no         1e-05",
        "Batch of 64.",
        "Measured: median of 7; threads 1, torch 2.14.",
    ]


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json"))
)
def test_every_committed_result_can_be_shown(name, capsys):
    results.table(name)
    assert "Measured: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"title": "t", "columns": ["a"]}, "got no rows"),
        ({"title": "t", "columns": ["a"], "rows": [[1, 2]]}, "rows must have 1 entries"),
    ],
)
def test_results_that_are_no_table_are_refused(repository, content, words):
    (repository / "solvers.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        results.table("solvers")


def test_missing_results_say_how_to_measure_them(repository, capsys):
    results.table("unmeasured")
    assert "make bench" in capsys.readouterr().out


# Environment


def test_the_report_names_versions_and_device(capsys):
    environment.report()
    first = capsys.readouterr().out.splitlines()[0]
    assert f"torch {torch.__version__}" in first
    assert f"device {environment.device().type}" in first


@pytest.mark.parametrize(
    ("has_colab", "variables", "words"),
    [
        (True, {}, "run all cells again"),
        (False, {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}, "Settings > Accelerator"),
        (False, {}, "open this chapter in Colab"),
    ],
)
def test_without_a_gpu_one_sentence_says_how_to_get_one(monkeypatch, capsys, has_colab, variables, words):
    monkeypatch.setattr(environment, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: has_colab or None)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    environment.report()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert words in lines[1]


def test_the_emulated_device_is_never_taken_for_a_gpu(emulated):
    assert environment.device().type != emulated.type
