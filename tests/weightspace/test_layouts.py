"""Layouts only move entries: shapes, bijections, and where they coincide."""

import pytest
import torch
from torch import nn

from geomlib.weightspace.layouts import LAYOUTS, Grid, filters, lay_out

MOVES = ("matrix", "mosaic", "slices", "nd")


def numbered(*shape):
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


@pytest.mark.parametrize(
    ("shape", "layout", "copies", "sides"),
    [
        ((8, 4, 3, 3), "matrix", 1, (8, 36)),
        ((8, 4, 3, 3), "mosaic", 1, (24, 12)),
        ((8, 4, 3, 3), "slices", 9, (8, 4)),
        ((8, 4, 3, 3), "norms", 1, (8, 4)),
        ((8, 4, 3, 3), "nd", 1, (8, 4, 3, 3)),
        ((8, 4, 3, 3), "vector", 1, (288,)),
        ((8, 4, 5), "matrix", 1, (8, 20)),
        ((8, 4, 5), "mosaic", 1, (8, 20)),
        ((8, 4, 2, 3, 5), "mosaic", 1, (48, 20)),
        ((8, 4, 2, 3, 5), "slices", 30, (8, 4)),
        ((8, 4), "mosaic", 1, (8, 4)),
        ((8, 4), "slices", 1, (8, 4)),
        ((8,), "vector", 1, (8,)),
    ],
)
def test_every_layout_has_its_shape(shape, layout, copies, sides, device):
    grid = lay_out(numbered(*shape).to(device), layout)
    assert (grid.copies, grid.shape) == (copies, sides)
    assert grid.values.device.type == device.type


@pytest.mark.parametrize("layout", [*MOVES, "vector"])
@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (8, 4, 5), (6, 2, 2, 3, 2), (8, 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_layouts_that_move_entries_lose_none(layout, shape, transposed):
    values = lay_out(numbered(*shape), layout, groups=2, transposed=transposed).values
    assert torch.equal(values.flatten().sort().values, numbered(*shape).flatten())


def test_rows_of_the_matrix_are_filters():
    W = numbered(8, 4, 3, 3)
    assert torch.equal(lay_out(W).values[0], W.flatten(1))


def test_tiles_of_the_mosaic_are_kernels():
    W = numbered(8, 4, 3, 2)
    mosaic = lay_out(W, "mosaic").values[0]
    for o in range(8):
        for i in range(4):
            assert torch.equal(mosaic[3 * o : 3 * o + 3, 2 * i : 2 * i + 2], W[o, i])


def test_slices_are_kernel_cells():
    W = numbered(8, 4, 3, 2)
    assert torch.equal(lay_out(W, "slices").values[5], W[:, :, 2, 1])


def test_norms_are_kernel_norms(generator):
    W = torch.randn(8, 4, 3, 3, generator=generator)
    expected = torch.stack([torch.stack([W[o, i].norm() for i in range(4)]) for o in range(8)])
    torch.testing.assert_close(lay_out(W, "norms").values[0], expected)


def test_layouts_of_kernels_of_one_cell_coincide(generator):
    W = torch.randn(8, 4, 1, 1, generator=generator)
    matrix = lay_out(W).values
    assert torch.equal(lay_out(W, "mosaic").values, matrix)
    assert torch.equal(lay_out(W, "slices").values, matrix)
    assert torch.equal(lay_out(W, "nd").values.reshape(1, 8, 4), matrix)
    assert torch.equal(lay_out(W, "norms").values, matrix.abs())


def test_a_linear_layer_is_its_own_matrix(generator):
    W = torch.randn(8, 4, generator=generator)
    for layout in MOVES:
        assert torch.equal(lay_out(W, layout).values[0], W)


def test_a_depthwise_convolution_has_a_row_per_channel():
    layer = nn.Conv2d(6, 6, 3, groups=6)
    assert lay_out(layer.weight, groups=layer.groups).shape == (6, 9)


def test_groups_are_stacked_on_the_rows():
    layer = nn.Conv2d(8, 12, 3, groups=4)
    assert lay_out(layer.weight, groups=layer.groups).shape == (12, 18)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_is_read_like_the_plain_one_it_undoes(groups, generator):
    """The forward pass decides: filter `o` of group `g` reads the input channels of group `g` alone."""
    layer = nn.ConvTranspose1d(4, 6, 1, groups=groups, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
        kernels = filters(layer.weight, groups=groups, transposed=True)
        x = torch.randn(2, 4, 5, generator=generator)
        expected = nn.functional.conv1d(x, kernels, groups=groups)
        torch.testing.assert_close(layer(x), expected)
    assert kernels.shape == (6, 4 // groups, 1)


def test_blocks_say_which_rows_and_columns_belong_to_a_unit():
    W = numbered(4, 3, 2, 5)
    for layout in ("matrix", "mosaic", "slices", "norms"):
        grid = lay_out(W, layout)
        assert (grid.shape[0] // grid.row_block, grid.shape[1] // grid.column_block) == (4, 3)
    matrix = lay_out(W)
    assert torch.equal(matrix.values[0, 2, 10:20], W[2, 1].flatten())


def test_sizes_end_where_the_shorter_side_of_units_is_covered():
    assert lay_out(numbered(64, 48)).sizes == (1, 2, 4, 8, 16, 32, 64)
    assert lay_out(numbered(20, 9, 3, 3), "nd").sizes == (1, 2, 4, 8, 16)
    assert lay_out(numbered(9), "vector").sizes == (1, 2, 4, 8, 16)


def test_a_grid_shows_its_shape():
    assert repr(lay_out(numbered(8, 4, 3, 3), "slices")) == "Grid('slices', 9 copies of 8 x 4)"
    assert repr(Grid(torch.zeros(1, 6, 4), groups=2)) == "Grid('matrix', 6 x 4, groups=2)"


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 4), {"layout": "tiles"}, f"layout must be one of {', '.join(LAYOUTS)}"),
        ((4,), {}, "at least two axes"),
        ((), {}, "must have entries on an axis"),
        ((0, 3), {}, "must have entries"),
        ((4, 4), {"groups": 3}, "groups must divide the 4"),
        ((4, 4), {"groups": 0}, "groups must divide the 4"),
    ],
)
def test_bad_arguments_are_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        lay_out(torch.zeros(shape), **options)
