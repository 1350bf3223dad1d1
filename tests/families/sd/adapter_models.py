"""Tiny models of both generations with adapters, and the same weights in diffusers' classes."""

import dataclasses

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from library.families.sd.adapter_targets import adapter_targets
from networks.loading import create_network
from tests.families.sd.test_unet import TINY, diffusers_twin, inputs, random_unet
from tests.networks.adapter_fixtures import Config

SMALL = dataclasses.replace(TINY, multipliers=(1, 2), attention_levels=1, blocks_per_level=1)
KINDS = {"sd1": SMALL, "sd2": dataclasses.replace(SMALL, num_heads=None, head_dim=16, linear_projections=True)}
LAYERS, WITH_CONVOLUTIONS = 48, 79
"""Of the U-Net that get an adapter: by default, and with ``conv_dim``."""

CLIP_LAYERS = 3
IDS = torch.tensor([[3, 5, 7, 49, 2, 2, 2, 2]])
EVERYTHING = ("conv_dim=3", "conv_alpha=2", "emb_dims=[2,2,2]")


def targets_for(config, clip_layers=CLIP_LAYERS):
    return adapter_targets(
        multipliers=config.multipliers,
        attention_levels=config.attention_levels,
        blocks_per_level=config.blocks_per_level,
        clip_layers=clip_layers,
    )


def tiny_clip():
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=48,
        projection_dim=24,
        num_hidden_layers=CLIP_LAYERS,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=None,
        eos_token_id=2,
    )
    return CLIPTextModelWithProjection(config).requires_grad_(False).eval()


def models(kind):
    return {"denoiser": random_unet(KINDS[kind]).requires_grad_(False).eval(), "clip": tiny_clip()}


def adapter(roots, *arguments, **options):
    """An adapter on a tiny model; both its parts are trained unless ``options`` say otherwise."""
    settings = {"network_dim": 4, "network_alpha": 3.0, **options}
    return create_network(Config(network_args=arguments, **settings), roots, targets_for(roots["denoiser"].config), 0)


def pipeline(kind):
    """Diffusers' pipeline around the weights of ``models(kind)``; its text encoder has transformers' plain class."""
    diffusers = pytest.importorskip("diffusers")
    from transformers import CLIPTextModel

    clip, twin = tiny_clip(), CLIPTextModel(tiny_clip().config).eval()
    weights = clip.state_dict()
    twin.load_state_dict({name: weights.get(name, weights.get(f"text_model.{name}")) for name in twin.state_dict()})
    return diffusers.StableDiffusionPipeline(
        unet=diffusers_twin(random_unet(KINDS[kind])).eval(),
        text_encoder=twin,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        vae=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def our_answers(roots):
    """The U-Net's prediction, and the text encoder's features."""
    return roots["denoiser"](**inputs(roots["denoiser"].config)), roots["clip"](IDS).last_hidden_state


@torch.no_grad()
def their_answers(unet, text_encoder, kind):
    batch = inputs(KINDS[kind])
    predicted = unet(batch["x_t"], batch["timestep"], encoder_hidden_states=batch["context"]).sample
    return predicted, text_encoder(IDS).last_hidden_state


def differences(actual, expected):
    return [((a - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected)]


def assert_same(actual, expected, tolerance=1e-5):
    assert max(differences(actual, expected)) < tolerance
