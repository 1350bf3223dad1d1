"""Adapters we save, loaded by diffusers' own pipeline; adapters diffusers saves, loaded by us."""

import json

import pytest
import torch

from library.families.sd3.key_maps import denoiser_key_maps
from library.io.key_maps import to_diffusers
from library.io.safetensors import save_tensors
from networks.loading import create_network, load_adapter
from tests.networks.adapter_fixtures import (
    LARGEST,
    TARGETS,
    TINY,
    Config,
    inputs,
    randomise,
    tiny_clip,
    tiny_mmdit,
)

pytestmark = pytest.mark.reference
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

IDS = torch.tensor([[3, 5, 7, 49, 2, 2, 2, 2]])


def models():
    return {"denoiser": tiny_mmdit(), "clip_l": tiny_clip(), "clip_g": tiny_clip(1)}


def pipeline():
    """Diffusers' pipeline around the same weights as ``models()``."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=TINY.patch_size,
        in_channels=TINY.in_channels,
        num_layers=TINY.depth,
        attention_head_dim=TINY.head_dim,
        num_attention_heads=TINY.num_heads,
        joint_attention_dim=TINY.context_width,
        caption_projection_dim=TINY.width,
        pooled_projection_dim=TINY.pooled_width,
        out_channels=TINY.in_channels,
        pos_embed_max_size=TINY.pos_embed_max_size,
        dual_attention_layers=TINY.dual_attention_blocks,
        qk_norm="rms_norm" if TINY.qk_norm else None,
    )
    maps = denoiser_key_maps(depth=TINY.depth, qk_norm=TINY.qk_norm, dual_attention_blocks=TINY.dual_attention_blocks)
    transformer.load_state_dict(dict(to_diffusers(tiny_mmdit().state_dict(), maps)))
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=tiny_clip(),
        tokenizer=None,
        text_encoder_2=tiny_clip(1),
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


@torch.no_grad()
def our_outputs(roots):
    return [roots["denoiser"](*inputs()), roots["clip_l"](IDS).text_embeds, roots["clip_g"](IDS).text_embeds]


@torch.no_grad()
def their_outputs(pipe):
    x_t, timestep, context, pooled = inputs()
    velocity = pipe.transformer(x_t, context, pooled, timestep, return_dict=False)[0]
    return [velocity, pipe.text_encoder(IDS).text_embeds, pipe.text_encoder_2(IDS).text_embeds]


def assert_same(ours, theirs, tolerance=2e-5):
    for own, other in zip(ours, theirs):
        assert (own - other).abs().max() <= tolerance * other.abs().max()


NETWORKS = {
    "default": {"network_dim": 4, "network_alpha": 1.0},
    "embedders": {"network_dim": 4, "network_alpha": 3.0, "network_args": (LARGEST,)},
    "mixed ranks": {"network_dim": 4, "network_alpha": 3.0, "network_args": ("x_mlp_dim=2", "context_attn_dim=5")},
    "one block": {"network_dim": 2, "network_alpha": 0.0, "network_args": ("train_block_indices=2",)},
    "denoiser only": {"network_dim": 4, "network_alpha": 2.0, "network_train_unet_only": True},
}


@pytest.mark.parametrize("with_metadata", [True, False])
@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_diffusers_loads_what_we_save(tmp_path, options, with_metadata):
    roots = models()
    network = randomise(create_network(Config(save_format="diffusers", **options), roots, TARGETS, 0))
    ((tensors, metadata),) = network.files("diffusers").values()
    save_tensors(tensors, tmp_path / "adapter.safetensors", metadata if with_metadata else {})

    pipe = pipeline()
    assert_same(our_outputs(models()), their_outputs(pipe))
    pipe.load_lora_weights(tmp_path, weight_name="adapter.safetensors")
    assert_same(our_outputs(roots), their_outputs(pipe))
    assert (our_outputs(roots)[0] - our_outputs(models())[0]).abs().max() > 0.05


@pytest.mark.parametrize("lora_alpha", [4, 9])
@pytest.mark.parametrize("rslora", [False, True])
def test_we_load_what_diffusers_saves(tmp_path, lora_alpha, rslora):
    """As diffusers' training scripts do it: PEFT on some layers only, saved by the pipeline with its configuration."""
    pipe = pipeline()
    config = peft.LoraConfig(
        r=3,
        lora_alpha=lora_alpha,
        use_rslora=rslora,
        init_lora_weights=False,
        target_modules=[
            "to_q",
            "to_v",
            "to_out.0",
            "add_k_proj",
            "ff.net.2",
            "norm1_context.linear",
            "norm_out.linear",
        ],
    )
    encoder_config = peft.LoraConfig(
        r=2, lora_alpha=lora_alpha, use_rslora=rslora, init_lora_weights=False, target_modules=["q_proj", "fc1"]
    )
    torch.manual_seed(3)
    pipe.transformer.add_adapter(config)
    pipe.text_encoder.add_adapter(encoder_config)
    diffusers.StableDiffusion3Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.get_peft_model_state_dict(pipe.transformer),
        text_encoder_lora_layers=peft.get_peft_model_state_dict(pipe.text_encoder),
        **{
            f"{name}_lora_adapter_metadata": json.loads(json.dumps(chosen.to_dict(), default=list))
            for name, chosen in (("transformer", config), ("text_encoder", encoder_config))
        },
    )
    roots = models()
    network = load_adapter(tmp_path / "pytorch_lora_weights.safetensors", roots, TARGETS)
    # to_q and to_v have their own down: together they need twice the rank.
    assert network.modules_by_name["lora_unet_joint_blocks_0_x_block_attn_qkv"].rank == 6
    assert_same(our_outputs(roots), their_outputs(pipe))
    assert (our_outputs(roots)[1] - our_outputs(models())[1]).abs().max() > 1e-3
