"""What the lab shows, as it stands in a notebook that was executed and stored."""

import base64
import io
import re

import nbclient
import nbformat
import pytest

CELLS = {
    "presets": """
        from geomlib.lab import presets
        sizes = {"smoke": {"widths": (3, 4)}, "quick": {"widths": (9, 4)}, "full": {"widths": (99, 4)}}
        settings = presets.choose("quick", **sizes)
    """,
    "claims": """
        import torch
        from geomlib.lab.claims import claim
        claim("SIM-11", holds=torch.tensor(True), measured=torch.tensor(3e-16), bound=1e-10, law=True)
        claim("SIM-16", holds="on digits", measured=[0.9, 0.92], seeds=[0, 1])
    """,
    "broken law": """
        claim("SIM-11", holds=False, measured=2.0, law=True)
    """,
    "figure": """
        import matplotlib.pyplot as plt
        from geomlib.lab import viz
        viz.use_style()
        figure, axes = plt.subplots()
        axes.plot([0, 1])
        viz.show(figure, alt="A rising line")
    """,
    "slider": """
        viz.frames(
            lambda axes, k: axes.plot([0, 1], [0, k]), [0.5, 0.75, 1.0],
            label="slope", alt="A line", caption="It rises.", start=1,
        )
    """,
}


@pytest.fixture(scope="module")
def notebook():
    cells = [nbformat.v4.new_code_cell(re.sub(r"(?m)^ {8}", "", source).strip()) for source in CELLS.values()]
    made = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(made, kernel_name="python3", allow_errors=True, timeout=120).execute()
    # As it would be read back from a file.
    stored = nbformat.reads(nbformat.writes(made), as_version=4)
    nbformat.validate(stored)
    return stored


def outputs(notebook, name):
    return notebook.cells[list(CELLS).index(name)].outputs


def test_a_claim_is_stored_in_the_metadata_of_its_output(notebook):
    first, second = outputs(notebook, "claims")
    record = first.metadata["geomlib_claim"]
    assert set(record) >= {"id", "paper", "statement", "verdict", "measured", "bound", "preset"}
    assert (record["id"], record["verdict"], record["preset"]) == ("SIM-11", "holds", "quick")
    assert second.metadata["geomlib_claim"]["verdict"] == "holds under conditions"
    # A MIME type of our own would make a strict build fail.
    assert set(first.data) == {"text/plain", "text/html"}
    assert first.data["text/plain"].startswith("✓ SIM-11 holds: measured < 1e-12, bound 1e-10.")
    assert "\n" not in first.data["text/plain"]


def test_a_broken_law_leaves_its_verdict_and_an_error(notebook):
    shown, error = outputs(notebook, "broken law")
    assert shown.metadata["geomlib_claim"]["verdict"] == "not supported"
    assert error.ename == "AssertionError"


def test_presets_are_a_table_with_the_chosen_one_marked(notebook):
    (shown,) = outputs(notebook, "presets")
    widths = shown.data["text/plain"].splitlines()[2]
    assert widths.split() == ["widths", "3,", "4", "9,", "4", "99,", "4"]
    assert "quick (this run)" in shown.data["text/html"]


def test_a_figure_is_shown_once_with_words(notebook):
    (shown,) = outputs(notebook, "figure")
    assert shown.data["text/plain"] == "[figure: A rising line]"
    assert shown.metadata["image/png"]["alt"] == "A rising line"


def test_a_slider_needs_no_kernel(notebook):
    (shown,) = outputs(notebook, "slider")
    widgets = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    by_model = {}
    for key, entry in widgets.items():
        by_model.setdefault(entry["model_name"], []).append((key, entry["state"]))
    ((slider, knob),) = by_model["IntSliderModel"]
    ((stack, pictures),) = by_model["StackModel"]
    ((_, link),) = by_model["LinkModel"]
    assert [link["source"], link["target"]] == [
        [f"IPY_MODEL_{slider}", "value"],
        [f"IPY_MODEL_{stack}", "selected_index"],
    ]
    assert (knob["value"], knob["min"], knob["max"], knob["description"]) == (1, 0, 2, "slope")
    assert len(pictures["children"]) == 3
    column = widgets[shown.data["application/vnd.jupyter.widget-view+json"]["model_id"]]["state"]
    assert column["children"][:2] == [f"IPY_MODEL_{slider}", f"IPY_MODEL_{stack}"]
    html = {key: state["value"] for key, state in by_model["HTMLModel"]}
    for child, value in zip(pictures["children"], ("0.5", "0.75", "1"), strict=True):
        content = html[child.removeprefix("IPY_MODEL_")]
        assert f'alt="A line, at slope = {value}"' in content
        assert f"slope = {value}<" in content
    assert any("It rises." in content for content in html.values())


def test_a_slider_is_a_still_picture_where_widgets_do_not_work(notebook):
    from PIL import Image

    (shown,) = outputs(notebook, "slider")
    assert shown.data["text/plain"] == "[slider: A line, at slope = 0.75]"
    picture = Image.open(io.BytesIO(base64.b64decode(shown.data["image/png"])))
    assert picture.size == (640, 400)
    assert shown.metadata["image/png"]["alt"] == "A line, at slope = 0.75"
