"""The ready models: sizes, receptive fields, and parameter counts beside the paper's table."""

import pytest
import torch

from geomlib.frost import KINDS, MODES, Frost, image, resnet50, sequence, vector, vit_b16


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def backbone(model):
    """Count without classifier and halting head, as the table of the paper does."""
    return count(model) - count(model.classifier, model.halting, model.halting_norm)


# What the reference prototypes counted, in which every model carried the scalars rho and hurst. Here the
# exponent is a buffer, and only Frost has a scale.
VECTOR = {
    "euler": 39_373,
    "leaky": 39_373,
    "basic_ssm": 39_373,
    "certified": 47_117,
    "recurrent": 27_085,
    "vanilla": 213_645,
}
SEQUENCE = {
    "euler": 9_247,
    "leaky": 9_247,
    "basic_ssm": 9_247,
    "certified": 12_535,
    "recurrent": 7_519,
    "vanilla": 85_927,
}


@pytest.mark.parametrize("mode", VECTOR)
def test_small_models_have_the_sizes_of_the_prototypes(mode):
    idle = 1 if mode in MODES else 2
    assert count(vector(144, 10, mode=mode)) == VECTOR[mode] - idle
    assert count(sequence(6, 4, mode=mode)) == SEQUENCE[mode] - idle
    if mode in MODES:
        assert count(vector(144, 10, mode=mode, learn_hurst=True)) == VECTOR[mode]


def test_orthogonal_sequences_need_a_third_of_the_weights():
    dense, shifted = (sequence(6, 4, parametrisation=form) for form in ("normalised", "orthogonal"))
    assert count(dense) - count(shifted) == 2 * 2 * 24 * 48


@pytest.mark.parametrize("mode", KINDS)
def test_every_factory_makes_every_mode(mode):
    for model, x in (
        (vector(5, 3, width=8, mode=mode), torch.randn(2, 5)),
        (sequence(2, 3, width=8, mode=mode), torch.randn(2, 2, 9)),
        (image(1, 3, width=8, mode=mode, steps=3), torch.randn(2, 1, 10, 13)),
    ):
        trajectory = model(x)
        assert trajectory.logits.shape == (2, model.steps, 3)
        assert trajectory.scores.shape == (2, model.steps)
        assert isinstance(model, Frost) == (mode in MODES)


def test_an_image_loses_what_does_not_fill_a_patch():
    assert image(1, 3, width=8)(torch.randn(2, 1, 10, 13)).state.shape == (2, 8, 2, 3)


@pytest.mark.parametrize(("kernel_size", "dilation", "reach"), [(3, 1, 2), (5, 1, 4), (3, 2, 4)])
@pytest.mark.parametrize("form", ["normalised", "orthogonal"])
def test_a_step_carries_information_as_far_as_promised(kernel_size, dilation, reach, form):
    """What is read at place 0 after `t` steps hangs on the places up to `t * reach`, and on no other."""
    model = sequence(
        2,
        3,
        width=12,
        kernel_size=kernel_size,
        dilation=dilation,
        parametrisation=form,
        activation="tanh",
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(0),
    )
    x = torch.randn(1, 2, 24, dtype=torch.float64, requires_grad=True)
    for steps in (1, 2, 3):
        trajectory = model(x, steps=steps)
        # From a zero state the input enters through U at once, as far as its kernel reaches.
        reached = (steps - 1) * reach + reach
        (gradient,) = torch.autograd.grad(trajectory.scores[:, -1].sum(), x)
        seen = gradient[0].abs().sum(0) > 0
        assert seen[: reached + 1].any()
        assert seen.nonzero().max() == reached
        assert not seen[reached + 1 :].any()


def test_the_paper_s_transformer_has_the_parameters_of_its_table():
    # Table 3 prints 85.80 M untied and 7.83 M tied.
    tied = vit_b16(100, mode="recurrent")
    assert backbone(tied) == 7_832_064
    untied = backbone(tied) + 11 * count(tied.transition)
    assert untied == 85_798_656
    assert round(untied / 1e6, 2) == 85.80
    assert round(backbone(tied) / 1e6, 2) == 7.83
    # Its state-space models have 20.81 M; three linear maps of the state explain a tenth of the difference.
    assert backbone(vit_b16(100, mode="basic_ssm")) == 7_832_064 + 3 * 768**2


def test_the_paper_s_convolutional_model_agrees_where_it_is_tied():
    # Table 3 prints 0.11 M tied, 1.24 M untied.
    tied = resnet50(100, mode="recurrent")
    assert round(backbone(tied) / 1e6, 2) == 0.11
    assert backbone(tied) + 15 * count(tied.transition) == 1_165_312
    assert count(resnet50(100, mode="euler")) - count(tied) == 3 * 256**2 + 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: resnet50(5, mode="euler", steps=2),
        lambda: resnet50(5, mode="certified", steps=2),
        lambda: resnet50(5, mode="vanilla", steps=2),
        lambda: vit_b16(5, mode="euler", steps=2, size=32),
    ],
)
def test_the_paper_s_models_run_and_learn(make):
    model = make()
    trajectory = model(torch.randn(1, 3, 32, 32))
    (trajectory.final.sum() + trajectory.scores.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert trajectory.logits.shape == (1, 2, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vector(5, 3, mode="resnet"), "mode must be one of"),
        (lambda: vector(5, 3, steps=0, mode="vanilla"), "steps must be at least 1"),
        (lambda: vector(0, 3), "must be at least 1"),
        (lambda: sequence(2, 3, kernel_size=4), "kernel_size must be odd"),
        (lambda: sequence(2, 3, activation="gelu"), "activation must be one of"),
        (lambda: sequence(2, 3)(torch.randn(2, 3, 9)), r"inputs must be \(N, 2\)"),
        (lambda: image(1, 3, patch=0), "patch must be at least 1"),
        (lambda: image(1, 3)(torch.randn(2, 28, 28)), r"inputs must be \(N, 1, H, W\)"),
        (lambda: vit_b16(3, mode="certified"), "attention has no global Lipschitz constant"),
        (lambda: vit_b16(3, size=40), "size must be a multiple of 16"),
        (lambda: vit_b16(3, size=32, steps=1)(torch.randn(1, 3, 48, 48)), "inputs must be 32 pixels"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
