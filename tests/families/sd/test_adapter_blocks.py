"""Ranks, alphas and learning rates by block, counted as kohya's scripts count them.

The tiny model has 4 blocks down, the middle and 4 up; the published ones have 12, 1 and 12.
"""

import math

import pytest

from library.config.errors import ConfigError
from library.config.network import NetworkConfig
from library.config.optimizer import OptimizerConfig
from library.families.sd.unet import CONFIGS
from library.io.safetensors import save_tensors
from networks.block_settings import read_block_settings
from networks.settings import read_settings
from networks.targeting import block_of
from tests.families.sd.adapter_models import KINDS, adapter, models, targets_for
from tests.networks.adapter_fixtures import TARGETS as SD3_TARGETS
from tests.networks.adapter_fixtures import randomise

TARGETS = targets_for(KINDS["sd1"])
PUBLISHED = targets_for(CONFIGS["sd1"])
BLOCK_OF_NAME = {
    "down_blocks_0_resnets_0": 1,
    "down_blocks_0_attentions_0": 1,
    "down_blocks_0_downsamplers_0": 2,
    "down_blocks_1_resnets_0": 3,
    "mid_block": 4,
    "up_blocks_0_resnets_0": 5,
    "up_blocks_0_resnets_1": 6,
    "up_blocks_0_upsamplers_0": 6,
    "up_blocks_1_resnets_0": 7,
    "up_blocks_1_attentions_0": 7,
    "up_blocks_1_resnets_1": 8,
    "up_blocks_1_attentions_1": 8,
}
BLOCKS = 9


def block_of_name(name):
    return next(block for part, block in BLOCK_OF_NAME.items() if name.startswith(f"lora_unet_{part}_"))


def unet_adapter(*arguments, **options):
    return adapter(models("sd1"), *arguments, network_train_unet_only=True, **options)


def by_block(network):
    """(Rank, alpha) of linear layers and 1x1 convolutions, and of the other convolutions, by block."""
    found = [{}, {}]
    for name, layer in network.modules_by_name.items():
        wide = max(layer.wrapped.kernel, default=1) > 1
        found[wide].setdefault(block_of_name(name), set()).add((layer.rank, layer.alpha))
    return found


def test_blocks_are_those_that_kohya_counts():
    target = PUBLISHED["denoiser"]
    assert [len(blocks) for blocks in target.ways.values()] == [12, 1, 12]
    # kohya: 1 + 3 * resolution + place on the way down, 12 in the middle, 13 + 3 * resolution + place on the way up
    for path, number in {
        "down_blocks.0.attentions.1.proj_in": 2,
        "down_blocks.1.downsamplers.0.conv": 6,
        "down_blocks.3.resnets.1.conv1": 11,
        "mid_block.attentions.0.proj_in": 12,
        "up_blocks.0.resnets.0.conv1": 13,
        "up_blocks.0.upsamplers.0.conv": 15,
        "up_blocks.2.attentions.0.proj_in": 19,
        "up_blocks.3.attentions.2.proj_out": 24,
    }.items():
        ours = next(ours for ours, theirs in target.key_paths.items() if theirs == path)
        assert block_of(target, ours) == number, path


def test_ranks_and_alphas_of_blocks():
    ranks, alphas = "9,1,2,3,0,5,6,7,8", "1,2,3,4,5,6,7,8,9"
    matrices, convolutions = by_block(unet_adapter(f"block_dims={ranks}", f"block_alphas={alphas}"))
    assert matrices == {1: {(1, 2.0)}, 7: {(7, 8.0)}, 8: {(8, 9.0)}} and not convolutions
    matrices, convolutions = by_block(
        unet_adapter(
            f"block_dims={ranks}", f"conv_block_dims={alphas}", f"conv_block_alphas={ranks}", network_alpha=2.5
        )
    )
    assert matrices == {block: {(int(ranks.split(",")[block]), 2.5)} for block in (1, 3, 5, 6, 7, 8)}
    assert convolutions == {
        # An alpha of 0 means the rank.
        block: {(block + 1, float(ranks.split(",")[block]) or block + 1.0)}
        for block in range(1, BLOCKS)
    }


def test_lists_stand_alone_and_take_the_rest_from_the_plain_settings():
    matrices, _ = by_block(unet_adapter("block_alphas=1,2,3,4,5,6,7,8,9"))
    assert matrices == {1: {(4, 2.0)}, 4: {(4, 5.0)}, 7: {(4, 8.0)}, 8: {(4, 9.0)}}
    _, convolutions = by_block(unet_adapter("conv_block_dims=1,2,3,0,0,0,0,0,0", "conv_alpha=3"))
    assert convolutions == {1: {(2, 3.0)}, 2: {(3, 3.0)}}
    _, convolutions = by_block(unet_adapter("conv_dim=2", "conv_block_alphas=1,2,3,4,5,6,7,8,9"))
    assert convolutions[5] == {(2, 6.0)}
    text = adapter(models("sd1"), "block_dims=1,1,1,1,1,1,1,1,1").modules_by_name
    assert text["lora_te_text_model_encoder_layers_0_mlp_fc1"].rank == 4


def test_blocks_can_be_chosen():
    assert set(by_block(unet_adapter("train_block_indices=4,7-8"))[0]) == {4, 7, 8}


def rates(*arguments, targets=PUBLISHED):
    return read_block_settings(dict(argument.split("=") for argument in arguments), targets).rates


def test_courses_of_learning_rates():
    steps = [i / 11 for i in range(12)]
    sine = [math.sin(math.pi * step / 2) for step in steps]
    ones = [1.0] * 12
    assert rates("down_lr_weight=sine") == pytest.approx([*sine, 1.0, *ones])
    assert rates("up_lr_weight=cosine") == pytest.approx([*ones, 1.0, *reversed(sine)])
    assert rates("down_lr_weight=linear", "up_lr_weight=reverse_linear") == pytest.approx(
        [*steps, 1.0, *reversed(steps)]
    )
    assert rates("down_lr_weight=zeros+.25", "mid_lr_weight=2") == pytest.approx([*[0.25] * 12, 2.0, *ones])
    assert rates("down_lr_weight=cosine+.5")[0] == 1.5
    assert rates("up_lr_weight=cosine")[-1] == rates("up_lr_weight=reverse_linear")[-1] == 0.0
    listed = [0.5, *[1.0] * 10, 0.1]
    typed = "down_lr_weight=" + ",".join(map(str, listed))
    assert rates(typed) == (*listed, 1.0, *ones)
    assert rates(typed, "block_lr_zero_threshold=0.1") == (*listed[:-1], 0.0, 1.0, *ones)


def groups(*arguments, **options):
    network = adapter(models("sd1"), *arguments, **options)
    optimizer = OptimizerConfig(unet_lr=1e-3, text_encoder_lr=(1e-4,))
    return network, {group["name"]: group for group in network.parameter_groups(optimizer)}


RATES = ("down_lr_weight=0,0.5,0.25,0.05", "mid_lr_weight=2", "block_lr_zero_threshold=0.05")


def test_every_block_is_a_group_and_one_without_a_rate_gets_no_adapter():
    network, found = groups(*RATES, "conv_dim=2", "emb_dims=[2,2,2]", "up_lr_weight=linear+0.5")
    expected = {1: 0.5, 2: 0.25, 4: 2.0, 5: 0.5, 6: 5 / 6, 7: 7 / 6, 8: 1.5}
    names = {f"unet block {block}": rate * 1e-3 for block, rate in expected.items()}
    assert {name: group["lr"] for name, group in found.items()} == pytest.approx(
        {"unet": 1e-3, **names, "textencoder 1": 1e-4}
    )
    assert not any("down_blocks_1" in name or name == "lora_unet_conv_in" for name in network.modules_by_name)
    outside = {"lora_unet_conv_out", "lora_unet_time_embedding_linear_1", "lora_unet_time_embedding_linear_2"}
    layers = network.modules_by_name
    ids = {id(parameter) for name in outside for parameter in layers[name].parameters()}
    assert {id(parameter) for parameter in found["unet"]["params"]} == ids
    every = [id(parameter) for group in found.values() for parameter in group["params"]]
    assert sorted(every) == sorted(id(parameter) for parameter in network.parameters())


def test_lora_plus_multiplies_what_the_block_says():
    _, found = groups("mid_lr_weight=0.5", "loraplus_unet_lr_ratio=4")
    assert found["unet block 4"]["lr"] == 0.5e-3 and found["unet block 4 plus"]["lr"] == 2e-3
    assert all(parameter.shape[0] == 4 for parameter in found["unet block 4"]["params"])
    assert found["unet block 1 plus"]["lr"] == 4e-3
    assert "textencoder 1 plus" not in found


def test_a_files_layers_without_a_rate_are_left_out(tmp_path):
    path = tmp_path / "adapter.safetensors"
    save_tensors(randomise(unet_adapter()).state_dict_kohya(), path, {})
    network = adapter(
        models("sd1"),
        "mid_lr_weight=0",
        network_weights=str(path),
        dim_from_weights=True,
        network_dim=4,
        network_alpha=1.0,
        network_train_unet_only=True,
    )
    assert network.modules_by_name and not any("mid_block" in name for name in network.modules_by_name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("block_dims=1,2",), "block_dims: expected 9 numbers, one per block of this model.*2 values"),
        (("block_dims=" + "1.5," * 8 + "1",), "block_dims: expected whole numbers"),
        (("block_alphas=" + "-1," * 8 + "1",), "block_alphas: expected numbers of at least 0"),
        (("block_alphas=" + "nan," * 8 + "1",), "block_alphas: expected numbers of at least 0"),
        (("down_lr_weight=1,1",), "down_lr_weight: expected 4 numbers.*or one of linear, reverse_linear, sine"),
        (("down_lr_weight=sin",), "down_lr_weight: expected 4 numbers"),
        (("down_lr_weight=sine+a",), r"down_lr_weight: expected a number, got 'a'"),
        (("mid_lr_weight=1,2",), "mid_lr_weight: expected a number"),
        (("block_lr_zero_threshold=0.1",), "does nothing without down_lr_weight, mid_lr_weight, up_lr_weight"),
        (("conv_block_alphas=1,1,1,1,1,1,1,1,1",), "conv_block_alphas does nothing without conv_dim"),
        (("conv_block_dims=1,1,1,1,1,1,1,1,1", "conv_dim=1"), "conv_dim does nothing with conv_block_dims"),
        (
            ("conv_dim=2", "conv_alpha=2", "conv_block_alphas=1,1,1,1,1,1,1,1,1"),
            "conv_alpha does nothing with conv_block_alphas",
        ),
        (("block_dims=1,1,1,1,1,1,1,1,1", "attn_dim=2"), "attn_dim and block_dims both set the rank"),
        (("x_attn_dim=2",), "x_attn_dim does nothing for this model: it is for the two streams of SD3"),
        (("train_t5xxl=true",), "train_t5xxl does nothing for this model"),
        (("block_dim=2",), "did you mean block_dims"),
    ],
)
def test_what_can_not_be(arguments, message):
    with pytest.raises(ConfigError, match=message):
        read_settings(NetworkConfig(network_args=arguments), TARGETS)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("down_lr_weight=zeros", "mid_lr_weight=0", "up_lr_weight=zeros"), {}, "leave no layer of denoiser"),
        (("mid_lr_weight=2",), {"network_train_text_encoder_only": True}, "_lr_weight does nothing: no component with"),
        (("conv_dim=2",), {"network_train_text_encoder_only": True}, "conv_dim does nothing"),
        (("train_block_indices=9",), {}, "names block 9, but denoiser has blocks 0 to 8"),
        (("block_dims=1,1,1,1,1,1,1,1,1",), {"dim_from_weights": True}, "block_dims does nothing with --dim_from_w"),
        (
            ("full_matrix=true", "block_dims=1,1,1,1,1,1,1,1,1"),
            {"network_module": "networks.lokr"},
            "block_dims does nothing with full_matrix=true",
        ),
    ],
)
def test_what_does_nothing_on_these_layers(arguments, options, message):
    own = {"network_dim": 4, "network_alpha": 1.0, "network_weights": "a"} if "dim_from_weights" in options else {}
    plain = {"network_dim": 4, "network_alpha": 1.0} if "network_module" in options else {}
    with pytest.raises(ConfigError, match=message):
        adapter(models("sd1"), *arguments, **options, **own, **plain)


@pytest.mark.parametrize(
    "name", ["block_dims", "block_alphas", "conv_block_dims", "down_lr_weight", "block_lr_zero_threshold"]
)
def test_models_without_a_way_down_and_up_say_so(name):
    with pytest.raises(ConfigError, match=f"{name} does nothing for this model: it counts the blocks of a U-Net"):
        read_settings(NetworkConfig(network_args=(f"{name}=1",)), SD3_TARGETS)


def test_rates_act_and_are_logged(sd_trainer):
    arguments = ["mid_lr_weight=0.5", "up_lr_weight=zeros"]
    assert sd_trainer("out", network_args=arguments, max_train_steps=2, unet_lr=1e-3, text_encoder_lr=1e-4) == 0
    line = sd_trainer.log("out")[-1]
    middle = next(name for name, rate in line.items() if name.startswith("lr/unet block") and rate == 0.5e-3)
    assert line["lr/textencoder 1"] == 1e-4 and line["lr/unet block 1"] == 1e-3 and middle
    weights = sd_trainer.weights("out")
    assert any("mid_block" in name for name in weights) and not any("up_blocks" in name for name in weights)
