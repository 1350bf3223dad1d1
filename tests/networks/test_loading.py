import copy
import logging
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.config.errors import ConfigError
from library.config.optimizer import OptimizerConfig
from library.io.safetensors import save_tensors
from networks.loading import adapter_components, check_network, create_network, load_adapter
from networks.merge import merge
from tests.networks.adapter_fixtures import LARGEST, TARGETS, Config, inputs, randomise, tiny_clip, tiny_mmdit

QKV = "lora_unet_joint_blocks_1_x_block_attn_qkv"
UNET_ONLY = {"network_train_unet_only": True}


def models():
    return {"denoiser": tiny_mmdit(), "clip_l": tiny_clip(), "clip_g": tiny_clip(1)}


def saved(path, save_format="kohya", *, dtype=None, optimizer=None, **network):
    """A trained adapter in a file, and the models with it in place."""
    roots = models()
    created = create_network(Config(optimizer, **network), roots, TARGETS, 0)
    randomise(created)
    for suffix, (tensors, metadata) in created.files(save_format).items():
        save_tensors(tensors, path.with_name(path.stem + suffix + ".safetensors"), metadata, dtype=dtype)
    return roots


def outputs(roots):
    ids = torch.tensor([[3, 5, 7, 49]])
    return [roots["denoiser"](*inputs()), roots["clip_l"](ids).text_embeds, roots["clip_g"](ids).text_embeds]


def merged_by_hand(roots, path, strength=1.0):
    """From the format's definition: W + alpha / rank * up @ down, for every key of the file, by the key's own words."""
    tensors = load_file(path)
    prefixes = {"lora_unet_": "denoiser", "lora_te1_": "clip_l", "lora_te2_": "clip_g"}
    weights = {
        prefix + name.removesuffix(".weight").replace(".", "_"): parameter
        for prefix, component in prefixes.items()
        for name, parameter in roots[component].named_parameters()
        if name.endswith(".weight")
    }
    for key in (key for key in tensors if key.endswith(".lora_down.weight")):
        name = key.removesuffix(".lora_down.weight")
        down, up = tensors[key], tensors[f"{name}.lora_up.weight"]
        scale = strength * tensors[f"{name}.alpha"].item() / len(down)
        with torch.no_grad():
            product = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
            weights[name] += scale * product.reshape(weights[name].shape)
    return roots


def assert_same_outputs(actual, expected, tolerance=2e-5):
    for ours, theirs in zip(outputs(actual), outputs(expected)):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_a_saved_adapter_acts_as_its_file_defines(tmp_path):
    path = tmp_path / "a.safetensors"
    trained = saved(path, network_dim=4, network_alpha=2.0, network_args=(LARGEST,))
    assert_same_outputs(trained, merged_by_hand(models(), path))
    assert not torch.allclose(outputs(trained)[0], outputs(models())[0])


@pytest.mark.parametrize("save_format", ["kohya", "diffusers"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_saved_adapter_loads_for_pictures(tmp_path, save_format, strength):
    path = tmp_path / "a.safetensors"
    saved(path, "both", network_dim=4, network_alpha=2.0, network_args=(LARGEST, "x_mlp_dim=2"))
    file = path if save_format == "kohya" else tmp_path / "a_diffusers.safetensors"
    roots = models()
    network = load_adapter(file, roots, TARGETS, strength)
    assert_same_outputs(roots, merged_by_hand(models(), path, strength))
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert network.modules_by_name["lora_unet_joint_blocks_0_x_block_mlp_fc1"].rank == 2
    network.remove()
    assert_same_outputs(roots, models(), tolerance=0)


@pytest.mark.parametrize("save_format", ["kohya", "diffusers"])
def test_merging_equals_having_it_in_place(tmp_path, save_format):
    path = tmp_path / "a.safetensors"
    trained = saved(path, save_format, network_dim=4, network_alpha=2.0, network_args=(LARGEST,))
    roots = models()
    assert merge(roots, TARGETS, [path]) == len(load_file(path)) // 3 or save_format == "diffusers"
    assert_same_outputs(roots, trained)


def test_several_files_with_strengths_merge_with_one_rounding(tmp_path):
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for i, path in enumerate(paths):
        saved(path, network_dim=2 + i)
    roots = {component: root.to(torch.bfloat16) for component, root in models().items()}
    start = {component: copy.deepcopy(root).float() for component, root in roots.items()}
    expected = merged_by_hand(merged_by_hand(start, paths[0], 0.25), paths[1], 1.0)["denoiser"].to(torch.bfloat16)
    merge(roots, TARGETS, paths, [0.25])
    pairs = list(zip(roots["denoiser"].parameters(), expected.parameters()))
    assert all(merged.dtype == torch.bfloat16 for merged, _ in pairs)
    # Rounded twice, one number in six would be off by one step.
    different = sum((merged != exact).sum().item() for merged, exact in pairs)
    assert different <= 0.001 * sum(exact.numel() for _, exact in pairs)


def test_components_that_are_not_loaded_are_not_forgotten_silently(tmp_path):
    path = tmp_path / "a.safetensors"
    saved(path)
    assert adapter_components(path, TARGETS) == {"denoiser", "clip_l", "clip_g"}
    only = {"denoiser": tiny_mmdit()}
    for act in (partial(load_adapter, path, only, TARGETS), partial(merge, only, TARGETS, [path])):
        with pytest.raises(ConfigError, match="also changes clip_g, clip_l"):
            act()
        act(partial=True)


def test_components_of_a_diffusers_file(tmp_path):
    path = tmp_path / "a.safetensors"
    saved(path, "diffusers", optimizer=OptimizerConfig(text_encoder_lr=(0.0, 1e-5)))
    assert adapter_components(path, TARGETS) == {"denoiser", "clip_g"}


def test_start_from_a_file(tmp_path):
    path = tmp_path / "a.safetensors"
    trained = saved(path, network_dim=4, network_alpha=2.0)
    roots = models()
    create_network(Config(network_weights=str(path), network_dim=4, network_alpha=2.0), roots, TARGETS, 1)
    assert_same_outputs(roots, trained, tolerance=0)


def test_ranks_from_a_file(tmp_path):
    path = tmp_path / "a.safetensors"
    trained = saved(path, network_dim=6, network_alpha=2.0, network_args=("train_block_indices=1", "x_mlp_dim=2"))
    roots = models()
    network = create_network(Config(network_weights=str(path), dim_from_weights=True), roots, TARGETS, 1)
    assert_same_outputs(roots, trained, tolerance=0)
    assert all(parameter.requires_grad for parameter in network.parameters())
    ((_, metadata),) = network.files("kohya").values()
    assert metadata == {"ss_network_dim": "Dynamic", "ss_network_alpha": "2.0"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network_dim": 8, "network_alpha": 2.0}, "rank 4 where this run has 8 .*--network_dim 4, or add --dim_from"),
        ({"network_dim": 4, "network_alpha": 4.0}, "alpha 2 where this run has 4 .*--network_alpha 2"),
    ],
)
def test_another_rank_or_alpha_than_the_files_is_an_error(tmp_path, options, message):
    path = tmp_path / "a.safetensors"
    saved(path, network_dim=4, network_alpha=2.0)
    with pytest.raises(ConfigError, match=message):
        create_network(Config(network_weights=str(path), **options), models(), TARGETS, 1)


def test_an_alpha_that_was_rounded_when_saved_is_the_same_alpha(tmp_path):
    path = tmp_path / "a.safetensors"
    saved(path, network_dim=4, network_alpha=0.3, dtype=torch.bfloat16)
    create_network(Config(network_weights=str(path), network_dim=4, network_alpha=0.3), models(), TARGETS, 1)


def test_partial_matches_are_reported(tmp_path, caplog):
    path = tmp_path / "a.safetensors"
    saved(path, network_args=("train_block_indices=0,1",), **UNET_ONLY)
    with caplog.at_level(logging.INFO):
        config = Config(network_weights=str(path), network_args=("train_block_indices=1,2",), **UNET_ONLY)
        create_network(config, {"denoiser": tiny_mmdit()}, TARGETS, 1)
    text = caplog.text
    # Block 0 has a second attention, two layers more; the last block has three fewer.
    assert "10 layers loaded" in text
    assert "12 of its 22 layers are left out" in text
    assert "nothing for 7 layers of this adapter; they start at zero" in text


def test_nothing_in_common_is_an_error(tmp_path):
    path = tmp_path / "a.safetensors"
    saved(path, network_args=("train_block_indices=0",), **UNET_ONLY)
    config = Config(network_weights=str(path), network_args=("train_block_indices=1",), **UNET_ONLY)
    with pytest.raises(ConfigError, match="has nothing for the layers"):
        create_network(config, models(), TARGETS, 1)


def rewritten(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("act", ["create", "load", "merge"])
def test_files_for_another_model_are_refused(tmp_path, act):
    def attempt(path):
        if act == "create":
            create_network(Config(network_weights=str(path)), models(), TARGETS, 1)
        elif act == "load":
            load_adapter(path, models(), TARGETS)
        else:
            merge(models(), TARGETS, [path])

    saved(tmp_path / "a.safetensors")

    def deeper(tensors):
        for part in ("lora_down.weight", "lora_up.weight", "alpha"):
            tensors[f"lora_unet_joint_blocks_9_x_block_attn_qkv.{part}"] = tensors[f"{QKV}.{part}"].clone()

    with pytest.raises(ConfigError, match=r"another model: 1 of its .*joint_blocks_9"):
        attempt(rewritten(tmp_path / "a.safetensors", deeper))

    saved(tmp_path / "b.safetensors")
    wider = {f"{QKV}.lora_down.weight": torch.zeros(4, 64)}
    with pytest.raises(ConfigError, match=r"another model: .*\[96, 64\]"):
        attempt(rewritten(tmp_path / "b.safetensors", lambda tensors: tensors.update(wider)))

    (tmp_path / "c.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ConfigError, match="pickle"):
        attempt(tmp_path / "c.safetensors")


def test_an_adapter_that_is_not_finite_is_not_saved(tmp_path):
    created = create_network(Config(**UNET_ONLY), {"denoiser": tiny_mmdit()}, TARGETS, 0)
    with torch.no_grad():
        created.modules_by_name[QKV].lora_up.weight[0] = torch.nan
    ((tensors, metadata),) = created.files("kohya").values()
    with pytest.raises(ValueError, match=QKV):
        save_tensors(tensors, tmp_path / "a.safetensors", metadata)
    assert list(tmp_path.iterdir()) == []


def test_components_without_a_learning_rate_get_no_adapter():
    config = Config(OptimizerConfig(text_encoder_lr=(0.0, 1e-5)))
    assert create_network(config, models(), TARGETS, 0).components == ("denoiser", "clip_g")


def test_a_component_to_train_must_be_loaded():
    with pytest.raises(ConfigError, match="would train clip_l, clip_g, which this run doesn't load"):
        create_network(Config(), {"denoiser": tiny_mmdit()}, TARGETS, 0)


def test_what_can_be_checked_before_loading(tmp_path):
    def check(**network):
        return check_network(Config(**network).network, OptimizerConfig(), TARGETS)

    assert check(**UNET_ONLY) == ("denoiser",)
    with pytest.raises(ConfigError, match="diffusers has no place for an adapter of t5xxl"):
        check(save_format="both", network_args=("train_t5xxl=true",))
    with pytest.raises(ConfigError, match="does not exist"):
        check(base_weights=(str(tmp_path / "none.safetensors"),))
    other = tmp_path / "other.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2)}, other)
    with pytest.raises(ConfigError, match="not an adapter for this model"):
        check(network_weights=str(other))


def test_network_args_are_written_as_kohyas_json():
    config = Config(network_args=("rank_dropout=0.1", "x_mlp_dim=2"), **UNET_ONLY)
    ((_, metadata),) = create_network(config, models(), TARGETS, 0).files("kohya").values()
    assert metadata == {"ss_network_args": '{"rank_dropout": "0.1", "x_mlp_dim": "2"}'}
