"""Layer reports: against the null, over every kind of tensor, and with a status where there is no number."""

import math
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from geomlib.weightspace import box_counts, fit_dimension, null_counts, slopes
from geomlib.weightspace.layers import layer_dimension, model_report, weight_tensors
from geomlib.weightspace.layouts import lay_out
from geomlib.weightspace.shapes import carpet, gasket
from geomlib.weightspace.thresholds import occupied_set


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# The null -------------------------------------------------------------------------------------------------

# Shapes of ResNet-18 and VGG-16, and the slope over all dyadic scales that chance gives them.
TABLE = [
    ((64, 3, 3, 3), 1.790, 1.325),
    ((64, 64, 3, 3), 1.886, 1.524),
    ((128, 64, 3, 3), 1.898, 1.608),
    ((128, 128, 3, 3), 1.911, 1.621),
    ((128, 64, 1, 1), 1.886, 1.524),
    ((256, 128, 3, 3), 1.919, 1.682),
    ((256, 256, 3, 3), 1.929, 1.692),
    ((512, 256, 3, 3), 1.933, 1.736),
    ((512, 512, 3, 3), 1.942, 1.744),
    ((10, 512), 1.587, 0.992),
]


@pytest.mark.parametrize(("shape", "half", "tenth"), TABLE)
def test_the_null_of_every_layer_shape_is_the_tabulated_one(shape, half, tenth):
    W = normal(*shape)
    assert layer_dimension(W, threshold=("quantile", 0.5)).null == pytest.approx(half, abs=6e-4)
    # An interpolated quantile takes one of 1728 entries more in the smallest layer: 1.3246, not 1.3227.
    assert layer_dimension(W).null == pytest.approx(tenth, abs=6e-4 if W.numel() > 2000 else 2.5e-3)


@pytest.mark.parametrize("shape", [shape for shape, _, _ in TABLE])
@pytest.mark.parametrize("q", [0.5, 0.9])
def test_random_weights_have_the_dimension_of_the_null(shape, q):
    report = layer_dimension(normal(*shape), threshold=("quantile", q))
    if min(report.grid) >= 64 and shape[1] > 3:
        assert abs(report.delta) <= 0.01
        assert report.fit.r2 > 0.92
    # The smallest shapes scatter more: five standard deviations of permuted copies.
    options = {"null": "permutation", "permutations": 10}
    scatter = layer_dimension(normal(*shape), threshold=("quantile", q), **options).null_sd
    assert abs(report.delta) <= max(0.003, 5 * scatter)


def resnet18():
    """Shapes of ResNet-18: stem, four stages of two blocks, classifier."""
    layers, inside = {"conv1": nn.Conv2d(3, 64, 7, bias=False)}, 64
    for stage, width in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            layers[f"layer{stage}_{block}_conv1"] = nn.Conv2d(inside, width, 3, bias=False)
            layers[f"layer{stage}_{block}_bn1"] = nn.BatchNorm2d(width)
            layers[f"layer{stage}_{block}_conv2"] = nn.Conv2d(width, width, 3, bias=False)
            if inside != width:
                layers[f"layer{stage}_{block}_downsample"] = nn.Conv2d(inside, width, 1, bias=False)
            inside = width
    return nn.ModuleDict(layers | {"fc": nn.Linear(512, 10)})


def vgg16():
    """Shapes of the convolutions of VGG-16 and the classifier of its CIFAR form."""
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    return nn.ModuleList([*(nn.Conv2d(a, b, 3) for a, b in pairwise(widths)), nn.Linear(512, 10)])


@pytest.mark.parametrize(("make", "tensors"), [(resnet18, 21), (vgg16, 14)])
def test_freshly_drawn_networks_lie_on_the_null_line(make, tensors):
    reports = model_report(make())
    assert len(reports) == tensors
    wide = [report for report in reports if min(report.grid) >= 64]
    assert len(wide) >= tensors - 2
    for report in wide:
        assert report.status == "ok"
        assert abs(report.delta) <= 0.01, report


@pytest.mark.parametrize("shape", [(16, 16), (64, 27), (10, 512), (64, 576), (128, 1152)])
@pytest.mark.parametrize("q", [0.5, 0.9, 0.97])
def test_the_closed_form_is_the_mean_of_permuted_copies(shape, q):
    W, options = normal(*shape), {"threshold": ("quantile", q)}
    closed = layer_dimension(W, **options)
    drawn = layer_dimension(W, null="permutation", permutations=100, **options)
    # Four standard errors of the mean, and the gap between the slope of a mean and the mean of slopes.
    assert abs(drawn.null - closed.null) < 4 * drawn.null_sd / 10 + 0.001


def test_the_permutation_null_brings_a_scatter():
    W = normal(128, 64, 3, 3)
    closed, drawn = (layer_dimension(W, null=null) for null in ("closed_form", "permutation"))
    assert closed.D == drawn.D
    assert 0 < drawn.p <= 1
    assert math.isnan(closed.p)
    assert drawn.z == pytest.approx(drawn.delta / drawn.null_sd)
    assert math.isnan(closed.z)
    assert math.isnan(layer_dimension(W, null=None).null)


def test_the_interval_of_the_fit_is_not_a_sampling_error():
    report = layer_dimension(normal(256, 512), null="permutation")
    assert (report.fit.ci[1] - report.D) / report.null_sd > 100


def test_the_report_is_its_slow_reference():
    W = normal(48, 20, 3, 3)
    size = W.abs().flatten(1)
    tau = size.flatten().sort().values[math.ceil(0.9 * W.numel()) - 1]
    mask = size > tau
    sizes = [1, 2, 4, 8, 16, 32, 64]
    counts = [
        sum(bool(mask[i : i + r, j : j + r].any()) for i in range(0, 48, r) for j in range(0, 180, r))
        for r in sizes
    ]
    report = layer_dimension(W, name="conv")
    assert report.fit.counts == tuple(counts)
    assert pytest.approx(fit_dimension(sizes, counts, window="full").D, abs=1e-12) == report.D
    expected = slopes(sizes, null_counts((48, 180), int(mask.sum()), sizes))
    assert report.null == pytest.approx(float(expected), abs=1e-12)
    assert report.tau == pytest.approx(float(tau))
    assert report.density == pytest.approx(mask.double().mean().item())


def test_counts_of_slices_add_up_before_the_fit():
    W = normal(64, 32, 3, 3)
    mask = occupied_set(W).mask
    total = sum(box_counts(mask[:, :, i, j].contiguous()).counts for i in range(3) for j in range(3))
    report = layer_dimension(W, layout="slices")
    assert report.fit.counts == pytest.approx((total / 9).tolist())
    assert abs(report.delta) < 0.01


@pytest.mark.parametrize(
    ("layout", "tenth", "thirtieth"),
    [("matrix", 1.621, 1.341), ("mosaic", 1.664, 1.464), ("slices", 1.621, 1.341), ("norms", 1.622, 1.343)],
)
def test_the_layout_changes_the_dimension(layout, tenth, thirtieth):
    W = normal(128, 128, 3, 3)
    for q, target in ((0.9, tenth), (0.97, thirtieth)):
        report = layer_dimension(W, layout=layout, threshold=("quantile", q))
        # The targets are one draw each; norms are compared on a ninth of the cells.
        assert pytest.approx(target, abs=0.006) == report.D
        assert report.null == pytest.approx(target, abs=0.006)


def test_the_nd_layout_covers_kernels_before_units():
    W = normal(32, 16, 3, 3)
    mask = occupied_set(W).mask
    report = layer_dimension(W, layout="nd")
    expected = []
    for r in (1, 2, 4, 8, 16):
        s = min(r, 3)
        blocks = [
            mask[o : o + r, i : i + r, a : a + s, b : b + s].any()
            for o in range(0, 32, r)
            for i in range(0, 16, r)
            for a in range(0, 3, s)
            for b in range(0, 3, s)
        ]
        expected.append(int(sum(blocks)))
    assert report.fit.counts == tuple(expected)
    assert abs(report.delta) < 0.02


def test_a_fractal_in_the_weights_is_found():
    W = carpet(5) * (1 + normal(243, 243).abs())
    report = layer_dimension(W, threshold="nonzero", null="permutation")
    assert report.delta < -0.02
    assert abs(report.z) > 20


# Invariance, dtypes, ties ---------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [4.0, -1.0, 2.0**-20])
def test_multiples_change_nothing_but_the_threshold(c):
    W = normal(64, 96)
    mine, theirs = layer_dimension(W).as_dict(), layer_dimension(c * W).as_dict()
    assert theirs.pop("tau") == abs(c) * mine.pop("tau")
    assert str(mine) == str(theirs)  # NaN equals itself in words only


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int8])
def test_what_is_upcast_exactly_has_the_same_set(dtype):
    low = (20 * normal(64, 96)).to(dtype)
    high = low.double()
    for threshold in (("quantile", 0.9), ("std", 2.0), ("abs", 15.0), "nonzero"):
        mine, theirs = occupied_set(low, threshold), occupied_set(high, threshold)
        assert torch.equal(mine.mask, theirs.mask)
        assert mine.density == theirs.density
    assert layer_dimension(low).fit.counts == layer_dimension(high).fit.counts


def test_thresholds_are_what_they_say():
    W = normal(50, 40) + 0.5
    assert torch.equal(occupied_set(W, ("abs", 1.0)).mask, W.abs() > 1)
    assert torch.equal(occupied_set(W, ("std", 1.5)).mask, W.abs() > 1.5 * W.double().std(correction=0))
    assert torch.equal(occupied_set(W, "nonzero").mask, W != 0)
    for q in (0.0, 0.5, 0.9, 0.999):
        found = occupied_set(W, ("quantile", q))
        assert found.cells == 2000 - max(1, math.ceil(2000 * q - 1e-9))
        assert found.density == found.cells / 2000


def test_ties_lower_the_density_that_is_reported():
    W = torch.tensor([0, 1, 2, 3]).repeat(16, 16)
    found = occupied_set(W, ("quantile", 0.8))
    assert (found.tau, found.density) == (3.0, 0.0)
    assert layer_dimension(W, threshold=("quantile", 0.8)).status == "empty"
    assert occupied_set(W, ("quantile", 0.6)).density == 0.25


def test_ties_are_broken_at_random_only(generator):
    W = torch.ones(40, 50)
    draws = torch.stack(
        [occupied_set(W, ties="random", generator=generator).mask for _ in range(2000)]
    ).double()
    assert (draws.sum((1, 2)) == 200).all()
    # 2000 cells at once: five and a half standard deviations of a binomial.
    assert (draws.mean(0) - 0.1).abs().max() < 5.5 * math.sqrt(0.09 / 2000)


def test_quantiles_have_no_largest_size():
    W = torch.arange(2**24 + 2**22, dtype=torch.float32).reshape(5 * 2**11, 2**11)
    found = occupied_set(W)
    # Above 2^24 float32 holds every second integer only, so one tie may be lost.
    assert abs(found.cells - 0.1 * W.numel()) <= 2


def test_complex_boolean_sparse_and_quantized_tensors_are_read():
    W = normal(32, 32)

    def counts(tensor):
        return layer_dimension(tensor, threshold=("abs", 1.0)).fit.counts

    assert counts(torch.complex(W, W)) == counts(torch.complex(W, W).abs())
    assert layer_dimension(W > 1, threshold="nonzero").fit.counts == counts(W * (W > 1))
    assert counts((W * (W > 1)).to_sparse()) == counts(W * (W > 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        coarse = torch.quantize_per_tensor(W, 0.1, 0, torch.qint8)
    assert counts(coarse) == counts(coarse.dequantize())
    assert layer_dimension(coarse).density <= 0.1


def test_views_and_gradients_do_not_matter():
    W = nn.Parameter(normal(96, 64))
    assert layer_dimension(W.T).fit.counts == layer_dimension(W.detach().T.contiguous()).fit.counts


def test_devices_agree(device):
    W = normal(48, 16, 3, 3)
    for options in ({}, {"layout": "slices"}, {"layout": "norms"}, {"threshold": ("std", 2.0)}):
        mine, theirs = layer_dimension(W, **options), layer_dimension(W.to(device), **options)
        assert mine.fit == theirs.fit
        assert mine.null == theirs.null


# What cannot be estimated ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("W", "options", "status", "D"),
    [
        (torch.ones(64, 64), {}, "empty", None),
        (torch.zeros(64, 64), {}, "empty", None),
        (torch.zeros(64, 64), {"threshold": "nonzero"}, "empty", None),
        (normal(64, 64), {"threshold": ("abs", 100.0)}, "empty", None),
        (normal(64, 64), {"threshold": "nonzero"}, "space_filling", 2.0),
        (normal(37, 53), {"threshold": "nonzero"}, "space_filling", 2.0),
        (normal(64, 27), {"window": "inner"}, "insufficient_scales", None),
        (normal(10, 512), {"window": "inner"}, "insufficient_scales", None),
        (normal(7, 512), {}, "insufficient_scales", None),
        (normal(512, 3, 3, 3), {"layout": "slices"}, "insufficient_scales", None),
        (normal(64, 1, 3, 3), {"layout": "norms"}, "insufficient_scales", None),
        (normal(64, 64), {"window": (4, 16)}, "insufficient_scales", None),
        (normal(512, 512), {"window": "plateau"}, "no_scaling", None),
        (gasket(8).float(), {"threshold": "nonzero", "window": "plateau"}, "ok", math.log2(3)),
        (normal(7), {"layout": "vector", "threshold": ("quantile", 0.5)}, "insufficient_scales", None),
    ],
)
@pytest.mark.parametrize("null", ["closed_form", "permutation", None])
def test_statuses(W, options, status, D, null):
    report = layer_dimension(W, null=null, permutations=3, **options)
    assert report.status == status
    assert pytest.approx(D, abs=1e-6) == report.D if D else math.isnan(report.D)
    if status == "space_filling" and null:
        assert report.delta == pytest.approx(0, abs=1e-12)
    assert isinstance(repr(report), str)


def test_a_vector_is_counted_in_intervals():
    W = normal(4096)
    report = layer_dimension(W, layout="vector")
    assert report.grid == (4096,)
    assert 0 < report.D < 1
    assert abs(report.delta) < 0.01


def test_pruned_weights_keep_their_own_density():
    W = normal(64, 64)
    W[W.abs() < W.abs().quantile(0.95)] = 0
    report = layer_dimension(W)
    assert report.tau == 0
    assert report.density == pytest.approx(0.05, abs=1e-3)
    assert abs(report.delta) < 0.02


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_entries_that_are_no_numbers_are_refused_by_name(bad):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with torch.no_grad():
        model[1].weight[:2, 3] = bad
    with pytest.raises(ValueError, match=r"1\.weight must be finite, got 2 NaN or infinite entries of 1024"):
        model_report(model)


def test_entries_that_are_no_numbers_are_left_out_if_asked():
    W = normal(64, 64)
    spoiled = W.clone()
    spoiled[:3, 0], spoiled[5, 5] = math.nan, -math.inf
    report = layer_dimension(spoiled, nan_policy="omit")
    assert report.omitted == 4
    kept = W[torch.isfinite(spoiled)]
    tau = kept.abs().sort().values[math.ceil(0.9 * kept.numel()) - 1]
    expected = (W.abs() > tau) & torch.isfinite(spoiled)
    assert report.fit.counts == tuple(box_counts(expected).counts.double().tolist())
    every = layer_dimension(torch.full((16, 16), math.nan), nan_policy="omit")
    assert (every.status, every.omitted) == ("empty", 256)


def test_large_finite_entries_are_not_taken_for_infinite():
    W = torch.full((16, 16), 3e38)
    W[::2] = 1e38
    assert occupied_set(W, ("quantile", 0.4)).cells == 128


@pytest.mark.parametrize(
    ("W", "options", "message"),
    [
        (
            torch.ones(8, 8, device="meta"),
            {"name": "fc.weight"},
            "fc.weight must hold numbers, got a tensor on the meta device",
        ),
        (torch.ones(()), {}, "W must have entries on an axis, got shape"),
        (torch.ones(0, 4), {}, "W must not be empty"),
        (torch.ones(8), {}, "at least two axes"),
        (torch.ones(8, 8), {"threshold": "median"}, "threshold must be"),
        (torch.ones(8, 8), {"threshold": 0.9}, "threshold must be"),
        (torch.ones(8, 8), {"threshold": ("top", 0.1)}, "threshold must be"),
        (torch.ones(8, 8), {"threshold": ("quantile", 1.0)}, r"'quantile' must lie in \[0, 1\), got 1.0"),
        (torch.ones(8, 8), {"threshold": ("abs", -1.0)}, "'abs' must lie in"),
        (torch.ones(8, 8), {"threshold": ("std", math.nan)}, "'std' must lie in"),
        (torch.ones(8, 8), {"nan_policy": "ignore"}, "nan_policy must be raise or omit"),
        (torch.ones(8, 8), {"ties": "first"}, "ties must be strict or random"),
        (torch.ones(8, 8), {"null": "poisson"}, "null must be closed_form"),
        (torch.ones(8, 8), {"null": "permutation", "permutations": 1}, "permutations must be at least 2"),
        (torch.ones(8, 8), {"window": "outer"}, "window must be"),
    ],
)
def test_bad_arguments_are_refused(W, options, message):
    with pytest.raises(ValueError, match=message):
        layer_dimension(W, **options)


# Networks -------------------------------------------------------------------------------------------------


def names(model):
    return [tensor.name for tensor in weight_tensors(model)]


def test_every_kind_of_layer_is_listed_with_its_geometry():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(8, 9),
            "norm": nn.LayerNorm(9),
            "conv": nn.Conv1d(4, 6, 3, groups=2),
            "up": nn.ConvTranspose2d(4, 6, 3, groups=2),
            "embedding": nn.Embedding(11, 5),
            "attention": nn.MultiheadAttention(8, 2, kdim=4, vdim=4),
            "rnn": nn.LSTM(4, 5),
        }
    )
    found = {tensor.name: tensor for tensor in weight_tensors(model)}
    assert list(found) == [
        "linear.weight",
        "conv.weight",
        "up.weight",
        "embedding.weight",
        "attention.q_proj_weight",
        "attention.k_proj_weight",
        "attention.v_proj_weight",
        "attention.out_proj.weight",
        "rnn.weight_ih_l0",
        "rnn.weight_hh_l0",
    ]
    assert (found["conv.weight"].groups, found["conv.weight"].transposed) == (2, False)
    assert (found["up.weight"].groups, found["up.weight"].transposed) == (2, True)
    assert [report.grid for report in model_report(model)][:3] == [(9, 8), (6, 6), (6, 18)]


def test_vectors_are_reported_on_request():
    model = nn.Sequential(nn.Conv2d(4, 16, 3, groups=2), nn.BatchNorm2d(16), nn.Linear(16, 300))
    found = {report.name: report for report in model_report(model, vectors=True, layout="mosaic")}
    assert list(found) == ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]
    assert (found["2.bias"].layout, found["2.bias"].grid) == ("vector", (300,))
    assert (found["0.weight"].layout, found["0.weight"].grid) == ("mosaic", (48, 6))
    assert 0 < found["2.bias"].D < 1


def test_projections_of_attention_come_one_by_one():
    model = nn.MultiheadAttention(16, 2)
    parts = {tensor.name: tensor.values for tensor in weight_tensors(model)}
    assert list(parts) == ["in_proj_weight.q", "in_proj_weight.k", "in_proj_weight.v", "out_proj.weight"]
    assert torch.equal(parts["in_proj_weight.k"], model.in_proj_weight[16:32])


def test_tied_weights_come_once():
    model = nn.ModuleDict({"embed": nn.Embedding(32, 16), "head": nn.Linear(16, 32, bias=False)})
    model["head"].weight = model["embed"].weight
    assert names(model) == ["embed.weight"]


def test_prefixes_of_wrappers_are_dropped():
    model = nn.Sequential(nn.Linear(8, 8))
    assert names(nn.DataParallel(model)) == ["0.weight"]
    assert names(nn.ModuleDict({"_orig_mod": model})) == ["0.weight"]  # what torch.compile wraps around
    assert names(nn.ModuleDict({"module": nn.Linear(8, 8)})) == ["weight"]


@pytest.mark.parametrize("training", [True, False])
def test_parametrised_weights_are_the_effective_ones(training):
    layers = {
        "weight": parametrizations.weight_norm(nn.Linear(16, 8)),
        "spectral": parametrizations.spectral_norm(nn.Linear(16, 8)),
        "orthogonal": parametrizations.orthogonal(nn.Linear(8, 8)),
    }
    model = nn.ModuleDict(layers).train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = {tensor.name: tensor.values for tensor in weight_tensors(model)}
    assert list(found) == ["weight.weight", "spectral.weight", "orthogonal.weight"]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for name, layer in layers.items():
        layer.eval()
        assert torch.equal(found[f"{name}.weight"], layer.weight)
    assert torch.linalg.matrix_norm(found["orthogonal.weight"], 2) == pytest.approx(1)


def test_pruned_and_old_style_normed_weights_are_fresh():
    """Both are recomputed by a call only; the report must not lag behind a step of the optimiser."""
    pruned = nn.Linear(16, 8)
    prune.l1_unstructured(pruned, "weight", amount=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        normed = nn.utils.weight_norm(nn.Linear(16, 8))
    with torch.no_grad():
        pruned.weight_orig += 1
        normed.weight_g *= 2
    model = nn.ModuleDict({"pruned": pruned, "normed": normed})
    found = {tensor.name: tensor.values for tensor in weight_tensors(model)}
    assert list(found) == ["pruned.weight", "normed.weight"]
    assert torch.equal(found["pruned.weight"], pruned.weight_orig * pruned.weight_mask)
    torch.testing.assert_close(found["normed.weight"].norm(dim=1, keepdim=True), normed.weight_g.detach())


def test_quantized_layers_unpack_their_weights():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = pytest.importorskip("torch.ao.quantization")
        model = quantized.quantize_dynamic(nn.Sequential(nn.Linear(32, 32)), {nn.Linear}, torch.qint8)
        reports = model_report(model)
    assert [report.name for report in reports] == ["0.weight"]
    assert reports[0].density <= 0.1


def test_a_report_is_a_row_of_a_table():
    report = model_report(nn.Sequential(nn.Conv2d(16, 32, 3)))[0]
    row = report.as_dict()
    assert {"name", "shape", "layout", "D", "null", "delta", "z", "density", "status", "r2", "scales"} <= set(
        row
    )
    assert all(isinstance(v, (str, int, float, tuple)) for v in row.values())
    assert repr(report).startswith("LayerReport(0.weight: matrix 32 x 144, D 1.")


def test_options_reach_every_layer():
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Linear(32, 16))
    for report in model_report(model, layout="norms", threshold=("quantile", 0.8), window="inner"):
        assert report.layout == "norms"
        assert report.density == pytest.approx(0.2, abs=0.01)
    with pytest.raises(TypeError):
        model_report(model, lay_out="norms")


def test_meta_models_are_refused_by_name():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"0\.weight must hold numbers"):
        model_report(model)


def test_grids_of_masks_keep_their_layout():
    grid = lay_out(normal(8, 4, 3, 3), "mosaic")
    mask = grid.like(grid.values > 0)
    assert (mask.layout, mask.row_block, mask.column_block) == ("mosaic", 3, 3)
