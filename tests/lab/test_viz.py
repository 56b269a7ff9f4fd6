"""Figures are light, small, legible to everybody, and sliders keep to their budget."""

import io
import itertools

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from geomlib.lab import viz

# Colour blindness at full strength, on linear RGB (Machado, Oliveira and Fernandes, 2009).
SIGHTS = {
    "all three cones": np.eye(3),
    "no red cones": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "no green cones": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "no blue cones": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def linear(colour):
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def cielab(rgb):
    to_xyz = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])
    t = to_xyz @ np.clip(rgb, 0, 1) / to_xyz.sum(axis=1)
    f = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("name", viz.COLOURS)
def test_every_colour_stands_out_from_the_white_face(name):
    luminance = linear(viz.COLOURS[name]) @ [0.2126, 0.7152, 0.0722]
    assert 1.05 / (luminance + 0.05) >= 3, "WCAG asks 3 to 1 of graphics"


@pytest.mark.parametrize("sight", SIGHTS)
def test_colours_differ_for_every_kind_of_sight(sight):
    seen = {name: cielab(SIGHTS[sight] @ linear(colour)) for name, colour in viz.COLOURS.items()}
    for one, other in itertools.combinations(seen, 2):
        # Two shades are told apart from a difference of about 2; lines that cross want ten times that.
        assert np.linalg.norm(seen[one] - seen[other]) > 20, (one, other)


def test_the_style_cycles_through_the_named_colours():
    import matplotlib
    import matplotlib.pyplot as plt

    with matplotlib.rc_context():
        viz.use_style()
        cycle = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    named = [colour for name, colour in viz.COLOURS.items() if name != "ink"]
    assert cycle == named


def picture(data):
    return Image.open(io.BytesIO(data))


def test_a_figure_is_small_and_opaque():
    figure = Figure(figsize=(6.4, 4), dpi=100, facecolor="none")
    figure.subplots().plot(np.sin(np.arange(200) / 9))
    data = viz.png(figure)
    assert picture(data).size == (640, 400)
    assert picture(data).convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
    assert len(data) < 25_000


def test_the_same_figure_is_the_same_file():
    def draw():
        figure = Figure()
        figure.subplots().plot([0, 1])
        return viz.png(figure)

    assert draw() == draw()


def test_a_figure_without_words_is_refused():
    with pytest.raises(ValueError, match="alt must say"):
        viz.show(Figure(), alt=" ")


# Sliders


def line(axes, k):
    axes.plot([0, 1], [0, k])


def pictures(widget):
    return [child.value for child in widget.children[1].children]


def test_busy_frames_keep_to_their_budget():
    t = np.linspace(0, 1, 500)

    def draw(axes, k):
        for shift in range(5):
            axes.plot(t, np.sin(40 * k * t + shift) + shift, label=f"line {shift}")
        axes.legend()

    widget = viz.frames(draw, [0.1, 0.5, 1.0], label="k", alt="Sines")
    # Base 64 takes four bytes for three; the words around the picture take a few hundred.
    assert max(map(len, pictures(widget))) < viz.MOST_BYTES * 4 / 3 + 500


def test_a_slider_may_have_24_frames():
    widget = viz.frames(line, list(range(24)), label="k", alt="Lines", figsize=(1.5, 1))
    assert len(pictures(widget)) == 24
    assert widget.children[0].max == 23


def test_a_picture_that_cannot_be_made_small_is_refused():
    noise = torch.rand(300, 300, generator=torch.Generator().manual_seed(0)).numpy()
    with pytest.raises(ValueError, match=r"the picture at k = 1 must have at most 25000 bytes, got \d+"):
        viz.frames(lambda axes, k: axes.imshow(noise), [1, 2], label="k", alt="Noise")


def test_words_may_depend_on_the_value():
    widget = viz.frames(line, [1, 2], label="k", alt=lambda k: f"Slope <{k}>")
    assert 'alt="Slope &lt;2&gt;"' in pictures(widget)[1]


def test_several_panels_are_passed_as_an_array():
    shapes = []
    viz.frames(lambda axes, k: shapes.append(axes.shape), [1, 2], label="k", alt="Panels", panels=(1, 3))
    assert shapes == [(3,), (3,)]


def test_a_slider_leaves_no_open_figure_and_no_style():
    import matplotlib
    import matplotlib.pyplot as plt

    before = dict(matplotlib.rcParams)
    viz.frames(line, [1, 2], label="k", alt="Lines")
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("values", "change", "words"),
    [
        ([1], {}, "values must number 2 to 24, got 1"),
        (list(range(25)), {}, "values must number 2 to 24, got 25"),
        ([1, 2], {"start": 2}, "start must be an index"),
        ([1, 2], {"alt": ""}, "alt must say"),
        ([1, 2], {"alt": lambda k: ""}, "alt must say"),
    ],
)
def test_faulty_sliders_are_refused(values, change, words):
    with pytest.raises(ValueError, match=words):
        viz.frames(line, values, **{"label": "k", "alt": "Lines", **change})


# Eigenvalues


@pytest.fixture
def axes():
    return Figure().subplots()


def test_eigenvalues_outside_the_circle_are_marked_by_colour_and_shape(axes):
    spectrum = torch.tensor([0.5, 1.0 + 1e-7, 1.2j, -0.3 + 0.1j])
    inside = viz.eigenvalues(axes, spectrum)
    crosses = next(c for c in axes.collections if c is not inside)
    assert len(inside.get_offsets()) == 3, "rounding does not put an eigenvalue outside"
    assert crosses.get_offsets().tolist() == [[0.0, pytest.approx(1.2)]]


def test_eigenvalues_may_be_coloured_by_a_number(axes):
    residual = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    dots = viz.eigenvalues(axes, torch.rand(3), colour_by=residual, label="residual")
    assert dots.get_array().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert axes.figure.axes[-1].get_ylabel() == "residual"


def test_the_circle_is_round_and_in_view(axes):
    viz.eigenvalues(axes, torch.tensor([0.1]))
    assert axes.get_aspect() == 1
    assert axes.get_xlim()[0] <= -1
    assert axes.get_ylim()[1] >= 1


@pytest.mark.parametrize(
    ("spectrum", "colour_by", "words"),
    [
        (torch.eye(2), None, "spectrum must have shape"),
        (torch.ones(2), torch.ones(3), "colour_by must have the shape"),
    ],
)
def test_faulty_spectra_are_refused(axes, spectrum, colour_by, words):
    with pytest.raises(ValueError, match=words):
        viz.eigenvalues(axes, spectrum, colour_by)
