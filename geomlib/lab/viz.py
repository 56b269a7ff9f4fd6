"""Figures: one style, pictures with words for those who cannot see them, and sliders without a kernel.

Every figure keeps an opaque light face, on which all colours here have a contrast of at least 3 to 1 and
stay apart under the three common kinds of colour blindness; so one picture serves the light page and the
dark one.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from geomlib.lab.output import publish_image

if TYPE_CHECKING:
    from ipywidgets import VBox
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = ["COLOURS", "eigenvalues", "frames", "png", "show", "use_style"]

COLOURS = {
    "blue": "#1C66F4",
    "orange": "#C57115",
    "green": "#11A862",
    "red": "#A20420",
    "purple": "#C166D3",
    "navy": "#023C7B",
    "grey": "#6D6D6D",
    "ink": "#222222",
}
"""Colours by name, in the order of the style's cycle; ``ink`` is for text and reference lines."""

MOST_FRAMES = 24
MOST_BYTES = 25_000


def use_style() -> None:
    """Give every figure from here on the look of the course.

    Examples
    --------
    >>> from geomlib.lab import viz
    >>> import matplotlib
    >>> with matplotlib.rc_context():
    ...     viz.use_style()
    ...     matplotlib.rcParams["figure.facecolor"]
    'white'
    """
    import matplotlib.pyplot as plt

    plt.style.use(_style())


def show(figure: Figure, *, alt: str) -> None:
    """Show a figure as a small PNG with alternative text, and close it.

    On the built page the words come from the cell's metadata (``mystnb: {image: {alt: ...}}``); here they
    serve notebooks, where a terminal prints them instead of the picture.

    Parameters
    ----------
    figure : Figure
        Drawn in the style of :func:`use_style`.
    alt : str
        What a reader who cannot see the picture should know of it.

    Raises
    ------
    ValueError
        If ``alt`` is empty.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> from geomlib.lab import viz
    >>> viz.show(Figure(), alt="An empty figure")
    [figure: An empty figure]
    """
    import matplotlib.pyplot as plt

    if not alt.strip():
        raise ValueError(
            "alt must say what the figure shows, got an empty text: a screen reader would be mute"
        )
    # Closed first, or the notebook's own backend would show it a second time.
    plt.close(figure)
    publish_image(png(figure), alt)


def frames(
    draw: Callable[[Any, Any], object],
    values: Sequence[Any],
    *,
    label: str,
    alt: str | Callable[[Any], str],
    caption: str | None = None,
    figsize: tuple[float, float] = (6.4, 4.0),
    panels: tuple[int, int] = (1, 1),
    start: int = 0,
) -> VBox:
    """Make a slider that needs no kernel: one picture per value, switched by the browser.

    Parameters
    ----------
    draw : callable
        ``draw(axes, value)`` draws one frame. ``axes`` is an ``Axes``, or an array of them if there are
        several ``panels``. Fix the limits of the axes, or they will jump.
    values : sequence
        2 to 24 values of the parameter.
    label : str
        Name of the parameter, shown beside the slider.
    alt : str or callable
        Words for each picture: a text, to which the value is added, or ``alt(value)``.
    caption : str, optional
        One sentence below, that says what to look for.
    figsize : (float, float)
        Inches; at 100 dots each.
    panels : (int, int)
        Rows and columns of axes.
    start : int
        Index of the frame that is shown first, also where widgets do not work.

    Returns
    -------
    ipywidgets.VBox
        Slider, pictures and caption; leave it as the last expression of the cell.

    Raises
    ------
    ValueError
        If there are too few or too many values, no words, or a picture stays above 25 kB.

    Examples
    --------
    >>> from geomlib.lab import viz
    >>> slider = viz.frames(
    ...     lambda axes, k: axes.plot([0, 1], [0, k]), [0.5, 0.9], label="slope", alt="A line through zero"
    ... )
    >>> [type(part).__name__ for part in slider.children]
    ['IntSlider', 'Stack']
    """
    from geomlib.lab.slider import Frame, slider

    values = list(values)
    if not 2 <= len(values) <= MOST_FRAMES:
        raise ValueError(
            f"values must number 2 to {MOST_FRAMES}, got {len(values)}: the page would grow too heavy"
        )
    if not 0 <= start < len(values):
        raise ValueError(f"start must be an index of values, got {start} for {len(values)} values")
    drawn = []
    for value in values:
        name = f"{value:g}" if isinstance(value, float) else str(value)
        words = alt(value) if callable(alt) else f"{alt}, at {label} = {name}"
        if not words.strip() or (isinstance(alt, str) and not alt.strip()):
            raise ValueError(f"alt must say what the picture at {label} = {name} shows, got an empty text")
        picture = _frame(draw, value, figsize, panels)
        if len(picture) > MOST_BYTES:
            raise ValueError(
                f"the picture at {label} = {name} must have at most {MOST_BYTES} bytes, got {len(picture)}: "
                "draw fewer points, fewer panels or a smaller figsize, or the page grows too heavy"
            )
        drawn.append(Frame(picture, name, words))
    return slider(drawn, label=label, caption=caption, start=start)


def eigenvalues(
    axes: Axes, spectrum: Tensor, colour_by: Tensor | None = None, *, label: str | None = None
) -> PathCollection:
    """Draw eigenvalues in the complex plane with the unit circle.

    Without ``colour_by``, those outside the circle are red crosses, since what they carry grows without
    bound, and the others blue dots.

    Parameters
    ----------
    axes : Axes
        Where to draw.
    spectrum : Tensor
        Shape ``(n,)``, complex or real.
    colour_by : Tensor, optional
        Shape ``(n,)``, real: a number per eigenvalue, such as its residual, shown by colour with a bar.
    label : str, optional
        Words at the colour bar, or in the legend of the blue dots.

    Returns
    -------
    PathCollection
        The dots.

    Raises
    ------
    ValueError
        If the shapes are not ``(n,)``.

    Examples
    --------
    >>> import torch
    >>> from matplotlib.figure import Figure
    >>> from geomlib.lab import viz
    >>> axes = Figure().subplots()
    >>> len(viz.eigenvalues(axes, torch.tensor([1.0, 0.5j, -0.5j])).get_offsets())
    3
    """
    from matplotlib.patches import Circle

    if spectrum.dim() != 1:
        raise ValueError(
            f"spectrum must have shape (n,), got {tuple(spectrum.shape)}: draw one matrix at a time"
        )
    if colour_by is not None and colour_by.shape != spectrum.shape:
        raise ValueError(f"colour_by must have the shape of spectrum, got {tuple(colour_by.shape)}")
    points = spectrum.detach().to("cpu", torch.complex128).numpy()
    axes.add_patch(Circle((0, 0), 1, fill=False, color=COLOURS["ink"], linewidth=1))
    axes.set(aspect="equal", xlabel="real part", ylabel="imaginary part")
    axes.autoscale_view()
    if colour_by is not None:
        numbers = colour_by.detach().cpu().numpy()
        dots = axes.scatter(
            points.real, points.imag, c=numbers, s=26, zorder=3, edgecolor=COLOURS["ink"], linewidth=0.4
        )
        axes.figure.colorbar(dots, ax=axes, label=label, shrink=0.85)
        return dots
    # A margin for rounding: on the circle is not outside.
    outside = abs(points) > 1 + 1e-4
    inside = points[~outside]
    if outside.any():
        axes.scatter(points[outside].real, points[outside].imag, c=COLOURS["red"], marker="x", s=40, zorder=3)
    return axes.scatter(
        inside.real, inside.imag, c=COLOURS["blue"], s=26, zorder=3, label=label, edgecolor="none"
    )


def png(figure: Figure) -> bytes:
    """Draw a figure as a PNG of at most 256 colours, a third of the size that matplotlib writes.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> from geomlib.lab import viz
    >>> viz.png(Figure())[:4]
    b'\\x89PNG'
    """
    return _encode(_pixels(figure), 256)


def _pixels(figure: Figure) -> Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure.set_facecolor("white")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _encode(picture: Image, colours: int) -> bytes:
    from PIL import Image

    # No dithering: its noise costs more bytes than the colours it saves.
    indexed = picture.quantize(colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    file = io.BytesIO()
    indexed.save(file, format="PNG", optimize=True)
    return file.getvalue()


def _frame(
    draw: Callable[[Any, Any], object], value: Any, figsize: tuple[float, float], panels: tuple[int, int]
) -> bytes:
    """Draw one frame, with as many colours as fit."""
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    with plt.style.context(_style()):
        # Not through pyplot, which would keep the figure open and show it.
        figure = Figure(figsize=figsize)
        draw(figure.subplots(*panels), value)
        pixels = _pixels(figure)
    picture = b""
    for colours in (256, 64, 24):
        picture = _encode(pixels, colours)
        if len(picture) <= MOST_BYTES:
            break
    return picture


def _style() -> str:
    return str(resources.files("geomlib.lab") / "house.mplstyle")
