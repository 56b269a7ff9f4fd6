"""Laws of the transitions: norms of operators, not of reshaped kernels; what contracts, what is refused."""

import math

import pytest
import torch

from geomlib.core.contraction import lipschitz_estimate
from geomlib.frost import (
    ACTIVATIONS,
    AttentionBlock,
    Block,
    Bottleneck,
    Certified,
    Prepared,
    Transition,
    max_min,
    normalised,
    orthogonal,
)
from geomlib.frost.transitions import channel_norm, convolve

FORMS = ["normalised", "orthogonal"]
PLACES = {0: (), 1: (7,), 2: (5, 4)}


def certified(axes=0, dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(0)
    return Certified(6, axes=axes, kappa=0.9, generator=generator, dtype=dtype, **options)


def state(axes, samples=3, width=6, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, width, *PLACES[axes], generator=generator, dtype=dtype)


def dense(weight, axes, dilation=1):
    """Return the matrix of the operator on states of `PLACES`, column by column."""
    width = weight.shape[1]
    size = width * math.prod(PLACES[axes])
    basis = torch.eye(size, dtype=weight.dtype).view(size, width, *PLACES[axes])
    return convolve(basis, weight, None, dilation).flatten(1).mT


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("axes", [1, 2])
def test_a_convolution_is_the_one_of_torch(axes, dilation):
    weight, bias, x = torch.randn(4, 6, *[3] * axes), torch.randn(4), state(axes, dtype=torch.float32)
    reference = (torch.nn.functional.conv1d, torch.nn.functional.conv2d)[axes - 1]
    torch.testing.assert_close(
        convolve(x, weight, bias, dilation), reference(x, weight, bias, padding=dilation, dilation=dilation)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("axes", [0, 1, 2])
def test_operator_norms_keep_their_bounds(axes, dilation, form):
    block = certified(axes, dilation=dilation, parametrisation=form)
    for weight, bound in zip(block.prepare(state(axes)).shared, (1.0, 0.9), strict=True):
        norm = torch.linalg.matrix_norm(dense(weight, axes, dilation), 2).item()
        assert norm <= bound
        # To the bound and not only below it; a small grid with zeros around is less than the infinite one.
        assert norm >= bound * (0.99 if axes == 0 else 0.7 if dilation == 1 else 0.3)


def test_the_norm_of_a_reshaped_kernel_is_not_the_norm_of_the_operator():
    average = torch.full((1, 1, 3), 1 / math.sqrt(3), dtype=torch.float64)  # flattened it has norm 1
    assert torch.linalg.matrix_norm(average.flatten(1), 2) == pytest.approx(1)
    assert torch.linalg.matrix_norm(dense(average, 1), 2) > 1.6
    assert torch.linalg.matrix_norm(dense(normalised(average, 1.0), 1), 2) <= 1


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 5)])
def test_orthogonal_weights_have_equal_singular_values(shape):
    raw = torch.randn(shape, dtype=torch.float64)
    values = torch.linalg.svdvals(orthogonal(raw, 0.9))
    torch.testing.assert_close(values, torch.full_like(values, 0.9), rtol=1e-10, atol=0)
    assert values.max() <= 0.9 * (1 + 1e-15)


@pytest.mark.parametrize("shape", [(96, 48), (48, 96), (3, 3)])
@pytest.mark.parametrize("form", [normalised, orthogonal])
def test_rounding_to_single_precision_stays_below_the_bound(form, shape):
    for seed in range(20):
        raw = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        assert torch.linalg.matrix_norm(form(raw, 0.9).double(), 2) <= 0.9


@pytest.mark.parametrize("axes", [1, 2])
def test_shifts_keep_the_norm_of_every_state_away_from_the_border(axes):
    block = certified(axes, parametrisation="orthogonal")
    x = torch.zeros(3, 6, *[9] * axes, dtype=torch.float64)
    centre = (slice(None), slice(None), *[4] * axes)
    x[centre] = torch.randn(3, 6, dtype=torch.float64)
    first = block.prepare(x).shared[0]
    torch.testing.assert_close(convolve(x, first).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("axes", [0, 1, 2])
def test_no_pair_of_states_parts_faster_than_kappa(axes, activation, form):
    """Search for the worst pair: power steps on the difference, from states of all sizes."""
    block = certified(axes, activation=activation, parametrisation=form)
    prepared = block.prepare(state(axes, samples=16))
    sizes = torch.logspace(-3, 1, 16, dtype=torch.float64).view(-1, *[1] * (axes + 1))
    here = sizes * state(axes, samples=16, seed=2)
    for reach in (1e-3, 1.0, 10.0):
        difference = state(axes, samples=16, seed=3)
        for _ in range(20):
            length = difference.flatten(1).norm(dim=1).clamp_min(1e-300)
            difference = difference * (reach / length).view(-1, *[1] * (axes + 1))
            image = block(here + difference, prepared) - block(here, prepared)
            # Differences of states of size 10 are known to 1e-15 of that, relative to the reach.
            assert image.flatten(1).norm(dim=1).max() <= reach * (0.9 + 1e-11)
            leaf = difference.detach().requires_grad_()
            (difference,) = torch.autograd.grad(
                (block(here + leaf, prepared) - block(here, prepared)).square().sum(), leaf
            )
            difference = difference + 1e-6 * state(axes, samples=16, seed=4)  # dead directions start again


def test_a_chain_of_three_weights_contracts():
    block = certified(2, hidden=(4, 4), kernel_size=(1, 3, 1))
    x = state(2)
    prepared = block.prepare(x)
    estimate = lipschitz_estimate(lambda h: block(h, prepared), x, generator=torch.Generator().manual_seed(0))
    assert estimate.max() <= 0.9
    assert block.certificate() <= 0.9
    assert sum(p.numel() for p in block.parameters()) == 2 * 6 * 4 + 4 * 4 * 9 + 6 * 4 + 4 + 4


def test_orthogonal_weights_damp_nothing_where_the_nonlinearity_does_not():
    """With `maxmin` and square weights all singular values of the Jacobian are kappa; ReLU drops some."""
    spectra = {}
    for activation in ("maxmin", "abs", "relu"):
        block = certified(hidden=(6,), activation=activation, parametrisation="orthogonal")
        x = state(0, samples=1)
        rows, shared = block.prepare(x)
        jacobian = torch.autograd.functional.jacobian(lambda h: block(h, Prepared(rows, shared)), x)  # noqa: B023
        spectra[activation] = torch.linalg.svdvals(jacobian[0, :, 0])
    for activation in ("maxmin", "abs"):
        torch.testing.assert_close(
            spectra[activation], torch.full_like(spectra["abs"], 0.9), rtol=1e-9, atol=0
        )
    assert spectra["relu"][-1] < 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_the_constant_can_follow_a_schedule(form):
    block = certified(parametrisation=form)
    for kappa in (0.5, 0.99):
        block.set_kappa(kappa)
        _, last = block.prepare(state(0)).shared
        assert kappa * 0.99 <= torch.linalg.matrix_norm(last, 2) <= kappa
        assert block.certificate() <= kappa
    other = certified(parametrisation=form)
    other.load_state_dict(block.state_dict())
    assert other.kappa == block.kappa  # the constant travels with the weights


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("axes", [0, 1])
def test_weights_have_exact_gradients(axes, form):
    raw = torch.randn(3, 2, *[3] * (axes if form == "normalised" else 0), dtype=torch.float64)
    make = normalised if form == "normalised" else orthogonal
    assert torch.autograd.gradcheck(lambda raw: make(raw, 0.9), raw.requires_grad_())


def test_max_min_is_a_permutation_of_each_pair():
    x = torch.randn(4, 6, 5)
    image = max_min(x)
    torch.testing.assert_close(image[:, :3], torch.maximum(x[:, :3], x[:, 3:]))
    torch.testing.assert_close(image[:, 3:], torch.minimum(x[:, :3], x[:, 3:]))
    torch.testing.assert_close(image.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))


def test_the_channel_norm_shares_nothing_between_places_or_samples():
    x, weight, bias = torch.randn(3, 6, 5), torch.randn(6), torch.randn(6)
    image = channel_norm(x, weight, bias)
    torch.testing.assert_close(image[1, :, 2], torch.nn.functional.layer_norm(x[1, :, 2], (6,), weight, bias))


@pytest.mark.parametrize(
    ("block", "axes"),
    [
        (lambda **o: Block(6, axes=0, **o), 0),
        (lambda **o: Block(6, axes=1, **o), 1),
        (lambda **o: Block(6, axes=2, dilation=2, **o), 2),
        (lambda **o: Bottleneck(6, 4, groups=2, **o), 2),
        (lambda **o: AttentionBlock(6, 3, **o), 1),
        (lambda **o: Certified(6, axes=0, **o), 0),
        (lambda **o: Certified(6, axes=1, **o), 1),
        (lambda **o: Certified(6, axes=2, activation="maxmin", **o), 2),
        (lambda **o: Certified(6, axes=1, parametrisation="orthogonal", **o), 1),
    ],
)
def test_every_transition_keeps_shapes_and_samples_apart_on_every_device(block, axes, device):
    net = block(device=device, generator=torch.Generator().manual_seed(0))
    x = state(axes, dtype=torch.float32).to(device)
    prepared = net.prepare(x)
    image = net(x, prepared)
    assert image.shape == x.shape
    alone = net(x[1:2], net.prepare(x[1:2]))
    torch.testing.assert_close(alone.cpu(), image[1:2].cpu(), rtol=1e-4, atol=1e-5)
    image.square().sum().backward()
    assert all(p.grad is not None and p.grad.device.type == device.type for p in net.parameters())


def test_the_same_generator_gives_the_same_weights_on_every_device(device):
    here, there = (
        Certified(6, axes=1, generator=torch.Generator().manual_seed(3), device=where)
        for where in ("cpu", device)
    )
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here.parameters(), there.parameters(), strict=True))


def test_the_sizes_of_the_paper():
    def weights(net):
        return sum(p.numel() for p in net.parameters() if p.dim() > 1)

    assert weights(Bottleneck()) == 69_632
    assert sum(p.numel() for p in AttentionBlock().parameters()) == 7_087_872


def test_attention_is_the_block_of_a_vision_transformer():
    """Beside torch's own encoder layer with the norm first, given the same weights."""
    block = AttentionBlock(8, 2, generator=torch.Generator().manual_seed(0))
    layer = torch.nn.TransformerEncoderLayer(
        8, 2, 32, dropout=0.0, activation="gelu", norm_first=True, batch_first=True
    )
    own = [*block.weights, *block.biases, block.gain1, block.shift1, block.gain2, block.shift2]
    for p in own[-4:]:
        torch.nn.init.normal_(p)
    attention = layer.self_attn
    theirs = [
        attention.in_proj_weight,
        attention.out_proj.weight,
        layer.linear1.weight,
        layer.linear2.weight,
        attention.in_proj_bias,
        attention.out_proj.bias,
        layer.linear1.bias,
        layer.linear2.bias,
        layer.norm1.weight,
        layer.norm1.bias,
        layer.norm2.weight,
        layer.norm2.bias,
    ]
    with torch.no_grad():
        for source, target in zip(own, theirs, strict=True):
            target.copy_(source)
    h = torch.randn(3, 5, 8)
    torch.testing.assert_close(h + block(h.mT, Prepared()).mT, layer(h))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Certified(6, activation="gelu"), "GELU reaches 1.13"),
        (lambda: Certified(6, activation="silu"), "SiLU 1.10"),
        (lambda: Certified(6, activation="sin"), "activation must be one of"),
        (lambda: Certified(6, kappa=1.0), "kappa must lie in"),
        (lambda: Certified(6, kappa=0.0), "kappa must lie in"),
        (lambda: Certified(6).set_kappa(1.2), "kappa must lie in"),
        (lambda: Block(6).set_kappa(0.5), "kappa belongs to certified"),
        (lambda: Certified(6, parametrisation="clipped"), "parametrisation must be"),
        (lambda: Certified(6, hidden=(5,), activation="maxmin"), "hidden must be even"),
        (lambda: Certified(6, hidden=(4, 4), kernel_size=(3, 3)), "kernel_size must have 3 entries"),
        (lambda: Certified(6, axes=1, kernel_size=4), "kernel_size must be odd"),
        (lambda: Certified(6, hidden=(0,)), "hidden must be at least 1"),
        (lambda: Block(0), "width must be at least 1"),
        (lambda: Block(6, axes=3), "axes must be"),
        (lambda: Block(6, axes=1, kernel_size=2), "kernel_size must be odd"),
        (lambda: Block(6, dilation=0), "dilation must be at least 1"),
        (lambda: Bottleneck(6, 4, groups=4), "groups must divide"),
        (lambda: AttentionBlock(6, 4), "heads must divide"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_transition_of_ones_own_needs_only_a_forward():
    class Half(Transition):
        def forward(self, state, prepared):
            return 0.5 * state

    assert Half().kappa is None
    assert Half(0.5).kappa == 0.5
    assert Half().prepare(torch.zeros(1, 2)) == ((), ())
