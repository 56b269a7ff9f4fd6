"""A slider that switches pictures in the browser, with no Python behind it.

An ``ipywidgets.Stack`` holds one picture per value, and ``jslink`` ties an ``IntSlider`` to the index of the
one that is shown. The link runs in the page, in Colab and in Jupyter alike.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import ipywidgets

__all__ = ["Frame", "Frames", "slider"]


@dataclass(frozen=True)
class Frame:
    """One picture of a slider: PNG bytes, the value it belongs to, and its alternative text.

    Examples
    --------
    >>> from geomlib.lab.slider import Frame
    >>> Frame(b"", "0.5", "A line").alt
    'A line'
    """

    png: bytes
    value: str
    alt: str


class Frames(ipywidgets.VBox):
    """A column of widgets that offers its first picture to readers whose program shows no widgets."""

    still: Frame

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is None:
            return None
        # Viewers without widgets, such as a code host's preview or a printed book, fall back on these.
        data = {
            **bundle,
            "text/plain": f"[slider: {self.still.alt}]",
            "image/png": b64encode(self.still.png).decode(),
        }
        return data, {"image/png": {"alt": self.still.alt}}


def slider(frames: Sequence[Frame], *, label: str, caption: str | None = None, start: int = 0) -> Frames:
    """Build the slider.

    Parameters
    ----------
    frames : sequence of Frame
        One per position.
    label : str
        Name of the parameter.
    caption : str, optional
        One sentence below the pictures.
    start : int
        The first position.

    Returns
    -------
    Frames
        A column of slider, pictures and caption.

    Examples
    --------
    >>> from geomlib.lab.slider import Frame, slider
    >>> made = slider([Frame(b"", "0.5", "A"), Frame(b"", "0.9", "B")], label="slope", start=1)
    >>> made.children[1].selected_index
    1
    """
    knob = ipywidgets.IntSlider(
        value=start,
        min=0,
        max=len(frames) - 1,
        description=label,
        # The index means nothing to a reader; each picture names its value.
        readout=False,
        style={"description_width": "initial"},
        layout={"width": "min(100%, 30em)"},
    )
    pictures = ipywidgets.Stack(
        [ipywidgets.HTML(_figure(frame, label)) for frame in frames], selected_index=start
    )
    ipywidgets.jslink((knob, "value"), (pictures, "selected_index"))
    children = [knob, pictures]
    if caption is not None:
        children.append(ipywidgets.HTML(f'<p style="color: inherit; margin: 0">{escape(caption)}</p>'))
    column = Frames(children, layout={"max_width": "100%"})
    column.still = frames[start]
    return column


def _figure(frame: Frame, label: str) -> str:
    source = f"data:image/png;base64,{b64encode(frame.png).decode()}"
    return (
        f'<p style="color: inherit; margin: 0" role="status">{escape(label)} = {escape(frame.value)}</p>'
        f'<img src="{source}" alt="{escape(frame.alt)}" '
        'style="max-width: 100%; height: auto; background: white">'
    )
