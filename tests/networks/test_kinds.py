"""LoKr and LoHa, layer by layer: what they compute, how they start, what LyCORIS and PEFT make of the same numbers."""

import pytest
import torch
from torch import nn

from networks.loha import LohaLayer, LohaWeights
from networks.lokr import LokrLayer, LokrPlan, factorise, plan_factors, plan_of
from networks.wrapping import Dropouts, layer_size
from tests.networks.adapter_fixtures import randomise


def linear():
    torch.manual_seed(1)
    return nn.Linear(24, 40)


def conv():
    torch.manual_seed(1)
    return nn.Conv2d(12, 20, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))


def pointwise():
    torch.manual_seed(1)
    return nn.Conv2d(12, 20, 1)


def narrowing():
    torch.manual_seed(1)
    return nn.Linear(40, 24)


def narrowing_pointwise():
    torch.manual_seed(1)
    return nn.Conv2d(20, 12, 1)


BASES = {
    "linear": (linear, torch.randn(2, 5, 24)),
    "vectors": (linear, torch.randn(3, 24)),
    "convolution": (conv, torch.randn(2, 12, 9, 8)),
    "narrowing": (narrowing, torch.randn(2, 5, 40)),
    "narrowing pointwise": (narrowing_pointwise, torch.randn(2, 20, 5, 4)),
    "pointwise": (pointwise, torch.randn(2, 12, 5, 4)),
}
PLANS = {
    "low rank": {"rank": 2, "factor": 4},
    "whole": {"rank": 100, "factor": 4},
    "both low rank": {"rank": 1, "factor": 4, "decompose_both": True},
    "as equal as can be": {"rank": 1, "factor": -1},
    "full matrix": {"rank": 1, "factor": 2, "full_matrix": True},
}


def plan(base, *, rank, factor, decompose_both=False, full_matrix=False):
    return plan_factors(
        layer_size(base), rank=rank, factor=factor, decompose_both=decompose_both, full_matrix=full_matrix
    )


def lokr(base, alpha=3.0, dropouts=None, **options):
    options = options or PLANS["low rank"]
    return randomise(
        LokrLayer(base, component="denoiser", plan=plan(base, **options), alpha=alpha, dropouts=dropouts or Dropouts())
    )


def loha(base, alpha=3.0, dropouts=None, rank=2):
    return randomise(
        LohaLayer(base, component="denoiser", rank=rank, alpha=alpha, dropouts=dropouts or Dropouts()), seed=3
    )


LAYERS = {**{f"lokr {name}": (lokr, options) for name, options in PLANS.items()}, "loha": (loha, {"rank": 3})}


def merged(base, update):
    with torch.no_grad():
        base.weight += update.reshape(base.weight.shape)
    return base


@pytest.mark.parametrize(("make", "x"), BASES.values(), ids=BASES)
@pytest.mark.parametrize(("kind", "options"), LAYERS.values(), ids=LAYERS)
def test_output_is_that_of_merged_weights(make, x, kind, options):
    base = make()
    plain = base(x)
    layer = kind(base, **options)
    delta = layer.weights().delta()
    torch.testing.assert_close(base(x), merged(make(), delta)(x), atol=1e-5, rtol=1e-5)
    assert (base(x) - plain).abs().max() > 1e-3
    layer.multiplier = -0.5
    torch.testing.assert_close(base(x), merged(make(), -0.5 * delta)(x), atol=1e-5, rtol=1e-5)
    layer.enabled = False
    assert torch.equal(base(x), plain)
    torch.testing.assert_close(layer.norm(), delta.norm())


def test_the_kronecker_product_entry_by_entry():
    layer = lokr(linear(), alpha=1.0, rank=2, factor=4)
    assert layer.plan == LokrPlan((4, 4), (10, 6), None, 2)
    w1 = layer.lokr_w1
    w2 = layer.lokr_w2_a @ layer.lokr_w2_b
    delta = layer.weights().delta()
    assert delta.shape == (40, 24)
    for row, column in ((0, 0), (13, 7), (39, 23), (5, 20)):
        expected = 1.0 / 2 * w1[row // 10, column // 6] * w2[row % 10, column % 6]
        torch.testing.assert_close(delta[row, column], expected)


def test_the_hadamard_product_entry_by_entry():
    layer = loha(linear(), alpha=1.0, rank=3)
    delta = layer.weights().delta()
    for row, column in ((0, 0), (13, 7), (39, 23)):
        first = sum(layer.hada_w1_a[row, k] * layer.hada_w1_b[k, column] for k in range(3))
        second = sum(layer.hada_w2_a[row, k] * layer.hada_w2_b[k, column] for k in range(3))
        torch.testing.assert_close(delta[row, column], first * second / 3)


@pytest.mark.parametrize(("make", "x"), BASES.values(), ids=BASES)
@pytest.mark.parametrize(("kind", "options"), LAYERS.values(), ids=LAYERS)
def test_gradients_are_those_of_the_written_out_product(make, x, kind, options):
    def gradients(written_out):
        base = make().requires_grad_(False)
        layer = kind(base, **options)
        inputs = x.clone().requires_grad_(True)
        if written_out:
            w = layer._weights() if isinstance(layer, LokrLayer) else LohaWeights(*layer.parameters(), layer.alpha)
            weight = base.weight + w.delta().reshape(base.weight.shape)
            output = torch.func.functional_call(make(), {"weight": weight, "bias": base.bias}, inputs)
        else:
            output = base(inputs)
        (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum().backward()
        return [inputs.grad, *(parameter.grad for parameter in layer.parameters())]

    for own, expected in zip(gradients(False), gradients(True)):
        torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "options"), LAYERS.values(), ids=LAYERS)
def test_starts_at_zero_and_follows_seed_and_name(kind, options):
    x = torch.randn(2, 24)
    plain = linear()(x)
    layers = []
    for name, seed in (("a", 0), ("a", 0), ("b", 0), ("a", 1)):
        torch.manual_seed(len(layers))
        layer = kind(linear(), **options)
        state = torch.get_rng_state()
        layer.initialise(seed, name)
        assert torch.equal(state, torch.get_rng_state())
        assert torch.equal(layer.wrapped.base(x), plain)
        layers.append(layer)
    first, again, other_name, other_seed = ([p.detach() for p in layer.parameters()] for layer in layers)
    assert all(map(torch.equal, first, again))
    assert sum(map(torch.equal, first, other_name)) == sum(map(torch.equal, first, other_seed)) == 1  # the zeros


@pytest.mark.parametrize(("kind", "options"), LAYERS.values(), ids=LAYERS)
def test_the_first_step_moves_it(kind, options):
    """Not both factors may start at zero."""
    base = linear().requires_grad_(False)
    layer = kind(base, **options)
    layer.initialise(0, "a")
    base(torch.randn(2, 24)).square().sum().backward()
    assert any(parameter.grad.abs().max() > 0 for parameter in layer.parameters())


@pytest.mark.parametrize("kind", [lokr, loha])
def test_dropouts_act_in_training_only(kind):
    base = pointwise()
    layer = kind(base, dropouts=Dropouts(ranks=0.5)).eval()
    x = torch.randn(1, 12, 5, 4).expand(400, 12, 5, 4)
    exact = base(x)
    assert torch.equal(base(x), exact)
    layer.train()
    torch.manual_seed(0)
    update, whole = base(x) - layer.wrapped.original(x), exact - layer.wrapped.original(x)
    kept = update.abs().amax((2, 3)) > 0
    assert 0.45 < kept.float().mean() < 0.55
    assert not torch.equal(kept[0], kept[1])
    torch.testing.assert_close(update, 2 * whole * kept[:, :, None, None], atol=1e-5, rtol=1e-4)

    layer.dropouts = Dropouts(module=0.5)
    outputs = [base(x[:1]) for _ in range(100)]
    skipped = sum(torch.equal(output, layer.wrapped.original(x[:1])) for output in outputs)
    assert 30 < skipped < 70


@pytest.mark.parametrize(("make", "x"), BASES.values(), ids=BASES)
@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS)
def test_a_plan_follows_from_the_numbers(make, x, options):
    layer = lokr(make(), **options)
    assert plan_of(layer.weights(), layer_size(make())) == layer.plan


@pytest.mark.parametrize(("make", "x"), BASES.values(), ids=BASES)
@pytest.mark.parametrize(
    ("kind", "options", "rank"),
    [
        (lokr, {"rank": 2, "factor": 2}, 4),
        (lokr, {"rank": 2, "factor": 4}, None),
        (lokr, PLANS["both low rank"], 1),
        (loha, {"rank": 3}, 9),
    ],
)
def test_the_same_update_as_a_lora(make, x, kind, options, rank):
    base = make()
    weights = kind(base, **options).weights()
    if rank is None:  # the smaller side of the first factor counts; 12 is 3 * 4
        rank = 2 * min(weights.w1[0].shape)
    converted = weights.as_lora(layer_size(base).kernel)
    assert converted.rank == weights.lora_rank == rank
    assert converted.shape == base.weight.shape
    torch.testing.assert_close(converted.delta().flatten(1), weights.delta(), atol=1e-6, rtol=1e-5)


def test_a_whole_second_factor_has_no_lora():
    assert lokr(linear(), **PLANS["whole"]).weights().lora_rank is None


def test_alpha_does_not_act_on_whole_factors():
    layer = lokr(linear(), alpha=7.0, **PLANS["whole"])
    weights = layer.weights()
    torch.testing.assert_close(weights.delta(), torch.kron(layer.lokr_w1, layer.lokr_w2).detach())
    assert (weights.alpha, weights.rank, weights.strength) == (1.0, 1, 1.0)
    assert weights._replace(alpha=1e10).strength == 1.0
    assert lokr(linear(), alpha=0.0).weights().strength == 1.0


@pytest.mark.parametrize("kind", [lokr, loha])
def test_bf16_and_autocast(kind):
    base = linear().requires_grad_(False)
    layer = kind(base)
    x = torch.randn(2, 24)
    exact = base(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = base(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact, atol=0.05, rtol=0.05)
    base.to(torch.bfloat16)
    output = base(x.bfloat16())
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in layer.parameters())


def test_the_hadamard_product_keeps_its_factors_only():
    kept = []
    layer = loha(linear(), rank=2)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer.wrapped.base(torch.randn(2, 24))
    assert kept.count(torch.Size((40, 24))) <= 2  # the update itself, for the gradient of the input, and the base


@pytest.mark.parametrize("make", [lokr, loha])
def test_depthwise_convolutions_are_refused(make):
    with pytest.raises(ValueError, match="groups"):
        make(nn.Conv2d(4, 4, 3, groups=4))


def test_a_factor_is_whole_from_half_of_its_longer_side():
    size = layer_size(linear())  # w1 (4, 4), w2 (10, 6)
    ranks = {
        rank: plan_factors(size, rank=rank, factor=4, decompose_both=True, full_matrix=False) for rank in (1, 2, 4, 5)
    }
    assert [(p.w1_rank, p.w2_rank) for p in ranks.values()] == [(1, 1), (None, 2), (None, 4), (None, None)]


@pytest.mark.reference
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 6])
def test_lycoris_decides_the_same_factors(rank):
    lycoris = pytest.importorskip("lycoris")
    layer = lokr(linear(), rank=rank, factor=4, decompose_both=True)
    theirs = lycoris.LokrModule("x", linear(), lora_dim=rank, factor=4, decompose_both=True)
    assert {n: p.shape for n, p in theirs.named_parameters()} == {n: p.shape for n, p in layer.named_parameters()}


def test_factors_of_sizes():
    assert factorise(1536, 16) == (16, 96)
    assert factorise(96, 16) == (6, 16)  # 16 divides it, and is the larger one
    assert factorise(360, 7) == (6, 60)
    assert factorise(127, 16) == (1, 127)
    assert factorise(2240, -1) == (40, 56)


@pytest.mark.reference
def test_factors_are_those_of_lycoris():
    lycoris = pytest.importorskip("lycoris")
    for size in [*range(1, 400), 1536, 2240, 2432, 4608, 5600, 11200]:
        for factor in (-1, 1, 2, 3, 4, 5, 8, 16, 32, 100):
            assert factorise(size, factor) == lycoris.functional.factorization(size, factor), (size, factor)


@pytest.mark.reference
@pytest.mark.parametrize(("make", "x"), BASES.values(), ids=BASES)
@pytest.mark.parametrize(("kind", "options"), LAYERS.values(), ids=LAYERS)
def test_lycoris_makes_the_same(make, x, kind, options):
    """By its layer's output: its ``get_diff_weight`` and ``merge_to`` (4.1.3) apply a LoKr's alpha / rank twice."""
    lycoris = pytest.importorskip("lycoris")
    layer = kind(make(), **options)
    module = lycoris.LokrModule if kind is lokr else lycoris.LohaModule
    settings = {name: value for name, value in options.items() if name != "rank"}
    base = make()
    theirs = module("x", base, 1.0, alpha=3.0, lora_dim=options["rank"], **settings)
    own = layer.weights().tensors()
    shapes = {name: tensor.shape for name, tensor in own.items()}
    assert {name: tensor.shape for name, tensor in theirs.named_parameters()} == shapes
    theirs.load_state_dict({**own, "alpha": theirs.alpha})
    theirs.apply_to()
    torch.testing.assert_close(layer.wrapped.base(x), base(x), atol=1e-5, rtol=1e-5)


@pytest.mark.reference
@pytest.mark.parametrize("kind", ["lokr", "lokr whole", "loha"])
def test_peft_makes_the_same(kind):
    peft = pytest.importorskip("peft")
    rank = 100 if kind == "lokr whole" else 2
    if kind == "loha":
        layer = loha(linear(), alpha=4.0, rank=rank)
        config = peft.LoHaConfig(r=rank, alpha=4, target_modules=["0"])
    else:
        layer = lokr(linear(), alpha=4.0, rank=rank, factor=4)
        config = peft.LoKrConfig(r=rank, alpha=4 if rank == 2 else rank, decompose_factor=4, target_modules=["0"])
    model = peft.inject_adapter_in_model(config, nn.Sequential(linear()))
    for name, value in layer.weights().tensors().items():
        getattr(model[0], name)["default"].data.copy_(value)
    torch.testing.assert_close(layer.weights().delta(), model[0].get_delta_weight("default").detach())
