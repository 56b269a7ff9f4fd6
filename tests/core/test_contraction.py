"""Contractive layers: the bound is a bound, before and after training, on the operator that is applied."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from geomlib.core import (
    ContractiveConv1d,
    ContractiveConv2d,
    ContractiveLinear,
    lipschitz_estimate,
    operator_norm_bound,
    solve,
)
from geomlib.testing import assert_contraction, assert_gradients

KAPPA = 0.9


@torch.no_grad()
def materialise(layer, *shape):
    """Return the matrix of the operator that a layer applies before its bias, in float64."""
    weight = layer.weight.double()
    basis = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).view(-1, *shape)
    if weight.dim() == 2:
        return F.linear(basis, weight).T
    reach, axes = weight.shape[-1] // 2, weight.dim() - 2
    convolve = F.conv1d if axes == 1 else F.conv2d
    if layer.padding == "circular":
        return convolve(F.pad(basis, [reach] * (2 * axes), mode="circular"), weight).flatten(1).T
    return convolve(basis, weight, padding=reach).flatten(1).T


def push(layer, x, steps=30):
    """Train against the constraint: make the output as large as possible."""
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        (-layer(x).square().mean()).backward()
        optimiser.step()


CASES = [
    ("linear", lambda g, **k: ContractiveLinear(7, 5, kappa=KAPPA, generator=g, **k), (7,)),
    ("square", lambda g, **k: ContractiveLinear(24, 24, kappa=KAPPA, generator=g, **k), (24,)),
    ("sequence", lambda g, **k: ContractiveConv1d(3, 4, 5, kappa=KAPPA, generator=g, **k), (3, 11)),
    (
        "ring",
        lambda g, **k: ContractiveConv1d(4, 3, 3, kappa=KAPPA, padding="circular", generator=g, **k),
        (4, 10),
    ),
    ("image", lambda g, **k: ContractiveConv2d(2, 3, 3, kappa=KAPPA, generator=g, **k), (2, 6, 5)),
    (
        "torus",
        lambda g, **k: ContractiveConv2d(3, 3, 3, kappa=KAPPA, padding="circular", generator=g, **k),
        (3, 6, 7),
    ),
]
each_layer = pytest.mark.parametrize(
    ("make", "shape"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_certificate_bounds_the_operator_before_and_after_training(make, shape, dtype, generator):
    layer = make(generator, dtype=dtype)
    x = torch.randn(16, *shape, generator=generator, dtype=dtype)
    for _ in range(2):
        exact = torch.linalg.matrix_norm(materialise(layer, *shape), 2).item()
        certificate = layer.certificate()
        assert exact <= certificate * (1 + 1e-14)  # the last place of the singular value itself
        assert certificate <= KAPPA
        push(layer, x)
    assert exact > 0.75 * KAPPA, "training leaned on the constraint"


@each_layer
def test_training_ends_near_the_bound_and_not_far_below(make, shape, generator):
    """The bound costs little room: 4 % for these matrices, 4 % for the grid, the rest is the finite image."""
    layer = make(generator, dtype=torch.float64)
    push(layer, torch.randn(16, *shape, generator=generator, dtype=torch.float64), steps=100)
    assert torch.linalg.matrix_norm(materialise(layer, *shape), 2).item() > 0.8 * KAPPA


@each_layer
def test_layers_contract(make, shape, generator):
    layer = make(generator, dtype=torch.float64)
    assert_contraction(layer, KAPPA, torch.randn(4, *shape, dtype=torch.float64), generator=generator)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e18]),
    rank_one=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_bound_of_any_matrix_is_a_bound_and_close(rows, columns, scale, rank_one, seed):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator)
    W = scale * (torch.outer(W[:, 0], W[0]) if rank_one else W)
    exact = torch.linalg.matrix_norm(W.double(), 2).item()
    bound = operator_norm_bound(W).double().item()
    # At most rank^(1/2^7) too large, 1.8 % for rank 9, and the rounding terms of float32.
    assert exact <= bound <= 1.02 * exact


@settings(max_examples=20, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    taps=st.sampled_from([(1,), (2,), (3,), (5,), (1, 1), (3, 3), (2, 3), (5, 5)]),
    seed=st.integers(0, 1000),
)
def test_the_bound_of_any_kernel_holds_at_every_frequency(channels, taps, seed):
    """Frequencies between the points of the grid are the ones that a bound on the grid alone would miss."""
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(*channels, *taps, generator=generator, dtype=torch.float64)
    fine = torch.fft.fftn(kernel, s=[101] * len(taps), dim=list(range(2, 2 + len(taps))))
    exact = torch.linalg.matrix_norm(fine.flatten(2).permute(2, 0, 1), 2).max().item()
    bound = operator_norm_bound(kernel).item()
    assert exact <= bound
    assert bound <= 1.08 * exact  # 1 / cos(pi / 16) per axis, rank^(1/2^7), and the fine grid's own gap


def test_a_bound_on_the_grid_alone_would_be_none():
    """A symbol that peaks half-way between two points: what the gain from grid to continuum is for."""
    points = 32
    c = math.cos(math.pi / 2 + math.pi / points)
    # 0.4 + 8 c cos(w) - 2 cos(2 w) = const - 4 (cos(w) - c)^2
    kernel = torch.tensor([[[-1.0, 4 * c, 0.4, 4 * c, -1.0]]], dtype=torch.float64)
    grid, fine = (torch.fft.fft(kernel, n=n).abs().max() for n in (points, 64 * points))
    assert grid < 0.99 * fine
    assert operator_norm_bound(kernel) >= fine


def test_spectral_norm_of_torch_is_no_certificate():
    """Its power iteration approaches the norm from below, so the layer it makes may expand; ours does not."""
    torch.manual_seed(0)
    theirs = spectral_norm(nn.Linear(64, 64)).double()
    x = torch.randn(32, 64, dtype=torch.float64)
    optimiser = torch.optim.Adam(theirs.parameters(), lr=0.01)
    for _ in range(20):
        optimiser.zero_grad()
        (-theirs(x).square().mean()).backward()
        optimiser.step()
    theirs.eval()
    assert torch.linalg.matrix_norm(theirs.weight, 2).item() > 1.0005, "promised: at most 1"


def test_the_reshaped_kernel_says_nothing_about_the_operator():
    kernel = torch.ones(1, 1, 3, 3)
    reshaped = torch.linalg.matrix_norm(kernel.flatten(1), 2)
    assert reshaped.item() == pytest.approx(3.0)
    assert operator_norm_bound(kernel) >= 9.0  # what it does to a constant image


def test_the_bound_is_differentiable(generator):
    assert_gradients(operator_norm_bound, torch.randn(3, 4, generator=generator), second_order=False)
    assert_gradients(operator_norm_bound, torch.randn(2, 2, 3, generator=generator), second_order=False)


def test_a_weight_that_contracts_already_is_left_alone(generator):
    layer = ContractiveLinear(6, 6, generator=generator)
    with torch.no_grad():
        layer.raw_weight.mul_(0.1)
    assert torch.equal(layer.weight, layer.raw_weight)


def test_the_same_generator_gives_the_same_layer():
    first, second = (ContractiveConv2d(2, 2, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_layer_inside_a_solve_has_a_certified_error(device, generator):
    layer = ContractiveLinear(8, 8, generator=generator, device=device)
    u = torch.randn(4, 8, generator=generator).to(device)

    def f(z, u, W, b):
        return torch.tanh(F.linear(z, W, b) + u)

    solution = solve(f, torch.zeros_like(u), u, layer.weight, layer.bias, contraction_factor=KAPPA, tol=1e-4)
    assert (solution.bound <= 1e-4).all().item()
    solution.value.square().sum().backward()
    assert layer.raw_weight.grad.device.type == device.type
    assert torch.isfinite(layer.raw_weight.grad).all().item()


@each_layer
def test_shapes_work_out_on_meta(make, shape):
    layer = make(None, device="meta")
    x = torch.zeros(2, *shape, device="meta", requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    assert layer.raw_weight.grad.is_meta


@each_layer
def test_state_dict_and_repr(make, shape, generator):
    layer, other = make(generator), make(None)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer.weight, other.weight)
    assert f"kappa={KAPPA}" in repr(layer)


def test_half_precision_weights_are_certified_as_they_are_stored(generator):
    layer = ContractiveLinear(32, 32, dtype=torch.bfloat16, generator=generator)
    with torch.no_grad():
        layer.raw_weight.mul_(10)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.linalg.matrix_norm(layer.weight.double(), 2).item() <= layer.certificate() <= KAPPA


def test_the_lipschitz_estimate_finds_the_norm_from_below(generator):
    W = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    x = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    exact = torch.stack([torch.linalg.matrix_norm((1 - torch.tanh(W @ s) ** 2)[:, None] * W, 2) for s in x])
    few, many = (
        lipschitz_estimate(
            lambda s: torch.tanh(s @ W.T), x, steps=steps, generator=torch.Generator().manual_seed(0)
        )
        for steps in (2, 400)
    )
    assert (few <= exact * (1 + 1e-12)).all()
    torch.testing.assert_close(many, exact, rtol=1e-6, atol=0)


def test_the_lipschitz_estimate_of_an_image_layer_is_below_its_certificate(generator):
    layer = ContractiveConv2d(2, 2, generator=generator)
    estimate = lipschitz_estimate(layer, torch.zeros(2, 2, 6, 6), generator=generator)
    assert (estimate <= layer.certificate()).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ContractiveLinear(3, 3, kappa=1.3), r"kappa must lie in \(0, 1\), got 1.3"),
        (lambda: ContractiveLinear(0, 3), "in_features must be at least 1, got 0"),
        (lambda: ContractiveConv1d(2, 2, 4), "kernel_size must be odd, got 4"),
        (
            lambda: ContractiveConv2d(2, 2, padding="reflect"),
            "padding must be 'zeros' or 'circular', got 'reflect'",
        ),
        (lambda: operator_norm_bound(torch.zeros(3)), "floating matrix or a kernel"),
        (lambda: operator_norm_bound(torch.ones(2, 2, dtype=torch.int64)), "floating matrix or a kernel"),
        (lambda: operator_norm_bound(torch.ones(2, 2), iterations=0), "iterations must be at least 1"),
        (lambda: lipschitz_estimate(torch.cos, torch.ones(1, 1), steps=0), "steps must be at least 1"),
        (lambda: lipschitz_estimate(torch.cos, torch.ones(0, 1)), "floating and not empty"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
