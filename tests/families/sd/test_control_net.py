import pytest
import torch
from PIL import Image
from torch import nn

from library.families.sd.control_net import ControlNet, steer
from library.families.sd.control_net_keys import control_net_keys
from library.families.sd.unet import CONFIGS
from library.io.key_maps import from_diffusers, to_diffusers
from library.memory.block_swap import BlockSwap
from library.memory.checkpointing import enable_checkpointing
from library.nn.attention import sdpa
from library.records import Resolution
from library.sampling.pictures import control_picture
from tests.families.sd.test_unet import KINDS, TINY, assert_close, diffusers_twin, inputs, random_unet
from tests.memory.late_transfers import LateTransfers

PARAMETERS = {"sd1": 361_279_120, "sd2": 364_228_240}


def random_control_net(config):
    torch.manual_seed(3)
    control_net = ControlNet(config, attention=sdpa)
    for name, parameter in control_net.named_parameters():
        scale = 1.0 if parameter.ndim == 1 and "weight" in name else 0.0
        nn.init.normal_(parameter, mean=scale, std=0.1)
    return control_net


def keys(config):
    return control_net_keys(
        multipliers=config.multipliers,
        attention_levels=config.attention_levels,
        blocks_per_level=config.blocks_per_level,
    ).all


def twin_of(diffusers, config):
    widths = [config.width * multiplier for multiplier in config.multipliers]
    kinds = [level < config.attention_levels for level in range(len(widths))]
    return diffusers.ControlNetModel(
        in_channels=config.in_channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if kind else "DownBlock2D" for kind in kinds),
        block_out_channels=tuple(widths),
        layers_per_block=config.blocks_per_level,
        cross_attention_dim=config.context_width,
        attention_head_dim=tuple(config.heads(width) for width in widths),  # diffusers' name for the number of heads
        use_linear_projection=config.linear_projections,
    )


def hint(batch):
    *_, height, width = batch["x_t"].shape
    return torch.rand(len(batch["x_t"]), 3, 8 * height, 8 * width, generator=torch.Generator().manual_seed(4))


@pytest.mark.reference
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_equal_those_of_diffusers(kind):
    diffusers = pytest.importorskip("diffusers")
    control_net = random_control_net(KINDS[kind])
    maps = keys(control_net.config)
    twin = twin_of(diffusers, control_net.config)
    twin.load_state_dict(dict(to_diffusers(control_net.state_dict(), maps)), strict=True)
    batch = inputs(control_net.config)
    control = control_net(**batch, hint=hint(batch))
    down, mid = twin(batch["x_t"], batch["timestep"], batch["context"], controlnet_cond=hint(batch), return_dict=False)
    expected = [*down, mid]
    assert len(control) == len(expected)
    for one, other in zip(control, expected):
        assert_close(one, other)
    generator = torch.Generator().manual_seed(5)
    directions = [torch.randn(one.shape, generator=generator) for one in control]
    for made in (control, expected):
        sum((one * direction).sum() for one, direction in zip(made, directions)).backward()
    gradients = dict(from_diffusers({name: p.grad for name, p in twin.named_parameters()}, maps))
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, parameter in control_net.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-5 * largest, name


@pytest.mark.reference
@pytest.mark.parametrize("name", CONFIGS)
def test_keys_and_shapes_of_the_published_models(name):
    diffusers = pytest.importorskip("diffusers")
    config = CONFIGS[name]
    with torch.device("meta"):
        control_net, twin = ControlNet(config, attention=sdpa), twin_of(diffusers, config)
    spelled = {key: tensor.shape for key, tensor in to_diffusers(control_net.state_dict(), keys(config))}
    assert spelled == {key: tensor.shape for key, tensor in twin.state_dict().items()}
    assert sum(parameter.numel() for parameter in control_net.parameters()) == PARAMETERS[name]
    assert len(spelled) == 340


def test_some_published_names():
    with torch.device("meta"):
        names = ControlNet(CONFIGS["sd1"], attention=sdpa).state_dict()
    assert names["input_hint_block.0.weight"].shape == (16, 3, 3, 3)
    assert names["input_hint_block.4.weight"].shape == (32, 16, 3, 3)
    assert names["input_hint_block.14.weight"].shape == (320, 256, 3, 3)
    assert names["zero_convs.3.0.weight"].shape == (320, 320, 1, 1)
    assert names["zero_convs.11.0.bias"].shape == (1280,)
    assert names["middle_block_out.0.weight"].shape == (1280, 1280, 1, 1)
    assert names["input_blocks.11.0.out_layers.3.weight"].shape == (1280, 1280, 3, 3)


def test_a_steered_model_adds_what_its_control_net_makes():
    unet, control_net, batch = random_unet(TINY), random_control_net(TINY), inputs(TINY)
    plain, names = unet(**batch), set(unet.state_dict())
    expected = unet(**batch, control=control_net(**batch, hint=hint(batch)))
    steer(unet, control_net)
    steered = unet(batch["x_t"], batch["timestep"], batch["context"], hint=hint(batch))
    assert torch.equal(steered, expected) and not torch.allclose(steered, plain)
    assert set(unet.state_dict()) == names


def test_stages_are_all_after_the_first_convolution():
    control_net, batch, seen = random_control_net(TINY), inputs(TINY), []
    for number, stage in enumerate(control_net.stages):
        stage.register_forward_pre_hook(lambda *_, number=number: seen.append(number))
    control_net(**batch, hint=hint(batch))
    assert seen == list(range(len(control_net.stages))) == list(range(12))


@pytest.mark.parametrize("interval", [None, 1])
def test_the_frozen_model_may_take_turns_on_the_device(interval):
    """The backward pass ends at its middle: what lies before has no gradient, and need not come back."""

    def gradients(**how):
        unet, control_net = random_unet(KINDS["shallow"]).requires_grad_(False), random_control_net(KINDS["shallow"])
        blocks, transfers = list(unet.stages), LateTransfers()
        if how:
            BlockSwap(blocks, 5, transfers, checkpointed=range(len(blocks)) if interval else ())
        if interval:
            enable_checkpointing(blocks, interval)
        steer(unet, control_net)
        batch = inputs(unet.config)
        for _ in range(2):
            answer = unet(batch["x_t"], batch["timestep"], batch["context"], hint=hint(batch))
            answer.square().mean().backward()
        assert bool(transfers.fetched) == bool(how)
        return [answer, *(parameter.grad for parameter in control_net.parameters())]

    plain, swapped = gradients(), gradients(swapped=True)
    assert all(torch.equal(one, other) for one, other in zip(plain, swapped, strict=True))


@pytest.mark.reference
def test_diffusers_pipeline_asks_the_same_question(tmp_path):
    """The picture goes in as a file on both sides; the answer of the first step is the same."""
    diffusers = pytest.importorskip("diffusers")
    unet, control_net = random_unet(TINY), random_control_net(TINY)
    their_control_net = twin_of(diffusers, TINY)
    their_control_net.load_state_dict(dict(to_diffusers(control_net.state_dict(), keys(TINY))))
    their_unet = diffusers_twin(unet)
    seen = []
    their_unet.register_forward_hook(lambda _, given, answer: seen.append((*given[:2], answer[0])))
    pipeline = diffusers.StableDiffusionControlNetPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4),
        text_encoder=None,
        tokenizer=None,
        unet=their_unet,
        controlnet=their_control_net,
        scheduler=diffusers.DDIMScheduler(beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    picture = tmp_path / "control.png"
    Image.merge("RGB", [Image.effect_noise((128, 64), sigma) for sigma in (20, 90, 150)]).save(picture)
    batch = {name: value[:1] for name, value in inputs(TINY).items()}
    pipeline(
        prompt_embeds=batch["context"],
        image=Image.open(picture),
        latents=batch["x_t"],
        width=128,
        height=64,
        num_inference_steps=1,
        guidance_scale=1.0,
        output_type="latent",
    )
    ((x_t, timestep, expected),) = seen
    steer(unet, control_net)
    with torch.no_grad():
        answer = unet(
            x_t, timestep.reshape(1), batch["context"], hint=control_picture(str(picture), Resolution(128, 64))
        )
    assert_close(answer, expected)
