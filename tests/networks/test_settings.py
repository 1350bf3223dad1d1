import subprocess
import sys

import pytest

from library.config.errors import ConfigError
from library.config.network import NetworkConfig, network_problems
from library.config.optimizer import OptimizerConfig
from networks.lora import inject
from networks.settings import read_settings
from networks.targeting import learning_rates, trained_components
from tests.networks.adapter_fixtures import TARGETS, Config, tiny_clip, tiny_mmdit


def settings(*network_args, **network):
    return read_settings(NetworkConfig(network_args=network_args, **network), TARGETS)


def ranks(*network_args, network_dim=4):
    network = inject({"denoiser": tiny_mmdit()}, TARGETS, settings(*network_args, network_dim=network_dim))
    prefix = "lora_unet_"
    return {name.removeprefix(prefix): layer.rank for name, layer in network.modules_by_name.items()}


@pytest.mark.parametrize("name", ["networks.lora", "networks.lora_sd3", "networks.lora_flux"])
def test_kohyas_names_mean_our_lora(name):
    assert NetworkConfig(network_module=name).network_module == name


@pytest.mark.parametrize(
    "name", ["networks.lora_fa", "networks.dylora", "my.module", "networks.loraa", "lycoris.locon"]
)
def test_other_modules_are_refused_and_the_message_names_what_works(name):
    with pytest.raises(ConfigError, match=r"networks\.lora"):
        NetworkConfig(network_module=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network_train_unet_only": True, "network_train_text_encoder_only": True}, "nothing to train"),
        ({"dim_from_weights": True}, "needs --network_weights"),
        ({"dim_from_weights": True, "network_weights": "a", "network_dim": 8}, "--network_dim 8 does nothing"),
        ({"dim_from_weights": True, "network_weights": "a", "network_alpha": 8.0}, "--network_alpha 8.0 does nothing"),
        ({"base_weights_multiplier": (1.0,)}, "1 values for 0 files"),
        ({"network_dropout": 1.0}, "below 1"),
        ({"scale_weight_norms": 0.0}, "above 0"),
        ({"network_args": ("conv_dim",)}, "key=value"),
        ({"network_args": ("conv_dim=1", "conv_dim=2")}, "twice"),
    ],
)
def test_contradictions_inside_the_group(options, message):
    with pytest.raises(ConfigError, match=message):
        NetworkConfig(**options)


def test_missing_multipliers_are_one():
    assert NetworkConfig(base_weights=("a", "b"), base_weights_multiplier=(0.5,)).base_weights_multipliers == (0.5, 1.0)


def test_options_that_do_not_act_stay_out_of_metadata():
    assert set(NetworkConfig().idle_options) == {"network_dropout"}
    config = NetworkConfig(network_weights="a", dim_from_weights=True, network_dropout=0.1)
    assert set(config.idle_options) == {"network_dim", "network_alpha"}


def test_contradictions_with_other_groups():
    unet_only = NetworkConfig(network_train_unet_only=True)
    assert network_problems(unet_only, OptimizerConfig(), caches_text=True) == []
    assert (
        "text_encoder_lr" in network_problems(unet_only, OptimizerConfig(text_encoder_lr=(1e-5,)), caches_text=True)[0]
    )
    assert "cache_text_encoder_outputs" in network_problems(NetworkConfig(), OptimizerConfig(), caches_text=True)[0]
    assert network_problems(NetworkConfig(), OptimizerConfig(text_encoder_lr=(0.0,)), caches_text=True) == []
    assert network_problems(NetworkConfig(), OptimizerConfig(), caches_text=False) == []
    text_only = NetworkConfig(network_train_text_encoder_only=True)
    assert "unet_lr" in network_problems(text_only, OptimizerConfig(unet_lr=1e-4), caches_text=False)[0]


@pytest.mark.parametrize("text", ["true", "True", "1", "yes", "on", "Y"])
def test_true_in_any_usual_spelling(text):
    assert settings(f"train_t5xxl={text}").switches == {"train_t5xxl"}
    assert settings("train_t5xxl=FALSE").switches == frozenset()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("context_att_dim=4", "did you mean context_attn_dim"),
        ("algo=lokr", "algo=lokr goes with --network_module lycoris.kohya; with networks.lora it does nothing"),
        ("factor=8", "factor does nothing for LoRA"),
        ("preset=attn", "preset: expected full, attn-mlp, attn-only"),
        ("split_qkv=True", "split_qkv=True can't be used.*three times the rank"),
        ("verbose=True", "verbose=True can't be used"),
        ("train_t5xxl=maybe", "expected true or false, got 'maybe'"),
        ("x_attn_dim=-1", "whole number of at least 0"),
        ("x_attn_dim=4.5", "whole number"),
        ("conv_alpha=1", "without conv_dim"),
        ("emb_dims=[4,4]", r"6 whole numbers, such as \[4,4,4,4,4,4\]"),
        ("rank_dropout=1", "below 1"),
        ("module_dropout=nan", "module_dropout"),
        ("loraplus_lr_ratio=0", "above 0"),
        ("train_block_indices=7-3", "block numbers"),
        ("train_block_indices=a", "block numbers"),
    ],
)
def test_unusable_network_args(argument, message):
    with pytest.raises(ConfigError, match=message):
        settings(argument)


def test_split_qkv_false_is_what_happens_anyway():
    settings("split_qkv=False")


def test_ranks_by_hand_contradict_ranks_from_a_file():
    with pytest.raises(ConfigError, match="x_attn_dim does nothing with --dim_from_weights"):
        settings("x_attn_dim=4", network_weights="a", dim_from_weights=True)
    with pytest.raises(ConfigError, match="keep one"):
        settings("dropout=0.1", network_dropout=0.1)


def test_dropouts_and_ratios():
    read = settings("rank_dropout=0.1", "module_dropout=0.2", "dropout=0.3", "loraplus_lr_ratio=4")
    assert (read.rank_dropout, read.module_dropout, read.dropout) == (0.1, 0.2, 0.3)
    assert (read.loraplus_unet_lr_ratio, read.loraplus_text_encoder_lr_ratio) == (4, 4)
    read = settings("loraplus_lr_ratio=4", "loraplus_text_encoder_lr_ratio=2")
    assert (read.loraplus_unet_lr_ratio, read.loraplus_text_encoder_lr_ratio) == (4, 2)


def test_ranks_by_type():
    by_type = ranks(
        "context_attn_dim=2", "context_mlp_dim=3", "context_mod_dim=5", "x_attn_dim=6", "x_mlp_dim=7", "x_mod_dim=0"
    )
    assert by_type["joint_blocks_1_context_block_attn_proj"] == 2
    assert by_type["joint_blocks_1_context_block_mlp_fc2"] == 3
    assert by_type["joint_blocks_2_context_block_adaLN_modulation_1"] == 5
    assert by_type["joint_blocks_0_x_block_attn2_qkv"] == by_type["joint_blocks_2_x_block_attn_qkv"] == 6
    assert by_type["joint_blocks_2_x_block_mlp_fc1"] == 7
    assert not any("x_block_adaLN" in name for name in by_type)
    assert ranks("x_attn_dim=9")["joint_blocks_0_x_block_mlp_fc1"] == 4


def test_chosen_blocks():
    assert {name.split("_")[2] for name in ranks("train_block_indices=0,2")} == {"0", "2"}
    assert {name.split("_")[2] for name in ranks("train_block_indices=1-2")} == {"1", "2"}
    assert ranks("train_block_indices=all") == ranks()
    only_embedders = ranks("train_block_indices=none", "emb_dims=[0,0,0,4,0,0]")
    assert set(only_embedders) == {"y_embedder_mlp_0", "y_embedder_mlp_2"}
    with pytest.raises(ConfigError, match="no layer of denoiser"):
        ranks("train_block_indices=none")
    with pytest.raises(ConfigError, match="names block 3, but denoiser has blocks 0 to 2"):
        ranks("train_block_indices=0,3")


def test_the_choice_of_blocks_is_the_denoisers():
    roots = {"denoiser": tiny_mmdit(), "clip_l": tiny_clip()}
    network = inject(roots, TARGETS, settings("train_block_indices=0"))
    assert sum(layer.component == "clip_l" for layer in network.modules_by_name.values()) == 2 * 6


def test_embedders_and_final_layer_in_kohyas_order():
    extra = {name: rank for name, rank in ranks("emb_dims=[1,2,3,5,6,7]").items() if not name.startswith("joint")}
    assert extra == {
        "context_embedder": 1,
        "t_embedder_mlp_0": 2,
        "t_embedder_mlp_2": 2,
        "x_embedder_proj": 3,
        "y_embedder_mlp_0": 5,
        "y_embedder_mlp_2": 5,
        "final_layer_adaLN_modulation_1": 6,
        "final_layer_linear": 7,
    }
    assert not any(not name.startswith("joint") for name in ranks())


@pytest.mark.parametrize("argument", ["conv_dim=4", "x_mod_dim=4", "emb_dims=[1,1,1,1,1,1]", "train_block_indices=0"])
def test_settings_that_apply_to_no_layer_are_errors(argument):
    component = {"denoiser": tiny_mmdit()} if argument == "conv_dim=4" else {"clip_l": tiny_clip()}
    with pytest.raises(ConfigError, match="does nothing"):
        inject(component, TARGETS, settings(argument))


def components(config):
    return trained_components(config.network, read_settings(config.network, TARGETS), config.optimizer, TARGETS)


def test_which_components_are_trained():
    assert components(Config()) == ("denoiser", "clip_l", "clip_g")
    assert components(Config(network_train_unet_only=True)) == ("denoiser",)
    assert components(Config(network_train_text_encoder_only=True)) == ("clip_l", "clip_g")
    assert components(Config(network_args=("train_t5xxl=true",))) == ("denoiser", "clip_l", "clip_g", "t5xxl")
    assert components(Config(OptimizerConfig(unet_lr=0.0))) == ("clip_l", "clip_g")
    assert components(Config(OptimizerConfig(text_encoder_lr=(0.0, 1e-5)))) == ("denoiser", "clip_g")
    with pytest.raises(ConfigError, match="nothing is left to train"):
        components(Config(OptimizerConfig(learning_rate=0.0)))
    with pytest.raises(ConfigError, match="train_t5xxl does nothing with --network_train_unet_only"):
        components(Config(network_train_unet_only=True, network_args=("train_t5xxl=1",)))
    with pytest.raises(ConfigError, match="train_t5xxl does nothing with a learning rate of 0"):
        silent = OptimizerConfig(text_encoder_lr=(1e-5, 1e-5, 0.0))
        components(Config(silent, network_args=("train_t5xxl=true",)))
    with pytest.raises(ConfigError, match="for t5xxl does nothing"):
        components(Config(OptimizerConfig(text_encoder_lr=(1e-5, 1e-5, 1e-5))))


def test_learning_rates():
    def rates(**options):
        return tuple(learning_rates(OptimizerConfig(**options), TARGETS).values())

    assert rates() == (1e-4,) * 4
    assert rates(learning_rate=2.0) == (2,) * 4
    assert rates(learning_rate=2.0, unet_lr=3.0) == (3, 2, 2, 2)
    assert rates(text_encoder_lr=(5.0,)) == (1e-4, 5, 5, 5)
    assert rates(text_encoder_lr=(5.0, 6.0)) == (1e-4, 5, 6, 6)
    assert rates(text_encoder_lr=(5.0, 6.0, 7.0)) == (1e-4, 5, 6, 7)


@pytest.mark.parametrize(
    "module", ["library.config.network", "library.families.sd3.adapter_targets", "networks.settings"]
)
def test_light_modules_do_not_import_torch(module):
    code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
