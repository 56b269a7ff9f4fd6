"""Laws of the Perron-Frobenius side: Ulam's chain and kernel embeddings of orbits."""

import math
from itertools import pairwise

import pytest
import torch

from geomlib.sim.koopman import circle_embedding_norm, embedding_norm, ulam
from geomlib.sim.systems import orbit, rotation_tanh


def logistic(x):
    return 4 * x * (1 - x)


def circle_map(theta):
    return theta + 1 + 0.5 * torch.sin(theta)


def test_rows_are_probabilities_and_the_spectrum_is_in_the_disk():
    chain = ulam(logistic, 0.0, 1.0, cells=200)
    assert (chain.transition.sum(1) - 1).abs().max() < 1e-12
    assert (chain.transition >= 0).all()
    assert chain.eigenvalues().abs().max() <= 1 + 1e-10
    assert chain.escaped == 0


def test_koopman_and_perron_frobenius_are_dual(generator):
    chain = ulam(circle_map, 0.0, 2 * math.pi, cells=200, wrap=True)
    g = torch.rand(200, generator=generator, dtype=torch.float64)
    rho = torch.rand(200, generator=generator, dtype=torch.float64)
    rho = rho / rho.sum()
    assert abs((chain.transition @ g) @ rho - g @ (rho @ chain.transition)) < 1e-12


def test_invariant_measures_are_invariant():
    for chain in (ulam(logistic, 0.0, 1.0), ulam(circle_map, 0.0, 2 * math.pi, wrap=True)):
        assert (chain.measures @ chain.transition - chain.measures).abs().max() < 1e-12
        assert (chain.measures.sum(1) - 1).abs().max() < 1e-12


def test_logistic_density_is_the_arcsine_law():
    chain = ulam(logistic, 0.0, 1.0, cells=400)
    exact = (2 / math.pi) * torch.arcsin(chain.edges.clamp(0, 1).sqrt()).diff()
    # Ulam converges slowly at the two singular ends of the density: L1 0.057 at 400 cells.
    assert (chain.measures[0] - exact).abs().sum() < 0.1


def test_circle_map_density_is_the_histogram_of_its_orbit():
    chain = ulam(circle_map, 0.0, 2 * math.pi, cells=400, wrap=True)
    theta, angles = 0.1, []
    for _ in range(100_000):
        theta = (theta + 1 + 0.5 * math.sin(theta)) % (2 * math.pi)
        angles.append(theta)
    counts = torch.histc(torch.tensor(angles, dtype=torch.float64), 400, 0, 2 * math.pi)
    # a quarter of the samples of the reference run (L1 0.003), four times its noise at most
    assert (chain.measures[0] - counts / counts.sum()).abs().sum() < 0.02


def test_a_bistable_map_has_two_ergodic_measures_and_one_twice():
    chain = ulam(lambda x: torch.tanh(2 * x), -1.5, 1.5)
    assert chain.measures.shape == (2, 400)
    assert (chain.measures >= 0).all()
    assert (chain.measures[0] * chain.measures[1]).sum() == 0
    values = chain.eigenvalues()
    assert (values[:2] - 1).abs().max() < 1e-9
    assert values[2].abs() < 1 - 1e-6
    places = sorted((chain.measures @ chain.centres).tolist())
    attractor = 0.0
    for _ in range(100):
        attractor = math.tanh(2 * attractor) if attractor else 0.5
    assert places == pytest.approx([-attractor, attractor], abs=3 / 400)  # one cell


def test_a_contraction_has_a_dirac_measure_at_its_fixed_point():
    chain = ulam(lambda x: torch.tanh(0.8 * x + 0.3), -1.0, 1.0)
    heaviest = chain.measures[0].argmax()
    assert len(chain.measures) == 1
    assert chain.measures[0].max() > 0.99
    root = 0.0
    for _ in range(200):
        root = math.tanh(0.8 * root + 0.3)
    assert abs(chain.centres[heaviest] - root) < 2 / 400  # one cell


def test_mass_that_leaves_is_reported():
    chain = ulam(lambda x: 2 * x, 0.0, 1.0, cells=10, samples=50)
    assert abs(chain.escaped - 0.5) < 0.02
    assert (chain.transition.sum(1) - 1).abs().max() < 1e-12


def test_circle_formula_is_the_quadrature():
    angle = torch.arange(4096, dtype=torch.float64) * (2 * math.pi / 4096)
    for radius, bandwidth in ((1.0, 0.5), (2.0, 1.0), (0.3, 1.0), (5.0, 0.5)):
        quadrature = torch.exp(-(radius**2 / bandwidth**2) * (1 - angle.cos())).mean()
        assert abs(circle_embedding_norm(radius, bandwidth) - quadrature) < 1e-12


def test_embedding_of_a_circle_is_the_formula(generator):
    angle = torch.arange(500, dtype=torch.float64) * (2 * math.pi / 500)
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    exact = circle_embedding_norm(1.0, 0.5)
    assert abs(embedding_norm(circle, 0.5) - exact) < 1e-12
    # 2048 frequencies: the standard error of their mean is near 0.01
    assert abs(embedding_norm(circle, 0.5, features=4096, generator=generator) - exact) < 0.02


def test_a_contraction_has_norm_one(generator):
    path = orbit(lambda z: torch.tanh(0.5 * z + 0.3), torch.randn(3, generator=generator), 300)[200:]
    assert abs(embedding_norm(path, 1.0) - 1) < 1e-6
    assert abs(embedding_norm(path, 1.0, features=256, generator=generator) - 1) < 1e-6


def test_the_norm_is_an_order_parameter_of_the_bifurcation():
    start = torch.tensor([0.3, 0.1], dtype=torch.float64)
    expected = {0.8: 1.0, 0.95: 1.0, 1.02: 0.927, 1.05: 0.839, 1.1: 0.734, 1.2: 0.608, 1.4: 0.495}
    norms = [
        embedding_norm(orbit(lambda z, g=gain: rotation_tanh(z, g), start, 3000)[2000:], 1.0)
        for gain in expected
    ]
    assert norms == pytest.approx(list(expected.values()), abs=0.03)
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(norms))


def test_same_seed_same_features(generator):
    path = torch.randn(50, 2, generator=generator)
    draws = [
        embedding_norm(path, 1.0, features=64, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_bad_input_raises():
    with pytest.raises(ValueError, match="low must be below high"):
        ulam(logistic, 1.0, 0.0)
    with pytest.raises(ValueError, match="cells must be at least 2"):
        ulam(logistic, 0.0, 1.0, cells=1)
    with pytest.raises(ValueError, match="samples must be at least 50"):
        ulam(logistic, 0.0, 1.0, samples=10)
    with pytest.raises(ValueError, match="f must be finite"):
        ulam(lambda x: x / 0, 0.0, 1.0)
    with pytest.raises(ValueError, match="bandwidth must be positive"):
        embedding_norm(torch.ones(3, 2), 0.0)
    with pytest.raises(ValueError, match="at least one step"):
        embedding_norm(torch.ones(0, 2), 1.0)
    with pytest.raises(ValueError, match="orbit must be finite"):
        embedding_norm(torch.full((3, 2), math.inf), 1.0)
    with pytest.raises(ValueError, match="radius must be >= 0"):
        circle_embedding_norm(-1.0, 1.0)
