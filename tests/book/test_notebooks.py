"""Every stored chapter: equal to its twin, run from top to bottom, small, pictures told in words."""

import ast
import base64
import io
import json
import re
from pathlib import Path

import nbformat
import notebooks
import pytest
from nbformat import NotebookNode
from PIL import Image
from project import BOOK, ROOT, chapters, notebook_of

from geomlib.lab import claims, ledger

TWINS = chapters()
LINES_PER_CELL = 35
BYTES_PER_NOTEBOOK = 1_500_000
BYTES_OF_BOOK = 16_000_000
DOTS_PER_INCH = 100
CLAIM_KEYS = {"id", "paper", "statement", "verdict", "measured", "bound", "preset"}


def label(twin: Path) -> str:
    """Return the chapter's name for a test id."""
    return str(twin.relative_to(BOOK)).removesuffix(".myst.md")


@pytest.fixture(params=TWINS, ids=label)
def twin(request: pytest.FixtureRequest) -> Path:
    """Return each chapter's twin."""
    return request.param


@pytest.fixture
def stored(twin: Path) -> NotebookNode:
    """Return the chapter's executed notebook."""
    path = notebook_of(twin)
    assert path.exists(), f"no notebook beside {twin.name}: run `make notebooks`"
    return nbformat.read(path, as_version=4)


@pytest.fixture
def code(stored: NotebookNode) -> list[NotebookNode]:
    """Return the chapter's code cells."""
    return [cell for cell in stored.cells if cell.cell_type == "code"]


def test_every_notebook_has_a_twin() -> None:
    paths = {path for path in BOOK.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts}
    assert paths == set(map(notebook_of, TWINS))


def test_pair_is_equal_in_every_cell(twin: Path, stored: NotebookNode) -> None:
    text = notebooks.read_twin(twin)
    assert [(c.cell_type, c.source) for c in text.cells] == [(c.cell_type, c.source) for c in stored.cells]
    whole = nbformat.writes(notebooks.keep_outputs(text, stored)) + "\n"
    same = whole == notebook_of(twin).read_text(encoding="utf8")
    assert same, "metadata differs: run `make notebooks`"


def test_notebook_is_valid(stored: NotebookNode) -> None:
    nbformat.validate(stored)


def test_outputs_come_from_one_run_of_this_code(twin: Path, stored: NotebookNode, code: list) -> None:
    fresh = notebooks.is_fresh(notebooks.read_twin(twin), stored)
    assert fresh, "stale outputs: run `make notebooks`"
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


def test_no_cell_failed_unannounced(code: list) -> None:
    for cell in code:
        if "raises-exception" not in cell.metadata.get("tags", []):
            assert all(output.output_type != "error" for output in cell.outputs), cell.source


def test_set_up_cell_is_the_one_text(code: list) -> None:
    assert code[0].source == notebooks.SET_UP
    assert code[0].metadata.tags == ["hide-input"]
    assert code[0].metadata.cellView == "form"


def test_parameters_are_literals_and_come_next(code: list) -> None:
    assert "parameters" in code[1].metadata.get("tags", [])
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    values = {}
    for statement in ast.parse(code[1].source).body:
        assert isinstance(statement, ast.Assign), ast.unparse(statement)
        values[ast.unparse(statement.targets[0])] = ast.literal_eval(statement.value)
    assert values["PRESET"] == "quick"
    assert values["SEED"] == 0


def test_presets_stand_side_by_side_after_the_parameters(code: list) -> None:
    assert re.search(r"\bchoose\(", code[2].source)
    assert any("text/html" in output.get("data", {}) for output in code[2].outputs)


def test_cells_are_short(code: list) -> None:
    long = {len(cell.source.splitlines()): cell.source[:60] for cell in code}
    assert max(long) <= LINES_PER_CELL, long[max(long)]


def test_colab_opens_it_with_a_gpu(twin: Path, stored: NotebookNode) -> None:
    assert stored.metadata.accelerator == "GPU"
    assert stored.metadata.colab.name == notebook_of(twin).name
    assert stored.metadata.kernelspec.name == "python3"


def test_notebook_is_small(twin: Path) -> None:
    assert notebook_of(twin).stat().st_size < BYTES_PER_NOTEBOOK


def test_book_is_small() -> None:
    assert sum(path.stat().st_size for path in BOOK.rglob("*") if path.is_file()) < BYTES_OF_BOOK


def pictures(code: list) -> list[tuple[NotebookNode, bytes]]:
    """Return every stored PNG with its cell."""
    return [
        (cell, base64.b64decode(output.data["image/png"]))
        for cell in code
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]


def test_pictures_are_small(code: list) -> None:
    for cell, png in pictures(code):
        dots = Image.open(io.BytesIO(png)).info.get("dpi", (DOTS_PER_INCH,))[0]
        assert dots < DOTS_PER_INCH + 0.5, cell.source


def test_every_picture_has_words(code: list) -> None:
    for cell, _ in pictures(code):
        assert cell.metadata.get("mystnb", {}).get("image", {}).get("alt"), cell.source


def test_a_slider_works_without_a_kernel(stored: NotebookNode) -> None:
    models = stored.metadata.widgets[notebooks.WIDGET_STATE]["state"].values()
    names = [model["model_name"] for model in models]
    assert "StackModel" in names
    assert "LinkModel" in names


def test_nothing_stored_names_a_machine(twin: Path) -> None:
    text = notebook_of(twin).read_text(encoding="utf8")
    assert not re.findall(r"(?:/home/|/root/|/Users/|/tmp/|/site-packages/)[^\s\"']*", text)


def test_claims_can_be_read_by_a_program(stored: NotebookNode) -> None:
    for cell in stored.cells:
        for output in cell.get("outputs", []):
            record = output.get("metadata", {}).get(claims.METADATA_KEY)
            if record is not None:
                assert record.keys() >= CLAIM_KEYS
                assert record["id"] in claims.registry()
                assert record["verdict"] in claims.MARKS
                assert record["preset"] == "quick"
                assert {"text/plain", "text/html"} <= output.data.keys()


def test_every_claim_is_judged_in_some_chapter() -> None:
    judged = {record["id"] for record in claims.collect(BOOK)}
    assert judged == set(claims.registry())


def test_ledger_is_current(tmp_path: Path) -> None:
    page = BOOK / "appendix" / "ledger.md"
    records = claims.collect(BOOK)
    current = page.read_text(encoding="utf8") == ledger.page(records, base="..")
    assert current, "verdicts have changed since: run `make notebooks`"


def test_misspelt_parameter_fails(twin: Path) -> None:
    with pytest.raises(ValueError, match="PRESTE"):
        notebooks.rehearse(twin, {"PRESTE": "smoke"})


@pytest.mark.parametrize("path", [ROOT / "tools" / "setup_cell.py", *TWINS], ids=lambda path: path.name)
def test_links_into_colab_exist(path: Path) -> None:
    text = path.read_text(encoding="utf8")
    for link in re.findall(
        r"colab\.research\.google\.com/github/[\w.-]+/[\w.-]+/blob/main/([^)\s\"]+)", text
    ):
        assert (ROOT / link).is_file(), link


def test_stored_json_is_plain(twin: Path) -> None:
    # GitHub's preview and `jq` want JSON as the standard has it: NaN and Infinity are not in it.
    def refuse(name: str) -> None:
        raise ValueError(name)

    json.loads(notebook_of(twin).read_text(encoding="utf8"), parse_constant=refuse)
