"""Each assertion passes on a right thing and fails on a wrong one; the emulated device keeps its promises."""

import copy
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from geomlib.testing import (
    DeviceMismatchError,
    assert_contraction,
    assert_equivariant,
    assert_gradients,
    count_host_syncs,
    emulated_device,
    saved_tensor_bytes,
)


class WrongFirst(torch.autograd.Function):
    """The square with three times its input as derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x * grad


class WrongSecond(WrongFirst):
    """The square with a right derivative that does not depend on the input, as far as autograd can see."""

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x.detach() * grad


# Derivatives


def test_right_derivatives_pass_on_every_device(device):
    assert_gradients(
        lambda x, w: (x @ w).tanh(), torch.randn(2, 3, device=device), torch.randn(3, 2, device=device)
    )


def test_complex_and_integer_inputs_are_taken_as_they_are():
    assert_gradients(
        lambda z, index: (z[index] * z.conj()).real,
        torch.randn(3, dtype=torch.cfloat),
        torch.tensor([2, 0, 1]),
    )


def test_a_wrong_first_derivative_is_found():
    with pytest.raises(AssertionError, match="first order"):
        assert_gradients(WrongFirst.apply, torch.tensor([0.5, -1.0]))


def test_a_wrong_second_derivative_is_found():
    x = torch.tensor([0.5, -1.0])
    assert_gradients(WrongSecond.apply, x, second_order=False)
    with pytest.raises(AssertionError, match="second order"):
        assert_gradients(WrongSecond.apply, x)


def test_gradients_of_nothing_are_refused():
    with pytest.raises(ValueError, match="nothing to differentiate"):
        assert_gradients(lambda n: n, torch.tensor([1, 2]))


# Contraction


def test_a_contraction_passes_and_its_factor_is_found(device, generator):
    weight = torch.diag(torch.tensor([0.9, 0.3, 0.1])).to(device)
    x = torch.randn(5, 3, generator=generator).to(device)
    found = assert_contraction(lambda z: z @ weight, 0.9, x, generator=generator)
    assert found == pytest.approx(0.9, rel=1e-3)


def test_one_stretched_direction_among_hundreds_is_found(generator):
    # A random direction in 400 dimensions shows a gain near 0.1; only the search reaches 1.5.
    gains = torch.full((400,), 0.1)
    gains[17] = 1.5
    with pytest.raises(AssertionError, match=r"stretches a pair by 1\.[45]"):
        assert_contraction(
            lambda z: z * gains, 0.95, torch.randn(2, 400, generator=generator), generator=generator
        )


def test_a_factor_just_above_the_promise_is_found(generator):
    x = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    assert_contraction(lambda z: 0.5 * z, 0.5, x, generator=generator)
    with pytest.raises(AssertionError, match=r"promised 0\.5"):
        assert_contraction(lambda z: 0.5001 * z, 0.5, x, generator=generator)


def test_a_map_that_is_not_finite_does_not_contract(generator):
    with pytest.raises(AssertionError, match="nan"):
        assert_contraction(lambda z: z * torch.nan, 0.5, torch.ones(2, 2), generator=generator)


def test_rounding_is_not_taken_for_stretching(generator):
    x = 1e4 + torch.rand(8, 16, generator=generator)
    assert_contraction(lambda z: z, 1.0, x, generator=generator)


@pytest.mark.parametrize(
    ("kappa", "x", "pairs", "words"),
    [
        (0.0, torch.ones(1, 1), 1, "kappa must be positive"),
        (0.5, torch.ones(3), 1, "x must have shape"),
        (0.5, torch.ones(0, 3), 1, "x must have shape"),
        (0.5, torch.ones(1, 1), 0, "pairs must be at least 1"),
    ],
)
def test_a_contraction_check_refuses_bad_inputs(kappa, x, pairs, words):
    with pytest.raises(ValueError, match=words):
        assert_contraction(torch.sin, kappa, x, pairs)


# Equivariance


def roll(x):
    return x.roll(1, dims=-1)


def test_a_convolution_commutes_with_shifts(device):
    x = torch.randn(2, 8, device=device)
    assert_equivariant(lambda z: z + 0.5 * z.roll(2, dims=-1), roll, roll, x)
    assert_equivariant(lambda z: z.amax(-1), roll, lambda y: y, x)


def test_a_map_that_breaks_the_symmetry_is_found():
    with pytest.raises(AssertionError, match="does not commute"):
        assert_equivariant(lambda z: z * torch.arange(8.0), roll, roll, torch.randn(2, 8))


def test_an_action_that_moves_nothing_is_refused():
    with pytest.raises(ValueError, match="must move x"):
        assert_equivariant(torch.sin, roll, roll, torch.ones(2, 8))


# Memory


def test_saved_bytes_count_each_storage_once(device):
    x = torch.randn(100, device=device, requires_grad=True)
    # exp saves its result; the product saves that same result twice more.
    assert saved_tensor_bytes(lambda: (y := x.exp()) * y) == 400


def test_saved_bytes_leave_out_what_is_excluded_or_dropped():
    layer = nn.Linear(10, 10, bias=False)
    x = torch.randn(3, 10)
    assert saved_tensor_bytes(lambda: layer(x), exclude=[*layer.parameters(), x]) == 0
    assert saved_tensor_bytes(lambda: layer(x), exclude=[x]) == 0  # the input needs no gradient
    assert saved_tensor_bytes(lambda: layer(x), exclude=layer.parameters()) == 120
    assert saved_tensor_bytes(lambda: layer(x).exp().detach()) == 0


def test_saved_bytes_grow_with_unrolled_depth():
    x = torch.randn(50, requires_grad=True)

    def unroll(steps):
        z = x
        for _ in range(steps):
            z = z.tanh()
        return z

    assert saved_tensor_bytes(lambda: unroll(12)) - saved_tensor_bytes(lambda: unroll(6)) == 6 * 200


# The emulated device


def test_the_device_is_installed_only_when_asked_for():
    code = (
        "import torch, geomlib.testing\n"
        "assert torch._C._get_privateuse1_backend_name() == 'privateuseone'\n"
        "geomlib.testing.emulated_device()\n"
        "assert torch._C._get_privateuse1_backend_name() == 'emulated'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_moved_interface_is_reported_as_such():
    code = (
        "import torch.utils.backend_registration as registration\n"
        "del registration._setup_privateuseone_for_python_backend\n"
        "from geomlib.testing import emulated_device\n"
        "try:\n    emulated_device()\n"
        "except RuntimeError as error:\n    assert 'interface' in str(error), error\n"
        "else:\n    raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def train(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Flatten(), nn.LayerNorm(24), nn.Linear(24, 3))
    x, y = torch.randn(16, 1, 8), torch.randint(3, (16,))
    model, x, y = model.to(device), x.to(device), y.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return [p.detach().cpu() for p in model.parameters()]


def test_training_gives_the_numbers_of_the_cpu(emulated):
    for ours, theirs in zip(train(emulated), train("cpu"), strict=True):
        assert torch.equal(ours, theirs)


def test_tensors_say_where_they_live(emulated):
    x = torch.zeros(2, device=emulated)
    for made in (
        x + 1,
        x.new_zeros(3),
        torch.full_like(x, 2.0),
        torch.tensor([1.0], device=emulated),
        x.new_tensor([1]),
    ):
        assert made.device == emulated
    assert x.cpu().device.type == "cpu"
    assert "emulated" in repr(x)
    assert f"{x.sum():.2f}" == "0.00"


def test_python_data_keeps_its_values_and_flags(emulated):
    x = torch.tensor([[1.0, 2.0]], device=emulated, requires_grad=True)
    assert x.is_leaf
    assert x.requires_grad
    assert x.tolist() == [[1.0, 2.0]]
    assert x.detach().new_tensor([3]).dtype == torch.float32


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, y: x + y,
        lambda x, y: x @ y,
        lambda x, y: torch.cat([x, y]),
        lambda x, y: torch.where(x > 0, x, y),
        lambda x, y: y[x.long()],
        lambda x, y: x.index_put((torch.tensor([0]),), y[:1]),
        lambda x, y: nn.functional.mse_loss(x, y),
    ],
)
def test_mixed_devices_raise(emulated, mix):
    with pytest.raises(DeviceMismatchError, match="cpu tensor of shape"):
        mix(torch.ones(3, device=emulated), torch.ones(3))


def test_factories_give_the_values_of_the_cpu(emulated):
    assert torch.equal(torch.eye(2, 3, device=emulated).cpu(), torch.eye(2, 3))
    assert torch.equal(torch.arange(1, 7, 2, device=emulated).cpu(), torch.arange(1, 7, 2))


def test_a_result_that_would_be_resized_is_refused(emulated):
    with pytest.raises(NotImplementedError, match="resized"):
        torch.add(torch.ones(3, device=emulated), 1, out=torch.empty(0, device=emulated))


def test_mixed_devices_raise_in_backward(emulated):
    class Careless(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.ones(3)

    x = torch.ones(3, device=emulated, requires_grad=True)
    with pytest.raises(DeviceMismatchError):
        Careless.apply(x).sum().backward()


def test_numbers_and_indices_may_stay_on_the_cpu(emulated):
    x = torch.arange(3.0, device=emulated)
    assert (x * torch.tensor(2.0)).tolist() == [0.0, 2.0, 4.0]
    assert x[torch.tensor([2, 0])].tolist() == [2.0, 0.0]


def test_a_cpu_generator_is_refused_as_on_a_gpu(emulated, generator):
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device=emulated, generator=generator)
    with pytest.raises(RuntimeError, match="generator"):
        torch.zeros(3, device=emulated).normal_(generator=generator)


@pytest.mark.parametrize(
    ("wait", "times"),
    [
        (lambda x: x.sum() * 2, 0),
        (lambda x: x.to("emulated"), 0),
        (lambda x: x.sum().item(), 1),
        (lambda x: bool((x > 0).all()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: torch.zeros(4).copy_(x), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[torch.tensor([0])], 0),
        (lambda x: torch.linalg.solve(x.diag(), x), 1),
    ],
)
def test_waits_of_the_host_are_counted(emulated, wait, times):
    x = torch.arange(1.0, 5.0, device=emulated)
    with count_host_syncs() as syncs:
        wait(x)
    assert len(syncs) == times
    x.sum().item()
    assert len(syncs) == times, "counting ends with the block"


def test_nested_counts_are_separate(emulated):
    x = torch.ones(1, device=emulated)
    with count_host_syncs() as outer:
        x.item()
        with count_host_syncs() as inner:
            x.item()
        x.item()
    assert (len(outer), len(inner)) == (3, 1)


def test_nested_counts_that_saw_nothing_are_separate(emulated):
    x = torch.ones(1, device=emulated)
    with count_host_syncs() as outer:
        with count_host_syncs() as inner:
            pass
        x.item()
    assert (len(outer), len(inner)) == (1, 0)


def test_views_and_in_place_changes_reach_autograd(emulated):
    x = torch.ones(2, 3, device=emulated, requires_grad=True)
    y = x.clone()
    y[0].mul_(5)
    y[:, 1] = 0
    y.sum().backward()
    assert x.grad.tolist() == [[5.0, 0.0, 5.0], [1.0, 0.0, 1.0]]


def test_numbers_are_written_where_an_index_says(emulated):
    x = torch.zeros(2, 3, device=emulated)
    with count_host_syncs() as syncs:
        x[0, 1] = 5
        x[[1, 1], [0, 2]] = 7
        x[:, 1] += 1
    assert syncs == []
    x[x == 0] = -1
    assert x.tolist() == [[-1.0, 6.0, -1.0], [7.0, 1.0, 7.0]]


def test_a_shape_changed_in_place_is_refused(emulated):
    with pytest.raises(NotImplementedError, match="in place"):
        torch.ones(2, 3, device=emulated).t_()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # torch's own, inside jvp
def test_function_transforms_and_copies_work(emulated):
    x = torch.linspace(-1, 1, 6, device=emulated).reshape(2, 3)
    value, tangent = torch.func.jvp(torch.sin, (x,), (torch.ones_like(x),))
    assert torch.equal(tangent.cpu(), x.cos().cpu())
    assert value.device == emulated
    assert torch.func.vmap(torch.func.jacrev(torch.tanh))(x).shape == (2, 3, 3)
    layer = copy.deepcopy(nn.Linear(3, 2).to(emulated))
    assert layer(x).device == emulated


def test_each_thread_may_ask_for_the_device(emulated):
    seen = []
    thread = threading.Thread(
        target=lambda: seen.append(torch.tensor([1.0], device=emulated_device()).tolist())
    )
    thread.start()
    thread.join()
    assert seen == [[1.0]]
