"""What a head captures and adds, and the two bounds on what its removal does."""

import pytest
import torch
from torch.nn.functional import layer_norm

from geomlib.incrt import (
    DirectionalAttention,
    antisym,
    directional_energy,
    output_bounds,
    prune_report,
    regrow_bound,
    residual_operator,
)

D = 12


def attention(heads=4, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return DirectionalAttention(
        D, 5, 3, max_heads=6, heads=heads, generator=generator, **{"dtype": torch.float64} | options
    )


def tokens(seed, batch=4, n=7, dtype=torch.float64):
    x = torch.randn(batch, n, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return layer_norm(x, [D])


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_removal_changes_each_row_by_that_of_the_head_which_is_below_its_bound(batch):
    x = tokens(batch)
    for head in range(4):
        layer = attention()
        report, before, outputs = prune_report(layer, x), layer(x), layer.head_outputs(x)
        layer.prune(head)
        change = (before - layer(x)).norm(dim=-1)
        torch.testing.assert_close(change, outputs[:, head].norm(dim=-1))
        torch.testing.assert_close(change.max(), report.largest[head])
        torch.testing.assert_close(change.mean(), report.output[head])
        assert change.max() <= report.bound[head]


def test_the_output_bound_is_that_of_the_dense_value_path_and_is_reached():
    layer = attention()
    dense = torch.linalg.matrix_norm(layer.W_V @ layer.W_O, ord=2)
    torch.testing.assert_close(output_bounds(layer, 2.0), 2 * dense)
    # One token alone is its own mean: along the first singular direction the bound is met.
    for head in range(4):
        longest = torch.linalg.svd((layer.W_V @ layer.W_O)[head]).U[:, 0]
        out = layer.head_outputs(2 * longest.view(1, 1, D))[0, head]
        torch.testing.assert_close(out.norm(), 2 * dense[head])


def test_padding_is_not_counted():
    layer, x = attention(), tokens(0)
    padded = torch.cat([x, 100 * tokens(1, n=3)], 1)
    mask = torch.arange(10).expand(4, 10) < 7
    ours, theirs = prune_report(layer, padded, mask), prune_report(layer, x)
    for name in ("energy", "output", "largest", "bound"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))


def test_an_empty_batch_of_padding_is_judged_without_nan():
    report = prune_report(attention(), tokens(0), torch.zeros(4, 7, dtype=torch.bool))
    assert all((getattr(report, name) == 0).all() for name in ("energy", "output", "largest", "bound"))


def test_directional_energy_is_that_of_the_dense_form():
    layer, x = attention(), tokens(0)
    S = x.flatten(0, 1).T @ x.flatten(0, 1) / 28
    dense = [(S @ antisym(layer.W_Q[h] @ layer.W_K[h].T)).norm() for h in range(4)]
    torch.testing.assert_close(directional_energy(S, layer.W_Q, layer.W_K), torch.stack(dense))


def test_a_symmetric_head_captures_nothing_and_adds_as_much_as_the_others():
    """So captured energy alone is no reason to remove a head (INCRT-15)."""
    layer, x = attention(), tokens(0)
    with torch.no_grad():
        layer.W_in[1, 5:10] = layer.W_in[1, :5]
    report = prune_report(layer, x)
    assert report.energy[1] <= 1e-7 * report.energy.max()
    assert report.output[1] >= 0.5 * report.output.median()


def test_the_signal_after_a_removal_is_below_the_regrow_bound():
    """300 random operators, sets of directions and choices among them."""
    generator = torch.Generator().manual_seed(0)
    tight = 0.0
    for _ in range(300):
        d, m = 10, int(torch.randint(1, 8, (), generator=generator))
        root = torch.randn(d, d, generator=generator, dtype=torch.float64)
        S = root @ root.T / d
        Ma = antisym(torch.randn(d, d, generator=generator, dtype=torch.float64))
        Q = torch.linalg.qr(torch.randn(d, m, generator=generator, dtype=torch.float64)).Q
        column = int(torch.randint(m, (), generator=generator))
        kept = torch.cat([Q[:, :column], Q[:, column + 1 :]], 1)
        after = torch.linalg.eigvalsh(residual_operator(S, Ma, kept))[-1]
        bound = regrow_bound(S, Ma, Q, column)
        assert after <= bound + 1e-12
        tight = max(tight, (after / bound).item())
    assert tight >= 0.9


def test_reports_in_half_precision_are_computed_in_single():
    layer = attention(dtype=torch.bfloat16)
    report = prune_report(layer, tokens(0, dtype=torch.bfloat16))
    assert report.energy.dtype == report.bound.dtype == torch.float32
    assert (report.largest <= 1.02 * report.bound).all()  # outputs themselves are rounded to three digits


def test_a_mean_over_heads_reports_shares():
    x = tokens(0)
    whole, share = prune_report(attention(), x), prune_report(attention(aggregate="mean"), x)
    torch.testing.assert_close(share.largest, whole.largest / 4)
    torch.testing.assert_close(share.bound, whole.bound / 4)
    assert share.regrow.isnan().all()


def test_what_does_not_fit_is_refused():
    S, Ma, Q = torch.eye(3), torch.zeros(3, 3), torch.eye(3)[:, :2]
    for column in (-1, 2):
        with pytest.raises(ValueError, match="column must lie in"):
            regrow_bound(S, Ma, Q, column)
    with pytest.raises(ValueError, match="queries and keys"):
        directional_energy(S, torch.zeros(1, 3, 2), torch.zeros(1, 3, 4))
