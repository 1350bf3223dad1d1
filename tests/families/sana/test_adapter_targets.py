"""Adapters on Sana: which layers, under which keys, and that diffusers' own loader gives the same pictures."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from library.families.sana.adapter_targets import adapter_targets
from library.families.sana.key_maps import denoiser_key_maps
from library.families.sana.linear_dit import CONFIGS, LinearDiT, LinearDiTConfig
from library.io.key_maps import to_diffusers
from library.io.safetensors import save_tensors
from library.nn.attention import sdpa
from networks.loading import create_network, load_adapter
from networks.lora import inject
from networks.settings import AdapterSettings
from tests.networks.adapter_fixtures import Config, randomise

GOLDEN = Path(__file__).parents[2] / "golden"
TINY = LinearDiTConfig(
    depth=2,
    width=96,
    head_dim=32,
    num_cross_heads=4,
    mlp_ratio=2.5,
    patch_size=1,
    in_channels=8,
    context_width=20,
    qk_norm=True,
    position_base=None,
    position_scale=1.0,
)
TARGETS = adapter_targets(depth=TINY.depth)
EVERYTHING = "emb_dims=[3,3,3,3,3]"
RANK_4 = AdapterSettings(rank=4, alpha=1.0)
FEED_FORWARD = ("mlp.inverted_conv.conv", "mlp.point_conv.conv")


def tiny_dit():
    torch.manual_seed(0)
    dit = LinearDiT(TINY, attention=sdpa)
    for name, parameter in dit.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.15)
    return dit.requires_grad_(False).eval()


def meta_dit(kind):
    with torch.device("meta"):
        return LinearDiT(CONFIGS[kind], attention=sdpa)


def adapter(dit, *arguments, targets=TARGETS, **options):
    settings = {"network_dim": 4, "network_alpha": 3.0, "network_train_unet_only": True, **options}
    return create_network(Config(network_args=arguments, **settings), {"denoiser": dit}, targets, 0)


@torch.no_grad()
def our_answer(dit):
    x_t, timestep, context, mask = inputs()
    return dit(x_t, timestep, context, mask)


def inputs():
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False
    x_t, context = (torch.randn(shape, generator=generator) for shape in ((2, 8, 4, 4), (2, 5, 20)))
    return x_t, torch.tensor([10.0, 800.0]), context, mask


def difference(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def listing(tensors):
    return sorted(f"{name}\t{list(tensor.shape)}" for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("kind", "golden"),
    [("sana-600m", "sana-600m"), ("sana-1600m", "sana-1600m"), ("sana-1.5-1600m", "sana-1600m")],
)
def test_keys_and_shapes_of_the_published_sizes(kind, golden):
    config = CONFIGS[kind]
    network = inject({"denoiser": meta_dit(kind)}, adapter_targets(depth=config.depth), RANK_4)
    assert listing(network.state_dict_kohya()) == (GOLDEN / f"sana_lora_keys_{golden}.txt").read_text().splitlines()
    ((tensors, _),) = network.files("diffusers").values()
    assert listing(tensors) == (GOLDEN / f"sana_lora_keys_{golden}_diffusers.txt").read_text().splitlines()


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_block_has_seven_layers_and_each_rank_costs_what_they_are_wide(kind):
    config = CONFIGS[kind]
    network = inject({"denoiser": meta_dit(kind)}, adapter_targets(depth=config.depth), RANK_4)
    assert len(network.modules_by_name) == 7 * config.depth
    d, inner = config.width, config.inner
    attention = (d + 3 * d) + (d + d)
    to_text = (d + d) + (d + 2 * d) + (d + d)
    feed_forward = (d + 2 * inner) + (inner + d)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert parameters == 4 * config.depth * (attention + to_text + feed_forward)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_layer_that_can_be_changed_has_a_place_in_diffusers(kind):
    targets = adapter_targets(depth=CONFIGS[kind].depth)
    network = inject({"denoiser": meta_dit(kind)}, targets, AdapterSettings(rank=1, alpha=1.0, optional_ranks=(1,) * 5))
    paths = {f"lora_unet_{path.replace('.', '_')}" for path in targets["denoiser"].fused}
    assert set(network.modules_by_name) == paths


def test_the_feed_forwards_1x1_convolutions_are_changed_and_the_depthwise_one_is_not():
    network = adapter(tiny_dit())
    layers = network.modules_by_name
    for block in range(TINY.depth):
        for path in FEED_FORWARD:
            layer = layers[f"lora_unet_blocks_{block}_{path.replace('.', '_')}"]
            assert layer.lora_down.weight.shape[2:] == layer.lora_up.weight.shape[2:] == (1, 1)
    assert not any("depth_conv" in name for name in layers)


@pytest.mark.parametrize("path", FEED_FORWARD)
def test_a_convolutions_update_is_the_product_added_to_its_weight(path):
    dit, merged = tiny_dit(), tiny_dit()
    network = randomise(adapter(dit))
    layer = network.modules_by_name[f"lora_unet_blocks_1_{path.replace('.', '_')}"]
    for other in network.modules_by_name.values():
        other.enabled = other is layer
    weight = merged.blocks[1].get_submodule(path).weight
    with torch.no_grad():
        product = layer.lora_up.weight[:, :, 0, 0] @ layer.lora_down.weight[:, :, 0, 0]
        weight += 3 / 4 * product[:, :, None, None]
    assert difference(our_answer(dit), our_answer(merged)) < 1e-5
    assert difference(our_answer(dit), our_answer(tiny_dit())) > 1e-3


def test_gradients_reach_every_layer():
    dit = tiny_dit()
    network = randomise(adapter(dit, EVERYTHING))
    x_t, timestep, context, mask = inputs()
    dit(x_t, timestep, context, mask).square().mean().backward()
    assert not [name for name, parameter in network.named_parameters() if not parameter.grad.any()]
    assert all(parameter.grad is None for parameter in dit.parameters())


RANKS = {
    "attn_dim=0": ("attn_", 0),
    "attn_dim=2": ("attn_", 2),
    "cross_attn_dim=0": ("cross_attn_", 0),
    "cross_attn_dim=5": ("cross_attn_", 5),
    "mlp_dim=0": ("mlp_", 0),
    "mlp_dim=6": ("mlp_", 6),
}


@pytest.mark.parametrize("argument", RANKS)
def test_ranks_of_parts(argument):
    part, rank = RANKS[argument]
    ranks = {
        name.removeprefix("lora_unet_blocks_")[2:]: layer.rank
        for name, layer in adapter(tiny_dit(), argument).modules_by_name.items()
    }
    inside = {name: found for name, found in ranks.items() if name.startswith(part)}
    assert set(inside.values()) == ({rank} if rank else set())
    others = [found for name, found in ranks.items() if name not in inside]
    assert others and set(others) == {4}


# Diffusers


def their_transformer():
    diffusers = pytest.importorskip("diffusers")
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=TINY.in_channels,
        out_channels=TINY.in_channels,
        num_attention_heads=TINY.num_heads,
        attention_head_dim=TINY.head_dim,
        num_layers=TINY.depth,
        num_cross_attention_heads=TINY.num_cross_heads,
        cross_attention_head_dim=TINY.width // TINY.num_cross_heads,
        cross_attention_dim=TINY.width,
        caption_channels=TINY.context_width,
        mlp_ratio=TINY.mlp_ratio,
        sample_size=32,
        patch_size=TINY.patch_size,
        qk_norm="rms_norm_across_heads",
    )
    maps = denoiser_key_maps(depth=TINY.depth, qk_norm=TINY.qk_norm)
    transformer.load_state_dict(dict(to_diffusers(tiny_dit().state_dict(), maps)))
    return transformer.eval()


def pipeline():
    """Diffusers' pipeline around the same weights as ``tiny_dit()``."""
    diffusers = pytest.importorskip("diffusers")
    return diffusers.SanaPipeline(
        transformer=their_transformer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
    )


@torch.no_grad()
def their_answer(transformer):
    x_t, timestep, context, mask = inputs()
    return transformer(
        x_t, encoder_hidden_states=context, timestep=timestep, encoder_attention_mask=mask.float()
    ).sample


NETWORKS = {
    "default": (),
    "embedders": (EVERYTHING,),
    "mixed ranks": ("attn_dim=2", "cross_attn_dim=5", "mlp_dim=3"),
    "feed-forward only": ("attn_dim=0", "cross_attn_dim=0"),
    "one block": ("train_block_indices=1",),
}


@pytest.mark.reference
@pytest.mark.parametrize("loader", ["pipeline", "transformer"])
@pytest.mark.parametrize("with_metadata", [True, False])
@pytest.mark.parametrize("arguments", NETWORKS.values(), ids=NETWORKS)
def test_diffusers_loads_what_we_save(tmp_path, arguments, with_metadata, loader):
    pytest.importorskip("peft")
    dit = tiny_dit()
    network = randomise(adapter(dit, *arguments, save_format="diffusers"))
    ((tensors, metadata),) = network.files("diffusers").values()
    save_tensors(tensors, tmp_path / "adapter.safetensors", metadata if with_metadata else {})
    pipe = pipeline()
    assert difference(their_answer(pipe.transformer), our_answer(tiny_dit())) < 2e-5
    if loader == "pipeline":
        pipe.load_lora_weights(tmp_path, weight_name="adapter.safetensors")
    else:
        pipe.transformer.load_lora_adapter(tmp_path, weight_name="adapter.safetensors", prefix="transformer")
    assert difference(their_answer(pipe.transformer), our_answer(dit)) < 2e-5
    assert difference(our_answer(dit), our_answer(tiny_dit())) > 1e-3


def test_fused_layers_are_cut_exactly():
    network = randomise(adapter(tiny_dit()))
    ((tensors, _),) = network.files("diffusers").values()
    for ours, theirs in (
        ("attn_qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
        ("cross_attn_kv_linear", ("attn2.to_k", "attn2.to_v")),
    ):
        update = network.modules_by_name[f"lora_unet_blocks_1_{ours}"].weights().delta()
        rows = update.chunk(len(theirs))
        for name, expected in zip(theirs, rows):
            at = f"transformer.transformer_blocks.1.{name}"
            assert torch.equal(tensors[f"{at}.lora_A.weight"], tensors[f"{at[: -len(name)]}{theirs[0]}.lora_A.weight"])
            product = tensors[f"{at}.lora_B.weight"] @ tensors[f"{at}.lora_A.weight"]
            assert difference(product, expected) < 1e-6


@pytest.mark.reference
@pytest.mark.parametrize("lora_alpha", [4, 9])
@pytest.mark.parametrize("modules", [["to_q", "to_k", "to_v"], ["to_q", "to_v", "conv_inverted", "conv_point"]])
def test_we_load_what_diffusers_saves(tmp_path, lora_alpha, modules):
    """As diffusers' training script does it: PEFT on some layers, saved by the pipeline with its configuration."""
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    pipe = pipeline()
    config = peft.LoraConfig(r=3, lora_alpha=lora_alpha, init_lora_weights=False, target_modules=modules)
    torch.manual_seed(3)
    pipe.transformer.add_adapter(config)
    diffusers.SanaPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=json.loads(json.dumps(config.to_dict(), default=list)),
    )
    dit = tiny_dit()
    load_adapter(tmp_path / "pytorch_lora_weights.safetensors", {"denoiser": dit}, TARGETS)
    assert difference(our_answer(dit), their_answer(pipe.transformer)) < 2e-5
    assert difference(our_answer(dit), our_answer(tiny_dit())) > 1e-3


@pytest.mark.parametrize("save_format", ["kohya", "diffusers"])
def test_what_was_saved_is_loaded_back(tmp_path, save_format):
    dit = tiny_dit()
    network = randomise(adapter(dit, EVERYTHING, "mlp_dim=6"))
    ((tensors, metadata),) = network.files(save_format).values()
    save_tensors(tensors, tmp_path / "adapter.safetensors", metadata)
    again = tiny_dit()
    load_adapter(tmp_path / "adapter.safetensors", {"denoiser": again}, copy.deepcopy(TARGETS))
    assert difference(our_answer(again), our_answer(dit)) < 1e-6
