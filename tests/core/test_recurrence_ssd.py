"""The matrix form for decays shared by a head: equal to stepping through all its states."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geomlib.core import ssd
from geomlib.testing import assert_gradients

LENGTHS = [1, 2, 3, 17, 64, 100, 257]
CHUNKS = [1, 16, 64, 1000]


def problem(batch, length, heads, values, state, *, shared=False, scale=1.0, dtype=torch.float64, seed=0):
    """Log-decays in `-scale` to 0, values, both projections, a state before them: all of them leaves."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    log_decay = (-scale * torch.rand(batch, length, heads, generator=generator, dtype=dtype)).requires_grad_()
    projections = [draw(batch, length, 1 if shared else heads, state) for _ in range(2)]
    return log_decay, draw(batch, length, heads, values), *projections, draw(batch, heads, values, state)


def stepped(log_decay, x, B, C, initial=None, reverse=False):
    """All states, one after the other: the definition."""
    batch, length, heads, values = x.shape
    B, C = (tensor.expand(batch, length, heads, -1) for tensor in (B, C))
    state = x.new_zeros(batch, heads, values, B.shape[-1]) if initial is None else initial
    outputs = [None] * length
    for t in reversed(range(length)) if reverse else range(length):
        state = log_decay[:, t, :, None, None].exp() * state + x[:, t, :, :, None] * B[:, t, :, None]
        outputs[t] = (state * C[:, t, :, None]).sum(-1)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("reverse", [False, True])
def test_chunks_give_the_outputs_and_gradients_of_the_steps(length, chunk, reverse):
    *inputs, initial = problem(2, length, 3, 2, 4)
    for start in (None, initial):
        leaves = inputs if start is None else [*inputs, start]
        found = ssd(*inputs, initial=start, reverse=reverse, chunk=chunk)
        expected = stepped(*inputs, start, reverse)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        cotangent = torch.randn(found.shape, dtype=found.dtype)
        for ours, theirs in zip(
            torch.autograd.grad(found, leaves, cotangent),
            torch.autograd.grad(expected, leaves, cotangent),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 4)] * 4),
    length=st.integers(1, 40),
    chunk=st.integers(1, 45),
    shared=st.booleans(),
    seed=st.integers(0, 100),
)
def test_all_shapes_give_the_steps(sizes, length, chunk, shared, seed):
    batch, heads, values, state = sizes
    *inputs, initial = problem(batch, length, heads, values, state, shared=shared, seed=seed)
    torch.testing.assert_close(
        ssd(*inputs, initial=initial, chunk=chunk), stepped(*inputs, initial), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_derivatives_of_first_and_second_order_are_right(chunk):
    *inputs, initial = problem(1, 3, 2, 1, 2)
    assert_gradients(lambda *x: ssd(*x[:4], initial=x[4], chunk=chunk), *inputs, initial)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("scale", [1.0, 20.0, 1e4])
def test_strong_decay_in_single_precision_stays_exact(chunk, scale):
    """Long sums of log-decays reach millions, where a difference of two of them has no digit left."""
    *inputs, _ = problem(1, 512, 2, 3, 4, scale=scale, dtype=torch.float32)
    y = ssd(*inputs, chunk=chunk)
    exact = stepped(*(x.double() for x in inputs))
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y.square().sum(), inputs))


def test_an_infinite_decay_forgets_without_a_nan():
    log_decay, x, B, C, initial = problem(1, 10, 1, 2, 3)
    cut = log_decay.detach().clone()
    cut[:, 6] = -torch.inf
    cut.requires_grad_()
    y = ssd(cut, x, B, C, initial=initial, chunk=4)
    fresh = ssd(log_decay[:, 6:], x[:, 6:], B[:, 6:], C[:, 6:], chunk=4)
    torch.testing.assert_close(y[:, 6:], fresh, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(y.sum(), (cut, x, B, C, initial))
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_later_input_changes_no_earlier_output(chunk):
    log_decay, x, B, C, _ = problem(1, 40, 2, 2, 3)
    y = ssd(log_decay, x, B, C, chunk=chunk)
    for k in (0, 1, 16, 39):
        changed = x.detach().clone()
        changed[:, k] += 1
        again = ssd(log_decay, changed, B, C, chunk=chunk)
        assert torch.equal(again[:, :k], y[:, :k])
        assert not torch.equal(again[:, k], y[:, k])


def test_autocast_leaves_single_precision_and_half_inputs_are_rounded_once():
    *inputs, _ = (x.detach() for x in problem(1, 100, 2, 2, 3, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ssd(*inputs)
    assert y.dtype == torch.float32
    assert torch.equal(y, ssd(*inputs))
    low = [x.bfloat16() for x in inputs]
    torch.testing.assert_close(ssd(*low), ssd(*(x.float() for x in low)).bfloat16(), rtol=0, atol=0)


def test_devices_give_the_numbers_of_the_cpu(device):
    *inputs, initial = problem(2, 50, 2, 2, 3)
    moved = [x.detach().to(device).requires_grad_() for x in (*inputs, initial)]
    y = ssd(*moved[:4], initial=moved[4], chunk=16)
    torch.testing.assert_close(y.cpu(), stepped(*inputs, initial), rtol=0, atol=1e-12)
    y.sum().backward()
    stepped(*inputs, initial).sum().backward()
    for ours, theirs in zip(moved, (*inputs, initial), strict=True):
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad, rtol=0, atol=1e-11)


def test_no_step_gives_nothing():
    *inputs, _ = problem(2, 0, 2, 2, 3)
    assert ssd(*inputs).shape == (2, 0, 2, 2)


def test_bad_arguments_are_named():
    log_decay, x, B, C, initial = problem(2, 5, 3, 2, 4)
    for wrong, message in [
        (lambda: ssd(log_decay, x[0], B, C), r"x must be \(N, L, H, P\)"),
        (lambda: ssd(log_decay, x.long(), B, C), "all inputs floating"),
        (lambda: ssd(log_decay[:, :4], x, B, C), r"log_decay must be one number for each head and step"),
        (lambda: ssd(log_decay, x, B[:, :, :2], C), "B must be"),
        (lambda: ssd(log_decay, x, B, C[..., :3]), "C must be"),
        (lambda: ssd(log_decay, x, B, C, initial=initial[:1]), "initial must be"),
        (lambda: ssd(log_decay, x, B, C, chunk=0), "chunk must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            wrong()
