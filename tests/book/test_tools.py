"""The tools that make notebooks from text: what they store, what they refuse, what they rewrite."""

import shutil
from pathlib import Path

import nbformat
import notebooks
import papermill
import plain
import pytest
from project import ROOT, TWIN, notebook_of, repository_url

HEAD = """\
---
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# A sample

```{{code-cell}} ipython3
:tags: [hide-input]

{set_up}
```

```{{code-cell}} ipython3
:tags: [parameters]

PRESET = "quick"
```

"""
SLIDER = """\
```{code-cell} ipython3
import ipywidgets as widgets

slider = widgets.IntSlider(max=1)
stack = widgets.Stack([widgets.HTML("one"), widgets.HTML("two")], selected_index=0)
widgets.jslink((slider, "value"), (stack, "selected_index"))
never_shown = widgets.Text("nobody sees this")
print("made in", __file__ if "__file__" in globals() else "a cell")
widgets.VBox([slider, stack])
```
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the twin of a small chapter with a slider, its notebook made beside it."""
    path = tmp_path_factory.mktemp("chapter") / f"sample{TWIN}"
    path.write_text(HEAD.format(set_up=notebooks.SET_UP) + SLIDER, encoding="utf8")
    assert notebooks.update(path).startswith("run in")
    return path


@pytest.fixture
def twin(made: Path, tmp_path: Path) -> Path:
    """Return a copy of the pair that a test may change."""
    for path in (made, notebook_of(made)):
        shutil.copy(path, tmp_path)
    return tmp_path / made.name


def test_second_run_stores_the_same_bytes(twin: Path) -> None:
    before = notebook_of(twin).read_bytes()
    assert notebooks.update(twin) == "up to date"
    notebooks.update(twin, force=True)
    assert notebook_of(twin).read_bytes() == before


def test_widget_state_holds_what_is_in_view_and_its_links(twin: Path) -> None:
    stored = nbformat.read(notebook_of(twin), as_version=4)
    models = stored.metadata.widgets[notebooks.WIDGET_STATE]["state"]
    kinds = [model["model_name"] for model in models.values()]
    assert sorted(k for k in kinds if k in ("IntSliderModel", "StackModel", "HTMLModel", "LinkModel")) == [
        "HTMLModel",
        "HTMLModel",
        "IntSliderModel",
        "LinkModel",
        "StackModel",
    ]
    assert "TextModel" not in kinds
    (view,) = (
        output.data[notebooks.WIDGET_VIEW]["model_id"]
        for output in stored.cells[-1].outputs
        if notebooks.WIDGET_VIEW in output.get("data", {})
    )
    assert models[view]["model_name"] == "VBoxModel"


def test_changed_words_do_not_run_the_chapter_again(twin: Path) -> None:
    twin.write_text(twin.read_text(encoding="utf8").replace("# A sample", "# Another title"), encoding="utf8")
    assert notebooks.update(twin) == "text updated"


def test_changed_code_runs_the_chapter_again(twin: Path) -> None:
    twin.write_text(twin.read_text(encoding="utf8").replace("max=1", "max=2"), encoding="utf8")
    assert notebooks.update(twin).startswith("run in")


def test_untidy_twin_is_formatted_and_gets_the_present_set_up(twin: Path) -> None:
    tidy = twin.read_text(encoding="utf8")
    twin.write_text(tidy.replace("(max=1)", "( max = 1 )").replace("torch and numpy", "all"), encoding="utf8")
    notebooks.tidy_twin(twin)
    assert twin.read_text(encoding="utf8") == tidy


def test_twin_without_set_up_is_refused(twin: Path) -> None:
    twin.write_text(SLIDER, encoding="utf8")
    with pytest.raises(ValueError, match="has no set-up cell"):
        notebooks.update(twin)


def test_failing_cell_leaves_the_stored_notebook_alone(twin: Path) -> None:
    before = notebook_of(twin).read_bytes()
    twin.write_text(twin.read_text(encoding="utf8").replace("max=1", "max=1 / 0"), encoding="utf8")
    with pytest.raises(papermill.PapermillExecutionError, match="ZeroDivisionError"):
        notebooks.update(twin)
    assert notebook_of(twin).read_bytes() == before


def test_text_of_outputs_names_no_place() -> None:
    text = (
        f"/tmp/ipykernel_17/42.py:3: {ROOT}/geomlib/core.py /opt/site-packages/torch/x.py <at 0x7f00aabbcc>"
    )
    assert notebooks.without_places(text) == "<cell>:3: geomlib/core.py torch/x.py <at 0x...>"


@pytest.mark.parametrize(
    ("myst", "markdown"),
    [
        (":::{note}\nMind the step.\n:::", "> **Note**\n>\n> Mind the step."),
        ("(sec-here)=\n## Here", "## Here"),
        ("[glossary](../appendix/glossary.md)", "[glossary]({url}/blob/main/book/appendix/glossary.md)"),
        (
            "see [the\nglossary](../appendix/glossary.md)",
            "see [the\nglossary]({url}/blob/main/book/appendix/glossary.md)",
        ),
        ("{math}`x^2` and {term}`state`", "$x^2$ and state"),
        ("{cite}`konishi2023sim`", "[reference](https://arxiv.org/abs/2207.07475)"),
        ("```python\n:::{note}\n```", "```python\n:::{note}\n```"),
        ("{doc}`Notation <../appendix/notation>`", "[Notation]({url}/blob/main/book/appendix/notation.md)"),
    ],
)
def test_myst_becomes_markdown(myst: str, markdown: str) -> None:
    chapter = plain.Plain(ROOT / "book" / "sim" / "equilibrium.ipynb")
    assert chapter(myst) == markdown.replace("{url}", repository_url())
