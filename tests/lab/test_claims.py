"""A verdict is shown in one line, stored where a program finds it, and collected into one ledger."""

import json
import runpy
import subprocess
import sys

import nbformat
import numpy as np
import pytest
import torch

from geomlib.lab import claims, ledger, presets
from geomlib.lab.claims import Claim, claim, collect, registry, shown

REGISTRY = {
    "TOY-1": Claim("TOY-1", "toy", "1234.5678", "Maps |z| to a_b <= $1 [sic].", "eq. 3", "law"),
    "TOY-2": Claim("TOY-2", "toy", "1234.5678", "Trains better.", "abstract.", "empirical"),
    "TOY-10": Claim("TOY-10", "toy", "1234.5678", "Stays bounded.", "reconstructed: why", "law"),
    "ZOO-1": Claim("ZOO-1", "zoo", "8765.4321", "Grows.", "abstract", "empirical"),
}


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(claims, "registry", lambda: REGISTRY)
    monkeypatch.setattr(ledger, "registry", lambda: REGISTRY)
    monkeypatch.setattr(presets, "_current", "quick")


@pytest.fixture
def published(monkeypatch):
    """Return what would be shown: (plain, html, record) of each claim."""
    outputs = []
    monkeypatch.setattr(
        claims,
        "publish",
        lambda plain, html, metadata: outputs.append((plain, html, metadata["geomlib_claim"])),
    )
    return outputs


# The verdict


@pytest.mark.parametrize(
    ("arguments", "verdict"),
    [
        ({"holds": True}, "holds"),
        ({"holds": False}, "not supported"),
        ({"holds": None}, "not judged"),
        ({"holds": "for small kappa"}, "holds under conditions"),
        ({"holds": True, "conditions": "for small kappa"}, "holds under conditions"),
        ({"holds": False, "conditions": "for small kappa"}, "not supported"),
        ({"holds": torch.tensor(True)}, "holds"),
        ({"holds": torch.tensor([False])}, "not supported"),
        ({"holds": np.float64(1) < 2}, "holds"),
    ],
)
def test_what_came_out_decides_the_verdict(published, arguments, verdict):
    claim("TOY-2", measured=1.0, **arguments)
    plain, html, record = published[0]
    assert record["verdict"] == verdict
    assert verdict in plain
    assert verdict in html


@pytest.mark.parametrize("holds", [0.93, 1, torch.tensor([True, True]), torch.tensor(0.5), object()])
def test_a_verdict_that_is_no_truth_value_is_refused(published, holds):
    with pytest.raises(ValueError, match="holds must be True, False, None"):
        claim("TOY-2", holds=holds, measured=1.0)
    assert not published


def test_an_unknown_claim_is_refused(published):
    with pytest.raises(ValueError, match=r"got 'TOY-3': known are TOY-1"):
        claim("TOY-3", holds=True, measured=1.0)


def test_two_conditions_are_refused(published):
    with pytest.raises(ValueError, match="condition"):
        claim("TOY-2", holds="here", conditions="there", measured=1.0)


def test_a_broken_law_is_shown_and_then_raises(published):
    with pytest.raises(AssertionError, match=r"TOY-1 is proved and yet failed: measured 1\.2, bound 1"):
        claim("TOY-1", holds=False, measured=1.2, bound=1, law=True)
    assert published[0][2]["verdict"] == "not supported"


def test_smoke_judges_laws_only(published, monkeypatch):
    monkeypatch.setattr(presets, "_current", "smoke")
    claim("TOY-2", holds=False, measured=0.1, conditions="never")
    claim("TOY-1", holds=True, measured=0.1, law=True)
    assert [record["verdict"] for *_, record in published] == ["not judged", "holds"]
    assert "too small" in published[0][2]["why"]
    assert "conditions" not in published[0][2]


# The record


def test_the_record_has_what_programs_read(published):
    claim(
        "TOY-2",
        holds=True,
        measured=torch.tensor([0.91, 0.93], dtype=torch.float64),
        bound=np.float32(0.5),
        why="it learns",
        seeds=range(2),
    )
    record = published[0][2]
    assert record == {
        "id": "TOY-2",
        "paper": "1234.5678",
        "statement": "Trains better.",
        "verdict": "holds",
        "measured": [0.91, 0.93],
        "bound": 0.5,
        "preset": "quick",
        "kind": "empirical",
        "why": "it learns",
        "seeds": [0, 1],
    }
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_missing_values_stand_in_the_record_as_null(published, monkeypatch):
    monkeypatch.setattr(presets, "_current", None)
    claim("TOY-2", holds=None, measured=float("nan"))
    record = published[0][2]
    assert (record["bound"], record["preset"], record["measured"]) == (None, None, "nan")


def test_the_line_is_one_line_and_html_is_escaped(published):
    claim("TOY-1", holds=True, measured="a < b", bound=1e-10)
    plain, html, _ = published[0]
    assert plain == "✓ TOY-1 holds: measured a < b, bound 1e-10. Maps |z| to a_b <= $1 [sic]."
    assert "a &lt; b" in html
    assert "aria-label" in html


def test_colours_are_the_pages_own(published):
    claim("TOY-1", holds=True, measured=1)
    html = published[0][1]
    assert "currentColor" in html
    assert "background" not in html
    assert "#" not in html


# Rounding


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.98765, "0.988"),
        (1, "1"),
        (12345.678, "1.23e4"),
        (1e-4, "0.0001"),
        (3.1e-7, "< 1e-6"),
        (8.9e-7, "< 1e-6"),
        (-3.1e-7, "> -1e-6"),
        (2e-16, "< 1e-12"),
        (0.0, "< 1e-12"),
        (float("inf"), "inf"),
        ("five of five", "five of five"),
        (True, "True"),
        (None, "none"),
        ([0.5], "0.5 (1 seed)"),
        ([0.9, 0.92, 0.94], "0.92 ± 0.02 (3 seeds)"),
        ([], "none"),
        (["a", 0.25], "a, 0.25"),
        ({"SIM": [0.9, 0.9], "DEQ": 0.5}, "SIM 0.9 ± 0 (2 seeds), DEQ 0.5"),
    ],
)
def test_measured_values_are_rounded_to_what_machines_agree_on(value, text):
    assert shown(value) == text


def test_a_bound_keeps_its_digits():
    assert shown(2.5e-7, exact=True) == "2.5e-7"
    assert shown({"a": 1e-5}, exact=True) == "a 1e-5"


# The registry


def test_the_rooms_register_their_claims_without_being_imported():
    code = (
        "import sys; from geomlib.lab.claims import registry; found = registry()\n"
        "assert {f'SIM-{n}' for n in range(1, 18)} <= set(found)\n"
        "assert all(entry.kind in ('law', 'empirical') for entry in found.values())\n"
        "assert all(entry.statement and entry.source for entry in found.values())\n"
        "assert 'geomlib.sim' not in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def room(folder, name, text):
    (folder / name).mkdir()
    (folder / name / "claims.toml").write_text(text)


ENTRY = '[A-1]\npaper = "1"\nstatement = "s"\nsource = "t"\nkind = "law"\n'


@pytest.mark.parametrize(
    ("rooms", "words"),
    [
        ({"a": ENTRY, "b": ENTRY}, "A-1 is registered in a and in b"),
        ({"a": ENTRY + 'proof = "p"\n'}, "A-1 in a/claims.toml"),
        ({"a": '[A-1]\npaper = "1"\n'}, "A-1 in a/claims.toml"),
    ],
)
def test_a_faulty_register_is_refused(tmp_path, monkeypatch, rooms, words):
    for name, text in rooms.items():
        room(tmp_path, name, text)
    monkeypatch.setattr(claims.resources, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match=words):
        registry.__wrapped__()


# Collecting and the ledger


def write_notebook(path, title, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [nbformat.v4.new_markdown_cell(f"(ch-x)=\n# {title}\nText"), nbformat.v4.new_code_cell("claim()")]
    cells[1].outputs = [
        nbformat.v4.new_output("display_data", {"text/plain": "x"}, metadata={"geomlib_claim": record})
        for record in records
    ]
    cells[1].outputs.append(nbformat.v4.new_output("stream", text="noise"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


def record(id, verdict, **more):
    entry = REGISTRY.get(id)
    base = {
        "id": id,
        "paper": entry and entry.paper,
        "statement": entry and entry.statement,
        "verdict": verdict,
    }
    return {**base, "measured": 0.25, "bound": None, "preset": "quick", **more}


@pytest.fixture
def book(tmp_path):
    folder = tmp_path / "book"
    write_notebook(
        folder / "toy" / "one.ipynb",
        "Chapter One",
        record("TOY-1", "holds", measured=1e-9, bound=2.5e-7),
        record("TOY-2", "holds", seeds=[0, 1]),
    )
    write_notebook(
        folder / "toy" / "two.ipynb",
        "Chapter Two",
        record("TOY-2", "not supported", why="it diverged"),
        record("TOY-10", "holds under conditions", conditions="kappa < 0.5"),
    )
    write_notebook(folder / ".ipynb_checkpoints" / "one-checkpoint.ipynb", "Old", record("ZOO-1", "holds"))
    write_notebook(folder / "_build" / "copy.ipynb", "Copy", record("ZOO-1", "holds"))
    return folder


def test_verdicts_are_read_out_of_stored_notebooks(book):
    found = collect(book)
    assert [(r["id"], r["verdict"], r["notebook"], r["title"]) for r in found] == [
        ("TOY-1", "holds", "toy/one.ipynb", "Chapter One"),
        ("TOY-2", "holds", "toy/one.ipynb", "Chapter One"),
        ("TOY-2", "not supported", "toy/two.ipynb", "Chapter Two"),
        ("TOY-10", "holds under conditions", "toy/two.ipynb", "Chapter Two"),
    ]


def test_a_stale_notebook_is_refused(book):
    write_notebook(book / "toy" / "stale.ipynb", "Stale", record("TOY-99", "holds"))
    with pytest.raises(ValueError, match=r"stale.ipynb judges TOY-99"):
        collect(book)


def test_the_gravest_verdict_counts(book):
    assert ledger.summary(collect(book)) == {
        "TOY-1": "holds",
        "TOY-2": "not supported",
        "TOY-10": "holds under conditions",
        "ZOO-1": "not judged",
    }


def test_the_ledger_says_everything_in_order(book):
    target = book / "appendix" / "ledger.md"
    target.parent.mkdir()
    line = ledger.write(book, target)
    assert line == "1 hold, 1 hold under conditions, 1 not supported, 1 not judged"
    page = target.read_text()
    assert "| TOY | 1 | 1 | 1 | 0 | 3 |" in page
    assert "| **all** | 1 | 1 | 1 | 1 | 4 |" in page
    order = [
        page.index(text)
        for text in ("## TOY", "### TOY-1 ✓ holds", "### TOY-2 ✗", "### TOY-10 ◐", "## ZOO", "### ZOO-1 ○")
    ]
    assert order == sorted(order)
    assert "[Chapter One](../toy/one.ipynb): measured &lt; 1e-8" not in page
    assert r"[Chapter One](../toy/one.ipynb): measured \< 1e-8; bound 2.5e-7; preset quick." in page
    assert "because it diverged" in page
    assert r"condition: kappa \< 0.5" in page
    assert "seeds 0, 1" in page
    assert "[arXiv 8765.4321](https://arxiv.org/abs/8765.4321)" in page
    assert page.count("It has never been measured") == 1
    assert page == ledger.page(collect(book), base=".."), "the page is the same every time"


def test_statements_come_out_of_markdown_as_they_went_in(book):
    from markdown_it import MarkdownIt
    from mdit_py_plugins.dollarmath import dollarmath_plugin

    html = MarkdownIt("commonmark").use(dollarmath_plugin).render(ledger.page([], base=".."))
    assert "Maps |z| to a_b &lt;= $1 [sic]." in html


def test_the_command_line_writes_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    target = tmp_path / "ledger.md"
    monkeypatch.setattr(sys, "argv", ["ledger", str(tmp_path), str(target)])
    monkeypatch.delitem(sys.modules, "geomlib.lab.ledger")
    runpy.run_module("geomlib.lab.ledger", run_name="__main__")
    assert capsys.readouterr().out.startswith("0 hold, ")
    assert "### SIM-17 ○ not judged" in target.read_text()


def test_the_command_line_explains_itself(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["ledger"])
    monkeypatch.delitem(sys.modules, "geomlib.lab.ledger")
    with pytest.raises(SystemExit, match="usage"):
        runpy.run_module("geomlib.lab.ledger", run_name="__main__")
