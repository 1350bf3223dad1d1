import dataclasses

import pytest
import torch
from torch import nn

from library.families.sd.key_maps import unet_key_maps
from library.families.sd.unet import CONFIGS, UNet, UNetConfig, widths_down
from library.io.key_maps import from_diffusers, to_diffusers
from library.nn.attention import sdpa

PARAMETERS = {"sd1": 859_520_964, "sd2": 865_910_724}

TINY = UNetConfig(
    in_channels=4,
    out_channels=4,
    width=32,
    multipliers=(1, 2, 4, 4),
    attention_levels=3,
    blocks_per_level=2,
    context_width=24,
    num_heads=4,
    head_dim=None,
    linear_projections=False,
)
KINDS = {
    "sd1": TINY,
    "sd2": dataclasses.replace(TINY, num_heads=None, head_dim=16, linear_projections=True),
    "shallow": dataclasses.replace(TINY, multipliers=(1, 2), attention_levels=1, blocks_per_level=1),
}


def random_unet(config):
    """All weights random and of a size that lets every part show."""
    torch.manual_seed(0)
    unet = UNet(config, attention=sdpa)
    for name, parameter in unet.named_parameters():
        scale = 1.0 if parameter.ndim == 1 and "weight" in name else 0.0
        nn.init.normal_(parameter, mean=scale, std=0.1)
    return unet


def inputs(config, *, height=8, width=16, tokens=7):
    generator = torch.Generator().manual_seed(1)
    return {
        "x_t": torch.randn(2, config.in_channels, height, width, generator=generator),
        "timestep": torch.tensor([3, 871]),
        "context": torch.randn(2, tokens, config.context_width, generator=generator),
    }


def key_maps(config):
    return unet_key_maps(
        multipliers=config.multipliers,
        attention_levels=config.attention_levels,
        blocks_per_level=config.blocks_per_level,
    )


def diffusers_twin(unet):
    diffusers = pytest.importorskip("diffusers")
    twin = twin_of(diffusers, unet.config)
    twin.load_state_dict(dict(to_diffusers(unet.state_dict(), key_maps(unet.config))), strict=True)
    return twin


def twin_of(diffusers, config):
    widths = [config.width * multiplier for multiplier in config.multipliers]
    kinds = [level < config.attention_levels for level in range(len(widths))]
    heads = [config.heads(width) for width in widths]
    return diffusers.UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if kind else "DownBlock2D" for kind in kinds),
        up_block_types=tuple("CrossAttnUpBlock2D" if kind else "UpBlock2D" for kind in reversed(kinds)),
        block_out_channels=tuple(widths),
        layers_per_block=config.blocks_per_level,
        cross_attention_dim=config.context_width,
        attention_head_dim=tuple(heads),  # diffusers' name for the number of heads
        use_linear_projection=config.linear_projections,
    )


def assert_close(actual, expected, tolerance=1e-5):
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.reference
@pytest.mark.parametrize("controlled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_equal_those_of_diffusers(kind, controlled):
    unet = random_unet(KINDS[kind])
    twin = diffusers_twin(unet)
    batch = inputs(unet.config)
    ours = {key: value.clone().requires_grad_(key != "timestep") for key, value in batch.items()}
    theirs = {key: value.clone().requires_grad_(key != "timestep") for key, value in batch.items()}
    control, added = None, {}
    if controlled:
        control = control_of(unet.config, batch["x_t"])
        added = {"down_block_additional_residuals": control[:-1], "mid_block_additional_residual": control[-1]}
    output = unet(**ours, control=control)
    expected = twin(theirs["x_t"], theirs["timestep"], encoder_hidden_states=theirs["context"], **added).sample
    assert_close(output, expected)
    direction = torch.randn_like(output)
    (output * direction).sum().backward()
    (expected * direction).sum().backward()
    for name in ("x_t", "context"):
        assert_close(ours[name].grad, theirs[name].grad, 2e-5)
    gradients = dict(from_diffusers({name: p.grad for name, p in twin.named_parameters()}, key_maps(unet.config)))
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, parameter in unet.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-5 * largest, name


def control_of(config, x_t):
    """Something to add to every output on the way down, and to the middle's."""
    generator = torch.Generator().manual_seed(2)
    added, height, width = [], *x_t.shape[2:]
    for number, channels in enumerate(widths_down(config)):
        if number and number % (config.blocks_per_level + 1) == 0:
            height, width = height // 2, width // 2
        added.append(0.3 * torch.randn(len(x_t), channels, height, width, generator=generator))
    return [*added, added[-1].flip(0)]


@pytest.mark.reference
@pytest.mark.parametrize("name", CONFIGS)
def test_keys_and_shapes_of_the_published_models(name):
    diffusers = pytest.importorskip("diffusers")
    config = CONFIGS[name]
    with torch.device("meta"):
        unet, twin = UNet(config, attention=sdpa), twin_of(diffusers, config)
    assert sum(parameter.numel() for parameter in unet.parameters()) == PARAMETERS[name]
    spelled = {key: tensor.shape for key, tensor in to_diffusers(unet.state_dict(), key_maps(config))}
    assert spelled == {key: tensor.shape for key, tensor in twin.state_dict().items()}
    assert len(spelled) == 686


def test_some_published_names():
    with torch.device("meta"):
        names = UNet(CONFIGS["sd1"], attention=sdpa).state_dict()
    assert names["input_blocks.4.0.skip_connection.weight"].shape == (640, 320, 1, 1)
    assert names["input_blocks.9.0.op.weight"].shape == (1280, 1280, 3, 3)
    assert names["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape == (1280, 768)
    assert names["output_blocks.2.1.conv.weight"].shape == (1280, 1280, 3, 3)
    assert names["output_blocks.8.2.conv.weight"].shape == (640, 640, 3, 3)
    assert names["output_blocks.11.1.proj_out.weight"].shape == (320, 320, 1, 1)
    assert names["out.2.weight"].shape == (4, 320, 3, 3)


def test_stages_are_all_between_the_first_and_the_last_convolution():
    unet = random_unet(TINY)
    seen = []
    for number, stage in enumerate(unet.stages):
        stage.register_forward_pre_hook(lambda *_, number=number: seen.append(number))
    unet(**inputs(TINY))
    assert seen == list(range(len(unet.stages))) == list(range(24))


def test_sides_that_do_not_halve_are_refused():
    with pytest.raises(ValueError, match="multiples of 64"):
        random_unet(TINY)(**inputs(TINY, height=12))
