"""Linear recurrences: every form is the loop, in values, in gradients of any order, on every device."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geomlib.core import linear_recurrence
from geomlib.testing import assert_gradients

LENGTHS = [1, 2, 3, 17, 64, 100, 257]
FORMS = [
    ("auto", None),
    ("pairs", None),
    ("doubling", None),
    ("chunked", None),
    ("chunked", 1),
    ("chunked", 16),
    ("chunked", 64),
    ("chunked", 1000),
]
each_form = pytest.mark.parametrize(
    ("method", "chunk"), FORMS, ids=[f"{method}-{chunk}" if chunk else method for method, chunk in FORMS]
)


def problem(*shape, dim=1, dtype=torch.float64, seed=0):
    """Decays in (0, 1), inputs, a state before them, and a cotangent; all of them leaves."""
    generator = torch.Generator().manual_seed(seed)
    rest = shape[:dim] + shape[dim + 1 :]
    a = torch.rand(shape, generator=generator, dtype=dtype).requires_grad_()
    b, initial, cotangent = (
        torch.randn(size, generator=generator, dtype=dtype).requires_grad_() for size in (shape, rest, shape)
    )
    return a, b, initial, cotangent


def assert_equals_the_loop(method, chunk, a, b, cotangent, *, rtol=0.0, **options):
    inputs = [x for x in (a, b, options.get("initial")) if x is not None]
    expected = linear_recurrence(a, b, method="loop", **options)
    found = linear_recurrence(a, b, method=method, chunk=chunk, **options)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, cotangent),
        torch.autograd.grad(expected, inputs, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-11)


def test_the_loop_is_the_definition():
    a, b, initial, _ = problem(2, 5, 3)
    h = linear_recurrence(a, b, initial=initial, method="loop")
    back = linear_recurrence(a, b, initial=initial, method="loop", reverse=True)
    for k in range(5):
        torch.testing.assert_close(h[:, k], a[:, k] * (h[:, k - 1] if k else initial) + b[:, k])
        torch.testing.assert_close(back[:, k], a[:, k] * (back[:, k + 1] if k < 4 else initial) + b[:, k])


@each_form
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("reverse", [False, True])
def test_every_form_is_the_loop_in_values_and_gradients(method, chunk, length, reverse):
    a, b, initial, cotangent = problem(3, length, 5)
    assert_equals_the_loop(method, chunk, a, b, cotangent, reverse=reverse)
    assert_equals_the_loop(method, chunk, a, b, cotangent, reverse=reverse, initial=initial)


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(
        [("pairs", None), ("doubling", None), ("auto", None), *[("chunked", c) for c in (1, 2, 5)]]
    ),
    shape=st.lists(st.integers(1, 6), min_size=0, max_size=3).map(tuple),
    length=st.integers(1, 70),
    data=st.data(),
)
def test_every_form_is_the_loop_for_all_shapes_and_broadcasts(form, shape, length, data):
    dim = data.draw(st.integers(0, len(shape)))
    whole = (*shape[:dim], length, *shape[dim:])
    a, b, initial, cotangent = problem(*whole, dim=dim, seed=data.draw(st.integers(0, 100)))
    keep = data.draw(st.lists(st.booleans(), min_size=len(whole), max_size=len(whole)))
    drop = data.draw(st.integers(0, len(whole)))
    small = [size if kept else 1 for size, kept in zip(whole, keep, strict=True)]
    a = a.detach()[tuple(slice(size) for size in small)]
    if all(size == 1 for size in small[:drop]):
        a = a.reshape(small[drop:])
    # Sums over broadcast dimensions are large, and equal up to rounding of their own size.
    assert_equals_the_loop(
        *form, a.clone().requires_grad_(), b, cotangent, rtol=1e-12, initial=initial, dim=dim - len(whole)
    )


@pytest.mark.parametrize("shape", [(1, 300, 20_000), (4, 130, 2), (2, 5000, 300)])
def test_the_sizes_at_which_the_route_changes_give_the_loop(shape):
    """Wide steps go through the plain loop, others through chunks, long ones of chunks of chunks."""
    a, b, initial, cotangent = problem(*shape, dtype=torch.float32)
    with torch.no_grad():
        expected = linear_recurrence(a, b, initial=initial, method="loop")
    h = linear_recurrence(a, b, initial=initial)
    torch.testing.assert_close(h, expected, rtol=1e-5, atol=1e-5)
    db, start = torch.autograd.grad(h, (b, initial), cotangent)
    after = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1)
    with torch.no_grad():
        expected = linear_recurrence(after, cotangent, method="loop", reverse=True)
    torch.testing.assert_close(db, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(start, a[:, 0] * db[:, 0])


@each_form
def test_derivatives_of_first_and_second_order_are_right(method, chunk):
    a, b, initial, _ = problem(2, 5, 1)

    def forwards(a, b, initial):
        return linear_recurrence(a, b, initial=initial, method=method, chunk=chunk)

    def backwards(a, b):
        return linear_recurrence(a, b, dim=0, reverse=True, method=method, chunk=chunk)

    assert_gradients(forwards, a, b, initial)
    assert_gradients(backwards, a[0], b[0])


def test_chunks_have_derivatives_of_any_order():
    """For one step after a state, `h_n = a^n h_0`: all derivatives in `a` are known."""
    a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    start = torch.ones((), dtype=torch.float64)
    value = linear_recurrence(a, torch.zeros(6, dtype=torch.float64), initial=start, dim=0, chunk=2)[-1]
    expected = 0.5**6
    for order in range(5):
        torch.testing.assert_close(value.item(), expected, rtol=1e-13, atol=0)
        (value,) = torch.autograd.grad(value, a, create_graph=True)
        expected *= (6 - order) / 0.5


@pytest.mark.parametrize("chunk", [None, 2])
def test_forward_mode_and_transforms_agree_with_reverse_mode(chunk):
    a, b, initial, _ = (x.detach() for x in problem(2, 5, 2))

    def f(a, b, initial):
        return linear_recurrence(a, b, initial=initial, chunk=chunk)

    assert torch.autograd.gradcheck(
        f, [x.clone().requires_grad_() for x in (a, b, initial)], check_forward_ad=True
    )
    for index in range(3):
        forwards, backwards = (
            jac(f, argnums=index)(a, b, initial) for jac in (torch.func.jacfwd, torch.func.jacrev)
        )
        torch.testing.assert_close(forwards, backwards, rtol=0, atol=1e-12)
    one_a = torch.func.vmap(f, in_dims=(None, 0, None))(a[0], b.unsqueeze(1), initial[:1])
    torch.testing.assert_close(one_a[:, 0], f(a[:1].expand_as(b), b, initial[:1].expand(2, 2)))


@each_form
def test_strong_decay_in_single_precision_stays_exact(method, chunk):
    """Products of decays underflow to zero, which is the right answer; their inverses would be infinite."""
    generator = torch.Generator().manual_seed(0)
    a = (-20 * torch.rand(2, 512, 4, generator=generator)).exp().requires_grad_()
    b = torch.randn(2, 512, 4, generator=generator, requires_grad=True)
    h = linear_recurrence(a, b, method=method, chunk=chunk)
    exact = linear_recurrence(a.double(), b.double(), method="loop")
    torch.testing.assert_close(h.double(), exact, rtol=0, atol=1e-4)
    for ours, theirs in zip(
        torch.autograd.grad(h.square().sum(), (a, b)),
        torch.autograd.grad(exact.square().sum(), (a, b)),
        strict=True,
    ):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@each_form
def test_zero_decay_forgets_and_unit_decay_sums(method, chunk):
    _, b, _, _ = problem(2, 40, 3)
    torch.testing.assert_close(
        linear_recurrence(torch.zeros_like(b), b, method=method, chunk=chunk), b, rtol=0, atol=0
    )
    torch.testing.assert_close(
        linear_recurrence(torch.ones_like(b), b, method=method, chunk=chunk), b.cumsum(1), rtol=0, atol=1e-12
    )


@each_form
def test_a_later_input_changes_no_earlier_state(method, chunk):
    a, b, _, _ = problem(2, 40, 3)
    h = linear_recurrence(a, b, method=method, chunk=chunk)
    for k in (0, 1, 7, 16, 39):
        changed_a, changed_b = a.detach().clone(), b.detach().clone()
        changed_a[:, k], changed_b[:, k] = 7.0, -5.0
        changed = linear_recurrence(changed_a, changed_b, method=method, chunk=chunk)
        assert torch.equal(changed[:, :k], h[:, :k])
        assert not torch.equal(changed[:, k], h[:, k])


@each_form
def test_a_convex_scan_has_gain_at_most_one_in_the_sup_norm(method, chunk):
    a, v, initial, _ = problem(3, 100, 4)
    h = linear_recurrence(a, (1 - a) * v, initial=initial, method=method, chunk=chunk)
    reach = torch.maximum(v.abs().amax(1), initial.abs())
    assert (h.abs().amax(1) <= reach * (1 + 1e-14)).all()


@each_form
def test_a_convex_scan_keeps_a_constant_that_it_starts_with(method, chunk):
    a, _, initial, _ = problem(3, 100, 4)
    v = initial.unsqueeze(1).expand_as(a)
    h = linear_recurrence(a, (1 - a) * v, initial=initial, method=method, chunk=chunk)
    torch.testing.assert_close(h, v, rtol=0, atol=1e-13)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "reversed"])
def test_memory_layout_changes_nothing(layout):
    a, b, _, _ = (x.detach() for x in problem(3, 40, 6))
    views = {
        "transposed": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
        "strided": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
        "expanded": lambda x: x[:, :, :1].expand(-1, -1, 6),
        "reversed": lambda x: x.mT.contiguous().mT,
    }
    a, b = (views[layout](x).requires_grad_() for x in (a, b))
    found = linear_recurrence(a, b)
    expected = linear_recurrence(a, b, method="loop")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    # A sum hands back a cotangent that is one number seen everywhere.
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), (a, b)), torch.autograd.grad(expected.sum(), (a, b)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@each_form
def test_complex_rotations_keep_their_size(method, chunk):
    """`a = exp(i w)` turns the state: `|h|` is that of the start, and gradients follow the conjugate rule."""
    w = torch.linspace(0, 3, 50, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(w), w).unsqueeze(1).requires_grad_()
    start = torch.tensor([1 + 2j], dtype=torch.complex128, requires_grad=True)
    still = torch.zeros(50, 1, dtype=torch.complex128, requires_grad=True)
    h = linear_recurrence(turn, still, initial=start, dim=0, method=method, chunk=chunk)
    torch.testing.assert_close(h.abs(), torch.full_like(h.abs(), 5**0.5), rtol=0, atol=1e-12)
    assert_gradients(
        lambda *x: linear_recurrence(x[0], x[1], initial=x[2], dim=0, method=method, chunk=chunk),
        turn[:4],
        still[:4],
        start,
    )


def test_half_precision_is_computed_in_single_and_rounded_once():
    a, b, _, _ = (x.detach() for x in problem(2, 300, 3, dtype=torch.float32))
    for dtype in (torch.bfloat16, torch.float16):
        low_a, low_b = (0.9 + 0.1 * a).to(dtype), b.to(dtype)
        h = linear_recurrence(low_a, low_b)
        exact = linear_recurrence(low_a.double(), low_b.double())
        assert h.dtype == dtype
        assert ((h.double() - exact).abs() <= torch.finfo(dtype).eps * (exact.abs() + 1e-2)).all()


def test_autocast_leaves_single_precision():
    a, b, _, cotangent = problem(2, 30, 3, dtype=torch.float32)
    expected = linear_recurrence(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = linear_recurrence(a, b)
        rounded = linear_recurrence(a.bfloat16(), b.bfloat16())
    assert h.dtype == rounded.dtype == torch.float32
    assert torch.equal(h, expected)
    assert torch.equal(
        torch.autograd.grad(h, a, cotangent)[0], torch.autograd.grad(expected, a, cotangent)[0]
    )


def test_mixed_dtypes_take_the_common_one():
    a, b, _, _ = (x.detach() for x in problem(2, 20, 3))
    assert linear_recurrence(a.float(), b).dtype == torch.float64
    assert linear_recurrence(a, b.to(torch.complex64)).dtype == torch.complex128


def test_no_step_and_no_sample_give_nothing():
    for shape in ((2, 0, 3), (0, 5, 3)):
        b = torch.zeros(shape, requires_grad=True)
        h = linear_recurrence(torch.zeros(shape), b)
        assert h.shape == shape
        h.sum().backward()
        assert b.grad.shape == shape


def test_devices_give_the_numbers_of_the_cpu(device):
    a, b, initial, cotangent = problem(2, 100, 3)
    expected = linear_recurrence(a, b, initial=initial, method="loop")
    gradients = torch.autograd.grad(expected, (a, b, initial), cotangent)
    a, b, initial, cotangent = (x.detach().to(device).requires_grad_() for x in (a, b, initial, cotangent))
    for method, chunk in FORMS:
        h = linear_recurrence(a, b, initial=initial, method=method, chunk=chunk)
        assert h.device.type == device.type
        torch.testing.assert_close(h.cpu(), expected, rtol=0, atol=1e-12)
        found = torch.autograd.grad(h, (a, b, initial), cotangent, create_graph=True)
        torch.testing.assert_close([x.cpu() for x in found], list(gradients), rtol=0, atol=1e-11)
        found[0].square().sum().backward()


def test_an_accelerator_is_never_waited_for(emulated):
    from geomlib.testing import count_host_syncs

    a, b, _, _ = (x.detach().to(emulated).requires_grad_() for x in problem(2, 100, 3))
    with count_host_syncs() as waits:
        linear_recurrence(a, b).sum().backward()
    assert waits == []


@pytest.mark.slow
def test_the_entry_point_compiles_without_a_break():
    a, b, initial, cotangent = problem(2, 37, 3)
    compiled = torch.compile(linear_recurrence, fullgraph=True, backend="aot_eager")
    found, expected = compiled(a, b, initial=initial), linear_recurrence(a, b, initial=initial)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(found, (a, b), cotangent),
        torch.autograd.grad(expected, (a, b), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_backward_keeps_coefficients_and_states_only():
    from geomlib.testing import saved_tensor_bytes

    a, b, _, _ = problem(2, 200, 3)
    assert saved_tensor_bytes(lambda: linear_recurrence(a, b), exclude=[a]) == b.numel() * b.element_size()


def test_bad_arguments_are_named():
    a, b = torch.rand(2, 5, 3), torch.rand(2, 5, 3)
    for wrong, message in [
        (lambda: linear_recurrence(a.long(), b), "a must be floating or complex, got torch.int64"),
        (lambda: linear_recurrence(a, b > 0), "b must be floating or complex"),
        (lambda: linear_recurrence(a[:, :4], b), r"a must broadcast to the shape of b, \(2, 5, 3\)"),
        (lambda: linear_recurrence(a.unsqueeze(0), b), "a must broadcast"),
        (lambda: linear_recurrence(a, b[:1]), "a must broadcast"),
        (
            lambda: linear_recurrence(a, b, initial=torch.zeros(5, 3)),
            r"initial must broadcast to one step of b",
        ),
        (lambda: linear_recurrence(a, b, dim=3), "dim must be a dimension of b"),
        (lambda: linear_recurrence(a[0, 0, 0], b[0, 0, 0], dim=0), "dim must be a dimension of b"),
        (lambda: linear_recurrence(a, b, method="fft"), "method must be one of"),
        (lambda: linear_recurrence(a, b, chunk=0), "chunk must be at least 1, got 0"),
        (lambda: linear_recurrence(a, b, method="loop", chunk=4), "chunk belongs to method 'chunked'"),
    ]:
        with pytest.raises(ValueError, match=message):
            wrong()


def test_devices_are_not_mixed(emulated):
    b = torch.rand(2, 5, 3)
    with pytest.raises(ValueError, match="a must be on the device of b"):
        linear_recurrence(b.to(emulated), b)
