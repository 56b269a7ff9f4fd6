"""Every chapter runs from top to bottom with the ``smoke`` preset, as papermill runs it."""

from pathlib import Path

import notebooks
import pytest
from project import chapters


@pytest.mark.parametrize("twin", chapters(), ids=lambda twin: twin.parent.name + "/" + twin.name)
def test_chapter_runs_with_the_smoke_preset(twin: Path) -> None:
    notebooks.rehearse(twin, {"PRESET": "smoke"})
