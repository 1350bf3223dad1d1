"""Adapters on Stable Diffusion 1.x and 2.x: which layers, under which keys."""

from pathlib import Path

import pytest
import torch
from torch import nn

from library.families.sd.unet import CONFIGS, UNet
from library.io.safetensors import save_tensors
from library.nn.attention import sdpa
from networks.loading import load_adapter
from networks.lora import inject
from networks.merge import merge
from networks.settings import AdapterSettings
from tests.families.sd.adapter_models import (
    CLIP_LAYERS,
    EVERYTHING,
    KINDS,
    LAYERS,
    WITH_CONVOLUTIONS,
    adapter,
    assert_same,
    differences,
    models,
    our_answers,
    targets_for,
    tiny_clip,
)
from tests.families.sd.test_unet import inputs, random_unet, twin_of
from tests.networks.adapter_fixtures import randomise

GOLDEN = Path(__file__).parents[2] / "golden"
LIERLA = AdapterSettings(rank=4, alpha=1.0)
C3LIER = AdapterSettings(rank=4, alpha=1.0, conv_rank=2, conv_alpha=1.0)
ADAPTERS = {
    "sd1": ("sd1", {}, EVERYTHING),
    "sd2": ("sd2", {}, EVERYTHING),
    "sd1-loha": ("sd1", {"network_module": "networks.loha"}, ("conv_dim=2",)),
    "sd1-lokr": ("sd1", {"network_module": "networks.lokr"}, ("factor=4", "conv_dim=2")),
}


def meta_unet(kind):
    with torch.device("meta"):
        return UNet(CONFIGS[kind], attention=sdpa)


def listing(tensors):
    return sorted(f"{name}\t{list(tensor.shape)}" for name, tensor in tensors.items())


@pytest.mark.parametrize("kind", CONFIGS)
def test_keys_and_shapes_of_the_published_sizes(kind):
    """The counts are those that kohya's scripts print."""
    targets = targets_for(CONFIGS[kind])
    lierla = inject({"denoiser": meta_unet(kind)}, targets, LIERLA)
    c3lier = inject({"denoiser": meta_unet(kind)}, targets, C3LIER)
    assert len(lierla.modules_by_name) == 192
    assert len(c3lier.modules_by_name) == 278
    assert listing(c3lier.state_dict_kohya()) == (GOLDEN / f"sd_lora_keys_{kind}.txt").read_text().splitlines()
    plain = set(lierla.state_dict_kohya())
    assert plain < set(c3lier.state_dict_kohya())
    assert not any("resnets" in name or "samplers" in name for name in plain)


@pytest.mark.reference
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_layers_are_those_of_kohyas_module_list(kind):
    """Linear layers and convolutions inside diffusers' modules of these classes, named by their path there."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        twin = twin_of(diffusers, CONFIGS[kind])

    def expected(*classes):
        found = {}
        for path, module in twin.named_modules():
            if type(module).__name__ in classes:
                for inner, layer in module.named_modules():
                    if isinstance(layer, nn.Linear | nn.Conv2d):
                        wide = isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)
                        found[f"lora_unet_{path}.{inner}".replace(".", "_")] = 2 if wide else 4
        return found

    targets = targets_for(CONFIGS[kind])
    convolutional = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
    for settings, classes in ((LIERLA, ()), (C3LIER, convolutional)):
        network = inject({"denoiser": meta_unet(kind)}, targets, settings)
        ranks = {name: layer.rank for name, layer in network.modules_by_name.items()}
        assert ranks == expected("Transformer2DModel", *classes)


def test_every_layer_has_a_name_and_a_place_in_diffusers():
    for kind, config in KINDS.items():
        target = targets_for(config)["denoiser"]
        layers = [
            name for name, layer in random_unet(config).named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)
        ]
        assert set(layers) == set(target.key_paths) == set(target.fused), kind


def test_the_text_encoders_layers():
    network = inject({"clip": tiny_clip()}, targets_for(KINDS["sd1"]), LIERLA)
    assert len(network.modules_by_name) == 6 * CLIP_LAYERS
    assert "lora_te_text_model_encoder_layers_2_mlp_fc1" in network.modules_by_name


def test_layers_of_the_text_encoder_that_nothing_reads_get_none(sd_trainer):
    """--clip_skip 2 takes the features before the last of the two layers."""

    def text_layers(network):
        return {name for name in network.modules_by_name if name.startswith("lora_te_")}

    plain = sd_trainer.with_run("plain", lambda run: text_layers(run.trainable), max_train_steps=1)
    skipping = sd_trainer.with_run("skipping", lambda run: text_layers(run.trainable), max_train_steps=1, clip_skip=2)
    assert len(plain) == 12 and skipping == {name for name in plain if "_layers_0_" in name}


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_projections_are_convolutions_in_1x_and_linear_in_2x(kind):
    network = adapter(models(kind), "conv_dim=2")
    layers = network.modules_by_name
    ends = () if kind == "sd2" else (1, 1)
    for name in ("lora_unet_mid_block_attentions_0_proj_in", "lora_unet_down_blocks_0_attentions_0_proj_out"):
        assert layers[name].lora_down.weight.shape[2:] == layers[name].lora_up.weight.shape[2:] == ends
    assert layers["lora_unet_up_blocks_0_upsamplers_0_conv"].lora_down.weight.shape == (2, 64, 3, 3)
    assert layers["lora_unet_down_blocks_1_resnets_0_conv_shortcut"].lora_down.weight.shape == (4, 32, 1, 1)
    assert layers["lora_unet_down_blocks_1_resnets_0_time_emb_proj"].lora_down.weight.shape == (4, 128)


@pytest.mark.parametrize(("kind", "options", "arguments"), ADAPTERS.values(), ids=ADAPTERS)
def test_gradients_reach_every_layer_and_files_and_merging_give_the_same(tmp_path, kind, options, arguments):
    roots = models(kind)
    plain = our_answers(roots)
    network = adapter(roots, *arguments, **options)
    assert all(map(torch.equal, our_answers(roots), plain)), "a fresh adapter changes nothing"
    randomise(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.5)
    answers = our_answers(roots)
    assert min(differences(answers, plain)) > 1e-3
    roots["denoiser"](**inputs(roots["denoiser"].config)).square().mean().backward()
    trained = {name: parameter for name, parameter in network.named_parameters() if name.startswith("lora_unet_")}
    assert not [name for name, parameter in trained.items() if not parameter.grad.any()]

    path = tmp_path / "adapter.safetensors"
    save_tensors(network.state_dict_kohya(), path, {})
    targets = targets_for(KINDS[kind])
    again, merged = models(kind), models(kind)
    load_adapter(path, again, targets)
    assert_same(our_answers(again), answers)
    assert merge(merged, targets, [path]) == len(network.modules_by_name)
    assert_same(our_answers(merged), answers)


ATTENTION = ("_attn1_", "_attn2_")


@pytest.mark.parametrize(
    ("argument", "rank", "of_attention"), [("attn_dim=0", 0, 1), ("attn_dim=2", 2, 1), ("mlp_dim=5", 5, 0)]
)
def test_ranks_by_type(argument, rank, of_attention):
    network = adapter(models("sd1"), argument, network_train_unet_only=True)
    ranks = {True: set(), False: set()}
    for name, layer in network.modules_by_name.items():
        ranks[any(part in name for part in ATTENTION)].add(layer.rank)
    assert ranks == {bool(of_attention): {rank} if rank else set(), not of_attention: {4}}


def test_presets_of_lycoris():
    def ranks(*arguments, module="lycoris.kohya"):
        network = adapter(models("sd1"), *arguments, network_module=module, network_train_unet_only=True)
        return {name: layer.rank for name, layer in network.modules_by_name.items()}

    default = ranks()
    assert len(default) == WITH_CONVOLUTIONS and set(default.values()) == {4}, (
        "as in LyCORIS, convolutions have the rank"
    )
    assert ranks("preset=full") == default
    assert len(ranks("preset=full", module="networks.lora")) == LAYERS
    assert len(ranks("preset=attn-mlp")) == LAYERS
    assert len(ranks("preset=attn-only")) == 32
    assert set(ranks("conv_dim=2").values()) == {2, 4}
    layers = adapter(models("sd1"), network_module="lycoris.kohya").modules_by_name
    convolution = layers["lora_unet_mid_block_resnets_0_conv1"]
    assert (convolution.rank, convolution.alpha) == (4, 3.0)
