import copy

import pytest
import torch
from torch import nn

from networks.lora_layer import Dropouts, LoraLayer


def layer_on(base, *, rank=4, alpha=2.0, dropouts=None, seed=0):
    base.requires_grad_(False)
    layer = LoraLayer(base, component="denoiser", rank=rank, alpha=alpha, dropouts=dropouts or Dropouts())
    layer.initialise(seed, "name")
    nn.init.normal_(layer.lora_up.weight, std=0.3, generator=torch.Generator().manual_seed(5))
    return layer.eval()


def linear(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Linear(12, 20).to(dtype)


def conv():
    torch.manual_seed(1)
    return nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))


@pytest.mark.parametrize(
    ("make", "x"), [(linear, torch.randn(2, 5, 12)), (linear, torch.randn(3, 12)), (conv, torch.randn(2, 3, 9, 8))]
)
def test_output_is_that_of_merged_weights(make, x):
    base = make()
    plain = base(x)
    layer = layer_on(base)
    up, down = layer.lora_up.weight.detach(), layer.lora_down.weight.detach()
    # From the definition: alpha / rank * up @ down, every entry by itself.
    merged = copy.deepcopy(make())
    with torch.no_grad():
        merged.weight += (2.0 / 4) * torch.einsum("or,r...->o...", up.flatten(1), down)
    torch.testing.assert_close(base(x), merged(x), atol=1e-6, rtol=1e-5)
    assert (base(x) - plain).abs().max() > 0.01

    layer.multiplier = -0.5
    with torch.no_grad():
        merged.weight -= 1.5 * (2.0 / 4) * torch.einsum("or,r...->o...", up.flatten(1), down)
    torch.testing.assert_close(base(x), merged(x), atol=1e-6, rtol=1e-5)


def test_starts_at_zero_and_reproducibly():
    base = linear()
    x = torch.randn(2, 12)
    plain = base(x)
    layers = []
    for name, seed in (("a", 0), ("a", 0), ("b", 0), ("a", 1)):
        torch.manual_seed(len(layers))
        layer = LoraLayer(linear(), component="denoiser", rank=4, alpha=1)
        state = torch.get_rng_state()
        layer.initialise(seed, name)
        assert torch.equal(state, torch.get_rng_state())
        layers.append(layer)
    assert torch.equal(layers[0].wrapped.base(x), plain)
    down = [layer.lora_down.weight for layer in layers]
    assert torch.equal(down[0], down[1])
    assert not torch.equal(down[0], down[2])
    assert not torch.equal(down[0], down[3])
    # kaiming uniform with a = sqrt(5): +-1 / sqrt(inputs)
    assert 0.8 * 12**-0.5 < down[0].abs().max() <= 12**-0.5


def test_does_not_touch_the_global_generator():
    base = linear()
    state = torch.get_rng_state()
    LoraLayer(base, component="denoiser", rank=4, alpha=1).initialise(0, "name")
    assert torch.equal(state, torch.get_rng_state())


def test_base_keeps_its_keys_and_gets_its_forward_back():
    base = linear()
    keys = set(base.state_dict())
    x = torch.randn(2, 12)
    plain = base(x)
    first = layer_on(base)
    with_first = base(x)
    second = layer_on(base, seed=3)
    assert set(base.state_dict()) == keys
    assert set(first.state_dict()) == {"lora_down.weight", "lora_up.weight"}
    with pytest.raises(ValueError, match="wrapped again"):
        first.wrapped.remove()
    second.wrapped.remove()
    assert torch.equal(base(x), with_first)
    first.wrapped.remove()
    assert torch.equal(base(x), plain)
    assert "forward" not in base.__dict__


def test_alpha_zero_means_rank():
    assert LoraLayer(linear(), component="denoiser", rank=4, alpha=0).scale == 1
    assert LoraLayer(linear(), component="denoiser", rank=4, alpha=1).scale == 0.25


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_computes_in_the_activations_type(dtype, autocast):
    base = linear(dtype)
    layer = layer_on(base)
    assert layer.lora_down.weight.dtype == torch.float32
    x = torch.randn(2, 5, 12).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = base(x)
    assert output.dtype == (torch.bfloat16 if autocast else dtype)
    exact = linear().double()
    exact.weight.data += 0.5 * (layer.lora_up.weight.double() @ layer.lora_down.weight.double())
    precision = 1e-5 if dtype == torch.float32 and not autocast else 3e-2
    torch.testing.assert_close(output.double(), exact(x.double()), atol=precision, rtol=precision)


def test_activation_dropout_keeps_the_mean_and_stops_in_eval():
    base = linear()
    x = torch.randn(1, 12).expand(20_000, 12)
    layer = layer_on(base, dropouts=Dropouts(activations=0.4))
    exact = base(x)
    layer.train()
    torch.manual_seed(0)
    dropped = base(x)
    assert not torch.equal(dropped[0], dropped[1])
    torch.testing.assert_close(dropped.mean(0), exact[0], atol=0.02, rtol=0)


def test_rank_dropout_drops_whole_components_per_sample():
    base = linear()
    layer = layer_on(base, rank=6, alpha=6, dropouts=Dropouts(ranks=0.3))
    x = torch.randn(1, 1, 12).expand(4_000, 3, 12)
    plain = layer.wrapped.original(x)
    exact = base(x)
    layer.train()
    torch.manual_seed(0)
    update = base(x) - plain
    # All tokens of a sample lose the same components; samples differ.
    assert torch.equal(update[:, 0], update[:, 2])
    # Each sample's update is a sum of whole components over 0.7: coefficients are 0 or 1 / 0.7.
    parts = torch.einsum("or,r->or", layer.lora_up.weight, layer.lora_down.weight @ x[0, 0])
    coefficients = torch.linalg.lstsq(parts, update[:, 0].T).solution
    kept = coefficients > 0.5
    torch.testing.assert_close(coefficients, kept / 0.7, atol=1e-2, rtol=0)
    assert abs(kept.float().mean() - 0.7) < 0.02
    torch.testing.assert_close(update.mean(0)[0], (exact - plain)[0, 0], atol=0.05, rtol=0)


def test_rank_dropout_of_a_convolution():
    base = conv()
    layer = layer_on(base, dropouts=Dropouts(ranks=0.5)).train()
    x = torch.randn(1, 3, 9, 8).expand(200, 3, 9, 8)
    update = base(x) - layer.wrapped.original(x)
    assert 1 < len({tuple(row.tolist()) for row in update.detach().flatten(1)}) <= 2**4


def test_module_dropout_skips_the_update_without_rescaling():
    base = linear()
    layer = layer_on(base, dropouts=Dropouts(module=0.25))
    x = torch.randn(2, 12)
    exact, plain = base(x), layer.wrapped.original(x)
    layer.train()
    torch.manual_seed(0)
    outputs = [base(x) for _ in range(1000)]
    skipped = sum(torch.equal(output, plain) for output in outputs)
    assert 200 < skipped < 300
    assert all(torch.equal(output, plain) or torch.equal(output, exact) for output in outputs)


def test_norm_needs_no_full_matrix_but_is_its_norm():
    for base in (linear(), conv()):
        layer = layer_on(base)
        torch.testing.assert_close(layer.norm(), layer.weights().delta().norm())


def test_grouped_convolutions_are_refused():
    with pytest.raises(ValueError, match="groups"):
        LoraLayer(nn.Conv2d(4, 4, 3, groups=4), component="denoiser", rank=1, alpha=1)
