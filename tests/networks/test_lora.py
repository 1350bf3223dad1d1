import copy

import pytest
import torch
from torch import nn

from library.config.network import NetworkConfig
from library.config.optimizer import OptimizerConfig
from library.memory.checkpointing import enable_checkpointing
from networks.lora import inject
from networks.settings import AdapterSettings, read_settings
from tests.networks.adapter_fixtures import LARGEST, TARGETS, inputs, randomise, tiny_clip, tiny_mmdit

SETTINGS = AdapterSettings(rank=3, alpha=2.0)


def adapted(*network_args, seed=0, **network):
    mmdit = tiny_mmdit()
    settings = read_settings(NetworkConfig(network_args=network_args, **network), TARGETS)
    return mmdit, inject({"denoiser": mmdit}, TARGETS, settings, run_seed=seed)


def test_a_new_adapter_changes_nothing_and_its_values_follow_the_seed():
    x = inputs()
    plain = tiny_mmdit()(*x)
    mmdit, network = adapted(LARGEST)
    assert torch.equal(mmdit(*x), plain)
    again, other = adapted(LARGEST)[1].state_dict(), adapted(LARGEST, seed=1)[1].state_dict()
    own = network.state_dict()
    assert all(torch.equal(own[name], again[name]) for name in own)
    downs = [name for name in own if "lora_down" in name]
    assert not any(torch.equal(own[name], other[name]) for name in downs)
    # A layer's values don't depend on which others have an adapter.
    fewer = adapted("train_block_indices=1")[1].state_dict()
    plain_ranks = adapted()[1].state_dict()
    assert all(torch.equal(plain_ranks[name], fewer[name]) for name in fewer)


def test_the_whole_model_equals_the_model_with_merged_weights():
    mmdit, network = adapted(LARGEST, network_dim=3, network_alpha=2.0)
    randomise(network)
    merged = tiny_mmdit()
    with torch.no_grad():
        for path, module in merged.named_modules():
            layer = network.modules_by_name.get("lora_unet_" + path.replace(".", "_"))
            if layer is not None:
                up, down = layer.lora_up.weight.flatten(1), layer.lora_down.weight
                module.weight += (2 / 3) * torch.einsum("or,r...->o...", up, down)
    actual, expected = mmdit(*inputs()), merged(*inputs())
    assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max() * 5
    assert (expected - tiny_mmdit()(*inputs())).abs().max() > 0.1


def test_off_and_gone_are_exactly_the_base():
    mmdit, network = adapted(LARGEST)
    keys = set(mmdit.state_dict())
    assert keys == set(tiny_mmdit().state_dict())
    randomise(network)
    x = inputs()
    plain, changed = tiny_mmdit()(*x), mmdit(*x)
    assert not torch.equal(plain, changed)
    with network.disabled():
        assert torch.equal(mmdit(*x), plain)
    assert torch.equal(mmdit(*x), changed)
    network.set_multiplier(0.0)
    torch.testing.assert_close(mmdit(*x), plain)
    network.set_multiplier(1.0)
    network.remove()
    assert torch.equal(mmdit(*x), plain)
    assert not any("forward" in module.__dict__ for module in mmdit.modules())


def test_disabled_restores_after_an_error():
    _, network = adapted()
    with pytest.raises(RuntimeError), network.disabled():
        raise RuntimeError
    assert all(layer.enabled for layer in network.modules_by_name.values())


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_reach_the_adapter_and_only_the_adapter(dtype, checkpointed):
    mmdit, network = adapted(network_dim=2)
    mmdit.to(dtype)
    if checkpointed:
        enable_checkpointing(mmdit.joint_blocks, 1)
    randomise(network)
    x_t, timestep, context, pooled = inputs()
    mmdit(x_t.to(dtype), timestep, context.to(dtype), pooled.to(dtype)).float().square().mean().backward()
    # The last block's text stream ends in keys and values, so nothing there is without effect.
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    assert all(p.grad.dtype == torch.float32 for p in network.parameters())
    assert all(p.grad is None for p in mmdit.parameters())


def test_checkpointing_repeats_the_dropouts_of_the_forward_pass():
    grads = []
    for checkpointed in (False, True):
        mmdit, network = adapted("rank_dropout=0.3", "module_dropout=0.3", network_dropout=0.3)
        randomise(network).train()
        if checkpointed:
            enable_checkpointing(mmdit.joint_blocks, 1)
        torch.manual_seed(7)
        mmdit(*inputs()).square().mean().backward()
        grads.append([p.grad for p in network.parameters()])
    assert any(grad is None for grad in grads[0])  # some layers were skipped
    for plain, recomputed in zip(*grads):
        assert (plain is None) == (recomputed is None)
        if plain is not None:
            torch.testing.assert_close(plain, recomputed)


def test_scale_weight_norms_clamps_only_what_is_above():
    _, network = adapted(network_dim=3, network_alpha=6.0)
    randomise(network)
    before = {name: layer.weights() for name, layer in network.modules_by_name.items()}
    before = {name: (w.down.clone(), w.up.clone(), (2 * w.up @ w.down).norm()) for name, w in before.items()}
    limit = float(torch.stack([norm for _, _, norm in before.values()]).median())
    result = network.scale_weight_norms(limit)
    above = 0
    for name, layer in network.modules_by_name.items():
        down, up, norm = before[name]
        if norm > limit * 1.0001:
            above += 1
            scaled = (2 * layer.lora_up.weight @ layer.lora_down.weight).norm()
            torch.testing.assert_close(scaled, torch.tensor(limit))
            ratio = (limit / norm).sqrt()
            torch.testing.assert_close(layer.lora_up.weight.detach(), up * ratio)
            torch.testing.assert_close(layer.lora_down.weight.detach(), down * ratio)
        elif norm < limit * 0.9999:
            assert torch.equal(layer.lora_up.weight, up)
            assert torch.equal(layer.lora_down.weight, down)
    norms = torch.stack([(2 * w.up @ w.down).norm() for w in network.weights().values()])
    assert abs(int(result.scaled) - above) <= 1
    torch.testing.assert_close(result.mean, norms.mean())
    torch.testing.assert_close(result.largest, norms.max())


def test_a_new_adapter_has_no_norm_to_scale():
    _, network = adapted()
    assert tuple(float(number) for number in network.scale_weight_norms(1.0)) == (0, 0, 0)
    assert all(torch.isfinite(parameter).all() for parameter in network.parameters())


def groups(settings, **optimizer):
    roots = {"denoiser": tiny_mmdit(), "clip_l": tiny_clip(), "clip_g": tiny_clip(1)}
    network = inject(roots, TARGETS, settings)
    listed = network.parameter_groups(OptimizerConfig(**optimizer))
    every = [id(parameter) for group in listed for parameter in group["params"]]
    assert sorted(every) == sorted(id(parameter) for parameter in network.parameters())
    return {group["name"]: group for group in listed}


def test_one_group_per_component():
    found = groups(SETTINGS, learning_rate=1.0, text_encoder_lr=(2.0, 3.0))
    assert {name: group["lr"] for name, group in found.items()} == {"unet": 1, "textencoder 1": 2, "textencoder 2": 3}


def test_lora_plus_gives_up_its_own_rate():
    settings = AdapterSettings(rank=3, alpha=2.0, loraplus_unet_lr_ratio=4.0, loraplus_text_encoder_lr_ratio=2.0)
    found = groups(settings, learning_rate=1.0)
    assert {name: group["lr"] for name, group in found.items()} == {
        "unet": 1,
        "unet plus": 4,
        "textencoder 1": 1,
        "textencoder 1 plus": 2,
        "textencoder 2": 1,
        "textencoder 2 plus": 2,
    }
    assert all(parameter.shape[0] == 3 for parameter in found["unet"]["params"])
    assert all(parameter.shape[1] == 3 for parameter in found["unet plus"]["params"])


def test_a_second_text_encoder_alone_keeps_its_number_and_rate():
    network = inject({"clip_g": tiny_clip()}, TARGETS, SETTINGS)
    (group,) = network.parameter_groups(OptimizerConfig(text_encoder_lr=(1.0, 2.0)))
    assert (group["name"], group["lr"]) == ("textencoder 2", 2.0)
    assert network.components == ("clip_g",)
    assert len(network.component_parameters("clip_g")) == 2 * 12
    assert network.component_parameters("denoiser") == []


def test_a_component_without_learning_rate_must_not_have_an_adapter():
    with pytest.raises(ValueError, match="learning rate 0"):
        groups(SETTINGS, unet_lr=0.0)


def test_state_round_trip():
    mmdit, network = adapted()
    randomise(network)
    twin, other = adapted()
    other.load_state_dict(copy.deepcopy(network.state_dict()))
    assert torch.equal(mmdit(*inputs()), twin(*inputs()))
    assert all(name.endswith(("lora_down.weight", "lora_up.weight")) for name in network.state_dict())


def test_text_encoder_layers_are_reached():
    clip = tiny_clip()
    ids = torch.tensor([[3, 5, 7, 49]])
    plain = clip(ids).text_embeds
    randomise(inject({"clip_l": clip}, TARGETS, SETTINGS))
    assert not torch.allclose(clip(ids).text_embeds, plain)


def test_fp16_and_bf16_parameters_work():
    mmdit, network = adapted()
    randomise(network).to(torch.bfloat16)
    assert mmdit(*inputs()).dtype == torch.float32
    assert isinstance(network, nn.Module)
