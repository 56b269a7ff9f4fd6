"""Laws of the deep equilibrium models: honest solves, exact gradients, flat memory, local spectrum."""

import math
import warnings

import pytest
import torch

from geomlib.core.fixed_point import Anderson, ConvergenceError, ConvergenceWarning, OneStep, Picard, solve
from geomlib.sim.deq import DEQ, ConvDEQ, jacobian_penalty, stability
from geomlib.sim.koopman import edmd, jacobian_spectrum
from geomlib.sim.systems import orbit, rotation_tanh
from geomlib.testing import saved_tensor_bytes


def make(width=12, seed=0, **options):
    options = {"tol": 1e-10, "max_steps": 300, "dtype": torch.float64} | options
    return DEQ(4, width, 3, generator=torch.Generator().manual_seed(seed), **options)


@pytest.fixture
def x(generator):
    return torch.randn(5, 4, generator=generator, dtype=torch.float64)


def unrolled(model, x, steps):
    u = model.inject(x)
    z = torch.zeros_like(u)
    for _ in range(steps):
        z = model.cell(z, u)
    return model.readout(z)


def gradients(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("cell", ["tanh", "sin"])
def test_equilibrium_is_a_fixed_point_of_the_cell(x, cell):
    model = make(cell=cell)
    if cell == "sin":
        x = x / 15
    solution = model.equilibrium(x, throw=True)
    assert solution.converged.all()
    assert (model.cell(solution.value, model.inject(x)) - solution.value).abs().max() < 1e-9


def test_convolutional_equilibrium_is_a_fixed_point(generator):
    model = ConvDEQ(2, 6, 3, tol=1e-10, dtype=torch.float64, generator=generator)
    images = torch.randn(3, 2, 9, 8, generator=generator, dtype=torch.float64)
    solution = model.equilibrium(images, throw=True)
    assert solution.value.shape == (3, 6, 9, 8)
    assert (model.cell(solution.value, model.inject(images)) - solution.value).abs().max() < 1e-9
    assert model(images).shape == (3, 3)


def test_implicit_gradient_equals_300_unrolled_steps(x):
    model = make()
    implicit = gradients(model(x).square().sum(), model)
    direct = gradients(unrolled(model, x, 300).square().sum(), model)
    assert (implicit - direct).norm() < 1e-6 * direct.norm()


def test_convolutional_gradient_equals_300_unrolled_steps(generator):
    model = ConvDEQ(1, 4, 2, tol=1e-11, max_steps=300, dtype=torch.float64, generator=generator)
    images = torch.randn(2, 1, 6, 6, generator=generator, dtype=torch.float64)
    implicit = gradients(model(images).square().sum(), model)
    direct = gradients(unrolled(model, images, 300).square().sum(), model)
    assert (implicit - direct).norm() < 1e-6 * direct.norm()


def test_one_step_gradient_is_biased(x):
    exact, cheap = make(), make(adjoint=OneStep())
    implicit = gradients(exact(x).square().sum(), exact)
    biased = gradients(cheap(x).square().sum(), cheap)
    assert (biased - implicit).norm() > 0.01 * implicit.norm()


def test_torchdeq_gives_the_same_value_and_gradient(x):
    torchdeq = pytest.importorskip("torchdeq")
    model = make()
    peer = torchdeq.get_deq(
        f_solver="fixed_point_iter", b_solver="fixed_point_iter", ift=True, f_tol=1e-12, b_tol=1e-12,
        f_max_iter=400, b_max_iter=400,
    )  # fmt: skip
    u = model.inject(x)
    states, _ = peer(lambda z: model.cell(z, u), torch.zeros_like(u))
    theirs = model.readout(states[-1])
    ours = model(x)
    assert (ours - theirs).abs().max() < 1e-8
    other = gradients(theirs.square().sum(), model)
    # both stop their backward iteration at a tolerance, not at rounding
    assert (gradients(ours.square().sum(), model) - other).norm() < 1e-6 * other.norm()


def test_jacobian_penalty_is_unbiased(generator):
    W = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    z = torch.randn(1, 6, generator=generator, dtype=torch.float64)
    J = torch.autograd.functional.jacobian(lambda s: torch.tanh(s @ W.T), z)[0, :, 0]
    estimates = jacobian_penalty(lambda s: torch.tanh(s @ W.T), z.expand(2000, 6), generator=generator)
    # one estimate has relative deviation below sqrt(2): the mean of 2000 has 3 per cent
    assert abs(estimates / (J.square().sum() / 6) - 1) < 0.05


def test_jacobian_penalty_lowers_the_spectral_radius(x, generator):
    model = make()
    before = model.stability(x).radius.mean()
    optimiser = torch.optim.SGD([model.W], lr=1.0)
    for _ in range(30):
        optimiser.zero_grad()
        z, u = model.equilibrium(x).value, model.inject(x)
        jacobian_penalty(model.cell, z, u, generator=generator).backward()
        optimiser.step()
    assert model.stability(x).radius.mean() < 0.8 * before


def test_local_decay_rates_are_the_jacobian_eigenvalues():
    # Dynamic mode decomposition of small perturbations against eigenvalues of the Jacobian (linearisation).
    generator = torch.Generator().manual_seed(1)
    model = make(width=8)
    one = torch.randn(1, 4, generator=generator, dtype=torch.float64)
    root = model.equilibrium(one, throw=True).value.detach()
    u = model.inject(one).detach()
    start = root + 1e-4 * torch.randn(200, 8, generator=generator, dtype=torch.float64)
    path = orbit(lambda z: model.cell(z, u).detach(), start, 3) - root
    fit = edmd(path[:-1].reshape(-1, 8), path[1:].reshape(-1, 8))
    exact = jacobian_spectrum(model.cell, root, u)[0]
    assert (fit.eigenvalues[:3] - exact[:3]).abs().max() < 5e-3


def test_a_root_need_not_attract_and_the_flag_says_so():
    z0 = torch.tensor([[0.3, 0.1]], dtype=torch.float64)
    for gain, attracts in ((0.9, True), (1.2, False)):
        f = lambda z, g=gain: rotation_tanh(z, g)  # noqa: E731
        solution = solve(f, z0, solver=Anderson(), tol=1e-10)
        assert solution.converged.all()
        assert solution.value.norm() < 1e-8
        report = stability(f, solution.value)
        assert report.attracting.item() is attracts
        assert abs(report.radius.item() - gain) < 1e-9
        path = orbit(f, z0, 2000)
        step = (path[-1] - path[-2]).norm()
        assert step < 1e-9 if attracts else step > 0.1


def test_a_trained_like_model_reports_its_radius(x):
    report = make().stability(x)
    assert report.radius.shape == (5,)
    assert report.attracting.all()
    assert "5 of 5 roots attract" in repr(report)


def test_large_states_are_judged_by_an_estimate(generator):
    # 600 numbers a state: no dense Jacobian. The leading eigenvalue stands apart, so 60 steps resolve it.
    scale = torch.linspace(0, 0.5, 600, dtype=torch.float64)
    scale[-1] = 1.3
    report = stability(lambda z: z * scale, torch.zeros(2, 600, dtype=torch.float64), generator=generator)
    assert (report.radius - 1.3).abs().max() < 1e-9
    assert not report.attracting.any()


def test_misses_are_counted_and_warned_about_once(x):
    model = make(max_steps=3)
    with pytest.warns(ConvergenceWarning, match="DEQ: .*not_converged=5 of 5"):
        model(x)
    assert model.diagnostics.not_converged == 5
    assert model.diagnostics.worst_residual > 1e-10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
    with pytest.raises(ConvergenceError):
        model.equilibrium(x, throw=True)


@pytest.mark.filterwarnings("ignore::geomlib.core.fixed_point.ConvergenceWarning")
def test_the_best_iterate_is_returned_when_nothing_converges(x):
    model = make(solver=Picard(), max_steps=40)
    with torch.no_grad():
        model.W.mul_(20)  # the iteration wanders
    solution = model.equilibrium(x)
    assert not solution.converged.any()
    assert torch.allclose(solution.residual, solution.trace.amin(0))


@pytest.mark.filterwarnings("ignore::geomlib.core.fixed_point.ConvergenceWarning")
def test_one_spoilt_sample_does_not_spoil_the_batch(x):
    model = make()
    clean = model.equilibrium(x).value
    spoilt = x.clone()
    spoilt[2] = math.nan
    solution = model.equilibrium(spoilt)
    others = [0, 1, 3, 4]
    assert solution.converged.tolist() == [True, True, False, True, True]
    assert (solution.value[others] - clean[others]).abs().max() < 1e-8
    assert model.diagnostics.not_converged == 1


def test_memory_is_flat_in_depth_while_unrolling_grows_linearly(generator):
    x = torch.randn(16, 4, generator=generator)
    model = DEQ(4, 32, 3, tol=1e-6, generator=torch.Generator().manual_seed(0))
    keep = [*model.parameters(), x]
    depths = torch.tensor([5.0, 20.0, 40.0, 80.0])
    grown = torch.tensor(
        [float(saved_tensor_bytes(lambda d=d: unrolled(model, x, int(d)), keep)) for d in depths]
    )
    assert torch.corrcoef(torch.stack([depths, grown]))[0, 1] ** 2 > 0.99
    flat = []
    for tol in (1e-1, 1e-3, 1e-6):
        model.tol = tol
        flat.append(saved_tensor_bytes(lambda: model(x), keep))
    assert len(set(flat)) == 1
    assert flat[0] < grown[0]


def test_one_seed_one_model(x):
    assert torch.equal(make(seed=0)(x), make(seed=0)(x))
    assert not torch.equal(make(seed=0)(x), make(seed=1)(x))


def test_state_dict_round_trip_is_exact(x):
    model, other = make(seed=0), make(seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("kind", ["dense", "convolutional"])
def test_models_run_on_every_device(device, generator, kind):
    def build(where):
        seeded = torch.Generator().manual_seed(0)
        if kind == "dense":
            return DEQ(4, 8, 3, generator=seeded, device=where)
        return ConvDEQ(1, 4, 3, generator=seeded, device=where)

    x = (
        torch.randn(4, 4, generator=generator)
        if kind == "dense"
        else torch.randn(4, 1, 8, 8, generator=generator)
    )
    model = build(device)
    y = model(x.to(device))
    y.square().sum().backward()
    assert (y.cpu() - build("cpu")(x)).abs().max() < 1e-3  # two solves at tolerance 1e-4
    assert all(torch.isfinite(p.grad.cpu()).all() for p in model.parameters())


def test_shapes_on_the_meta_device():
    assert DEQ(4, 8, 3, device="meta")(torch.empty(5, 4, device="meta")).shape == (5, 3)
    assert ConvDEQ(1, 8, 3, device="meta")(torch.empty(5, 1, 8, 8, device="meta")).shape == (5, 3)


def test_a_batch_of_one_works(x):
    model = make()
    assert (model(x[:1]) - model(x)[:1]).abs().max() < 1e-8


def test_bad_input_raises(generator):
    for options, message in (
        ({"cell": "relu"}, "cell must be one of"),
        ({"tol": 0.0}, "tol must be > 0"),
        ({"max_steps": 0}, "max_steps >= 1"),
        ({"width": 0}, "out_features must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)
    model, images = make(), ConvDEQ(1, 4, 3)
    for net, x, message in (
        (model, torch.ones(2, 5), r"x must be \(batch, 4\)"),
        (model, torch.ones(0, 4), "x must not be empty"),
        (model, torch.ones(2, 4, dtype=torch.int64), "x must be floating point"),
        (images, torch.ones(2, 3, 8, 8), r"x must be \(batch, 1, any, any\)"),
        (images, torch.ones(2, 1, 3, 8), "at least 4 pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            net(x)
    with pytest.raises(ValueError, match="z must not be empty"):
        jacobian_penalty(torch.tanh, torch.ones(0, 3))
