"""One network per orbit: functions kept, scrambled twins brought together, the rest refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from geomlib.weightspace import haar_exponent
from geomlib.weightspace.canonical import canonicalize, order, relabel, rescale, same_function
from geomlib.weightspace.layers import layer_dimension, model_report
from geomlib.weightspace.symmetry import permute_pair, rescale_pair
from geomlib.weightspace.units import trace


def mlp(activation=nn.ReLU):
    return nn.Sequential(
        nn.Linear(20, 64), activation(), nn.Dropout(0.1), nn.Linear(64, 48), activation(), nn.Linear(48, 5)
    )


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 4, 20),
        nn.LeakyReLU(0.1),
        nn.Linear(20, 5),
    )


class Block(nn.Module):
    """A residual block with or without batch norm."""

    def __init__(self, width, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(width, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(6, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width) if norm else nn.Identity()

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    def __init__(self, norm=True):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8, norm), Block(8, norm))
        self.out = nn.Linear(8, 5)

    def forward(self, x):
        x = F.max_pool2d(self.stem(x).relu(), 2)
        return self.out(self.blocks(x).mean((2, 3)))


class Mobile(nn.Module):
    """Depthwise and transposed convolutions, and a norm layer over the units."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 2)
        self.norm = nn.GroupNorm(1, 6)
        self.out = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = F.relu(self.depthwise(F.relu(self.stem(x))))
        return self.out(F.gelu(self.norm(self.up(x)))).flatten(1)


class PreNorm(nn.Module):
    """A residual stream that layer norms read, as in transformers."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Linear(20, 16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.last, self.out = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.down(F.relu(self.up(self.norm(x))))
        return self.out(self.last(x))


class Branches(nn.Module):
    """A sum of two branches: what one of them does not commute with binds both."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.out = nn.Linear(20, 16), nn.Linear(20, 16), nn.Linear(16, 5)

    def forward(self, x):
        return self.out(F.leaky_relu(self.left(x)) + torch.tanh(self.right(x)))


NETS = {
    "mlp": (mlp, (20,)),
    "tanh": (lambda: mlp(nn.Tanh), (20,)),
    "gelu": (lambda: mlp(nn.GELU), (20,)),
    "cnn": (cnn, (3, 8, 8)),
    "resnet": (ResNet, (3, 8, 8)),
    "plain resnet": (lambda: ResNet(norm=False), (3, 8, 8)),
    "mobile": (Mobile, (3, 8, 8)),
    "prenorm": (PreNorm, (20,)),
    "branches": (Branches, (20,)),
}


def build(name, dtype=torch.float64, device="cpu"):
    """Return a network with nothing left at its default: norms have slopes, shifts and statistics."""
    torch.manual_seed(0)
    make, shape = NETS[name]
    net = make().to(dtype)
    with torch.no_grad():
        for tensor in [*net.parameters(), *net.buffers()]:
            if tensor.ndim == 1:
                tensor.add_(0.3 * torch.rand_like(tensor))
        for module in net.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
                module.weight.mul_(torch.randn_like(module.weight).sign())
    return net.to(device).eval(), torch.randn(6, *shape, dtype=dtype).to(device)


def scramble(net, inputs, generator):
    """Take a random step of every symmetry that the network has."""
    twin, units = copy.deepcopy(net), trace(net)
    with torch.no_grad():
        for domain in units.domains():
            if domain.makers and (domain.positive or domain.odd):
                size = len(domain.makers[0].of(net).transpose(0, domain.makers[0].axis))
                factor = torch.ones(size, dtype=torch.float64)
                if domain.positive:
                    factor = torch.randn(size, generator=generator, dtype=torch.float64).exp()
                if domain.odd:
                    factor = factor * torch.randn(size, generator=generator).sign()
                rescale(twin, domain, factor)
        for space in units.spaces():
            relabel(twin, space, torch.randperm(space.size, generator=generator))
    same_function(net, twin, inputs)
    return twin


@pytest.mark.parametrize("name", NETS)
def test_canonical_networks_compute_the_same_function(name, device):
    net, inputs = build(name, torch.float32, device)
    canonical = canonicalize(net)
    torch.testing.assert_close(canonical(inputs), net(inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_scrambled_twins_have_one_canonical_form(name, generator):
    net, inputs = build(name)
    twin = scramble(net, inputs, generator)
    mine, theirs = (
        canonicalize(net, inputs=inputs).state_dict(),
        canonicalize(twin, inputs=inputs).state_dict(),
    )
    assert any(not torch.allclose(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    for key, value in mine.items():
        torch.testing.assert_close(
            theirs[key], value, rtol=1e-10, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("name", NETS)
def test_canonical_networks_are_their_own_form(name):
    net, _ = build(name)
    once = canonicalize(net)
    for a, b in zip(once.parameters(), canonicalize(once).parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_dimension_belongs_to_the_orbit_after_canonicalisation_only(generator):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 5)
    ).double()
    inputs = torch.randn(8, 20, dtype=torch.float64)
    twin = net
    for layer in ("0", "2"):
        twin = rescale_pair(twin, layer, 1.0, inputs=inputs, generator=generator)
        twin = permute_pair(twin, layer, inputs=inputs, generator=generator)
    raw, scrambled, mine, theirs = (
        layer_dimension(n[2].weight).D for n in (net, twin, canonicalize(net), canonicalize(twin))
    )
    assert mine == theirs
    assert raw - scrambled > 0.01
    assert raw - mine > 0.005  # sorting makes structure: the null must be sorted too


def test_canonical_rows_have_norm_one_and_columns_fall():
    net, _ = build("mlp")
    canonical = canonicalize(net)
    torch.testing.assert_close(canonical[0].weight.norm(dim=1), torch.ones(64, dtype=torch.float64))
    assert (canonical[3].weight.norm(dim=0).diff() <= 0).all()


def test_dead_units_keep_their_scale():
    net, inputs = build("mlp")
    with torch.no_grad():
        net[0].weight[3] = 0
    canonicalize(net, inputs=inputs)


def test_a_sum_commutes_with_what_both_parts_commute_with():
    units = trace(Branches())
    assert units.domain_of("left") is units.domain_of("right")
    assert not units.domain_of("left").positive
    assert not units.domain_of("left").odd


def test_the_network_itself_is_left_alone():
    net, _ = build("cnn")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    canonicalize(net.train())
    assert net.training
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_a_layer_called_twice_has_one_set_of_units(generator):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.core, self.out = nn.Linear(20, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x):
            x = F.relu(self.stem(x))
            return self.out(F.relu(self.core(F.relu(self.core(x)))))

    net, inputs = Twice().double(), torch.randn(4, 20, dtype=torch.float64)
    assert [space.size for space in trace(net).spaces()] == [8]
    twin = scramble(net, inputs, generator)
    for a, b in zip(canonicalize(net).parameters(), canonicalize(twin).parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_inputs_may_be_reshaped_and_normalised_first(generator):
    class Shaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.fold, self.conv, self.out = nn.Unflatten(1, (3, 8)), nn.Conv1d(3, 6, 3), nn.Linear(36, 5)

        def forward(self, x):
            x = self.fold((x - 0.5) / 2)
            return self.out(F.relu(self.conv(x)).flatten(1))

    net, inputs = Shaped().double(), torch.randn(4, 24, dtype=torch.float64)
    assert [space.size for space in trace(net).spaces()] == [6]
    twin = scramble(net, inputs, generator)
    for a, b in zip(canonicalize(net).parameters(), canonicalize(twin).parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_resnet_18_has_its_streams_and_inner_units():
    torchvision = pytest.importorskip("torchvision")
    spaces = trace(torchvision.models.resnet18()).spaces()
    # Four streams and one space inside each of the eight blocks.
    assert sorted(space.size for space in spaces) == sorted([64, 128, 256, 512] * 3)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_networks_of_torchvision_keep_their_function(name, generator):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    net = getattr(models, name)().double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    inputs = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    net.eval()
    twin = scramble(net, inputs, generator)
    mine, theirs = canonicalize(net, inputs=inputs), canonicalize(twin, inputs=inputs)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def refuse(module, forward):
    """Build a network around one layer."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.part, self.out = nn.Linear(20, 8), module, nn.Linear(8, 5)

        def forward(self, x):
            return self.out(forward(self, torch.relu(self.stem(x))))

    return Net()


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (refuse(nn.MultiheadAttention(8, 2), lambda s, x: s.part(x, x, x)[0]), "MultiheadAttention"),
        (refuse(nn.PReLU(8), lambda s, x: s.part(x)), "layer 'part' is a PReLU"),
        (refuse(nn.Bilinear(8, 8, 8), lambda s, x: s.part(x, x)), "layer 'part' is a Bilinear"),
        (refuse(None, lambda s, x: torch.cat([x[:, :4], x[:, 4:]], 1)), "calls getitem"),
        (refuse(None, lambda s, x: x * x), "calls mul"),
        (refuse(None, lambda s, x: x + 1), "calls add"),
        (refuse(None, lambda s, x: x if x.sum() > 0 else -x), "must be traceable"),
        (refuse(nn.Linear(8, 1), lambda s, x: x + s.part(x)), "adds 8 units to 1"),
        (refuse(nn.Parameter(torch.ones(8)), lambda s, x: x + s.part), "reads the tensor 'part'"),
        (nn.Sequential(nn.Conv2d(4, 8, 1, groups=2)), "one group or one per channel"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), "remove the parametrisation"),
        (nn.Sequential(nn.Linear(4, 6), nn.Flatten(), nn.BatchNorm1d(12)), "must hold 6 units"),
        (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(12, 2)), "must read 6 units"),
    ],
)
def test_what_cannot_be_followed_is_named(net, message):
    with pytest.raises(ValueError, match=message):
        canonicalize(net)


def test_tied_layers_are_named():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    with pytest.raises(ValueError, match=r"2.weight is shared with 0"):
        canonicalize(net)


def test_two_functions_are_told_apart():
    net, inputs = build("mlp")
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[0].bias[0] += 1
    with pytest.raises(RuntimeError, match="the networks differ by"):
        same_function(net, other, inputs)
    with torch.no_grad():
        other[0].bias[0] = torch.nan
    with pytest.raises(RuntimeError, match="the networks differ by nan"):
        same_function(net, other, inputs)


def test_factors_and_permutations_that_change_the_function_are_refused():
    net, _ = build("tanh")
    units = trace(net)
    with pytest.raises(ValueError, match=r"readers of these units commute with \(positive factors: False"):
        rescale(net, units.domain_of("0"), torch.full((64,), 2.0))
    with pytest.raises(ValueError, match="each of the 64 units once"):
        relabel(net, units.space_of("0"), torch.zeros(64, dtype=torch.int64))
    with pytest.raises(ValueError, match="layer must be one of 0, 3, 5, got '7'"):
        units.domain_of("7")


@pytest.mark.parametrize("how", ["norm", "seriation"])
def test_order_does_not_depend_on_the_numbering(how, generator):
    for shape in [(12, 9), (8, 6, 3, 3)]:
        W = torch.randn(shape, generator=generator, dtype=torch.float64)
        rows, columns = (torch.randperm(n, generator=generator) for n in shape[:2])
        torch.testing.assert_close(order(W[rows][:, columns], how), order(W, how))


def test_seriation_recovers_a_smooth_matrix(generator):
    x = torch.linspace(1, 2, 64, dtype=torch.float64)
    smooth = torch.exp(-((x[:, None] - 1) ** 2)) * torch.exp(-((x[None] - 1) ** 2))
    shuffled = smooth[torch.randperm(64, generator=generator)][:, torch.randperm(64, generator=generator)]
    assert haar_exponent(shuffled).zeta < -1
    torch.testing.assert_close(order(shuffled, "seriation"), smooth)
    assert torch.equal(order(shuffled, "none"), shuffled)


def test_bad_orders_are_refused():
    with pytest.raises(ValueError, match="how must be none, norm or seriation"):
        order(torch.ones(2, 2), "size")
    with pytest.raises(ValueError, match="rows and columns"):
        order(torch.ones(2))


def test_reports_of_twins_agree_after_canonicalisation(generator):
    net, inputs = build("cnn")
    twin = scramble(net, inputs, generator)
    mine, theirs = (model_report(canonicalize(n), window="full") for n in (net, twin))
    assert [r.fit.counts for r in mine] == [r.fit.counts for r in theirs]
