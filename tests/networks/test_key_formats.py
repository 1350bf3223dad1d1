import json

import pytest
import torch

from library.config.errors import ConfigError
from library.config.network import NetworkConfig
from networks.key_formats import DIFFUSERS, KOHYA, detect_format, read_weights, to_diffusers, to_kohya
from networks.lora import inject
from networks.lora_layer import LoraWeights
from networks.settings import read_settings
from tests.networks.adapter_fixtures import LARGEST, TARGETS, randomise, tiny_clip, tiny_mmdit

QKV = "lora_unet_joint_blocks_1_x_block_attn_qkv"
LAST_MODULATION = "lora_unet_joint_blocks_2_context_block_adaLN_modulation_1"
BEFORE_LAST_MODULATION = "lora_unet_joint_blocks_1_context_block_adaLN_modulation_1"


def trained(network_dim=3, network_alpha=2.0):
    roots = {"denoiser": tiny_mmdit(), "clip_l": tiny_clip(), "clip_g": tiny_clip(1)}
    config = NetworkConfig(network_dim=network_dim, network_alpha=network_alpha, network_args=(LARGEST, "x_mlp_dim=5"))
    return randomise(inject(roots, TARGETS, read_settings(config, TARGETS))).weights()


def deltas(weights):
    return {name: layer.delta() for name, layer in weights.items()}


def assert_same_update(actual, expected):
    actual, expected = deltas(actual), deltas(expected)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=name)


def test_kohya_and_back_is_exact():
    weights = trained()
    tensors = to_kohya(weights)
    assert len(tensors) == 3 * len(weights)
    assert tensors[f"{QKV}.alpha"].shape == ()
    back = read_weights(tensors, {}, TARGETS, "file")
    assert all(torch.equal(back[name].down, weights[name].down) for name in weights)
    assert all(torch.equal(back[name].up, weights[name].up) for name in weights)
    assert all(back[name].alpha == 2.0 for name in weights)


def test_diffusers_and_back_is_the_same_update_at_the_same_ranks():
    weights = trained()
    tensors, metadata = to_diffusers(weights, TARGETS)
    back = read_weights(tensors, metadata, TARGETS, "file")
    assert_same_update(back, weights)
    assert {name: layer.rank for name, layer in back.items()} == {name: layer.rank for name, layer in weights.items()}
    # Without its metadata, the file says the same.
    assert_same_update(read_weights(tensors, {}, TARGETS, "file"), weights)


def test_fused_layers_are_cut_and_share_down():
    weights = {QKV: trained()[QKV]}
    tensors, metadata = to_diffusers(weights, TARGETS)
    prefix = "transformer.transformer_blocks.1.attn"
    assert set(tensors) == {f"{prefix}.{part}.lora_{ab}.weight" for part in ("to_q", "to_k", "to_v") for ab in "AB"}
    whole = weights[QKV].delta()
    for i, part in enumerate(("to_q", "to_k", "to_v")):
        product = tensors[f"{prefix}.{part}.lora_B.weight"] @ tensors[f"{prefix}.{part}.lora_A.weight"]
        torch.testing.assert_close(product, whole[32 * i : 32 * (i + 1)])
    config = json.loads(metadata["lora_adapter_metadata"])
    assert config["transformer.r"] == config["transformer.lora_alpha"] == 3
    assert len(config["transformer.target_modules"]) == 3


def test_halves_are_swapped_where_diffusers_wants_scale_first():
    weights = trained()
    tensors, _ = to_diffusers(weights, TARGETS)
    for name, theirs, swapped in (
        (LAST_MODULATION, "transformer_blocks.2.norm1_context.linear", True),
        (BEFORE_LAST_MODULATION, "transformer_blocks.1.norm1_context.linear", False),
        ("lora_unet_final_layer_adaLN_modulation_1", "norm_out.linear", True),
    ):
        up = tensors[f"transformer.{theirs}.lora_B.weight"]
        half = up.shape[0] // 2
        assert torch.equal(up, weights[name].up) != swapped
        assert torch.equal(torch.cat([up[half:], up[:half]]), weights[name].up) == swapped


def separate(*, shared=False, alphas=(None, None, None), missing=(), suffixes=("lora_A.weight", "lora_B.weight")):
    """Three separate updates of q, k and v, and the fused update they amount to."""
    generator = torch.Generator().manual_seed(0)
    tensors, rows = {}, []
    down = torch.randn(2, 32, generator=generator)
    for part, alpha in zip(("to_q", "to_k", "to_v"), alphas):
        own, up = torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)
        own = down if shared else own
        if part in missing:
            rows.append(torch.zeros(32, 32))
            continue
        key = f"transformer.transformer_blocks.1.attn.{part}"
        tensors[f"{key}.{suffixes[0]}"], tensors[f"{key}.{suffixes[1]}"] = own, up
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        rows.append(up @ own * (1.0 if alpha is None else alpha / 2))
    return tensors, torch.cat(rows)


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({}, 6),
        ({"shared": True}, 2),
        ({"alphas": (1.0, 4.0, 0.5)}, 6),
        ({"shared": True, "alphas": (1.0, 1.0, 1.0)}, 2),
        ({"shared": True, "alphas": (1.0, 4.0, 0.5)}, 6),
        ({"missing": ("to_k",)}, 4),
        ({"missing": ("to_k", "to_v"), "alphas": (1.0, 1.0, 1.0)}, 2),
        ({"shared": True, "missing": ("to_q",)}, 2),
        ({"suffixes": ("lora.down.weight", "lora.up.weight")}, 6),
        ({"suffixes": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")}, 6),
        ({"suffixes": ("lora_A.default.weight", "lora_B.default.weight")}, 6),
    ],
)
def test_separate_updates_become_one_exactly(options, rank):
    tensors, expected = separate(**options)
    (layer,) = read_weights(tensors, {}, TARGETS, "file").values()
    assert layer.rank == rank
    torch.testing.assert_close(layer.delta(), expected)


def test_pefts_alphas_are_honoured():
    tensors, _ = separate()
    config = {"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"attn.to_k": 6}, "transformer.r": 2}
    for rslora, root in ((False, 2.0), (True, 2.0**0.5)):
        metadata = {"lora_adapter_metadata": json.dumps({**config, "transformer.use_rslora": rslora})}
        (layer,) = read_weights(tensors, metadata, TARGETS, "file").values()
        key = "transformer.transformer_blocks.1.attn"
        rows = [
            strength / root * tensors[f"{key}.{part}.lora_B.weight"] @ tensors[f"{key}.{part}.lora_A.weight"]
            for part, strength in (("to_q", 4), ("to_k", 6), ("to_v", 4))
        ]
        torch.testing.assert_close(layer.delta(), torch.cat(rows))


def test_kohya_without_alpha_has_strength_one():
    tensors = to_kohya(trained())
    del tensors[f"{QKV}.alpha"]
    layer = read_weights(tensors, {}, TARGETS, "file")[QKV]
    torch.testing.assert_close(layer.delta(), layer.up @ layer.down)


def test_formats_are_told_apart():
    weights = trained()
    assert detect_format(to_kohya(weights), TARGETS, "file") == KOHYA
    assert detect_format(to_diffusers(weights, TARGETS)[0], TARGETS, "file") == DIFFUSERS


def test_t5_has_no_place_in_diffusers():
    weights = {
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q": LoraWeights(torch.zeros(2, 8), torch.zeros(8, 2), 1.0)
    }
    with pytest.raises(ConfigError, match="no place for 1 layers, such as lora_te3"):
        to_diffusers(weights, TARGETS)


def broken(change):
    tensors = to_kohya({QKV: trained()[QKV]})
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.weight": torch.zeros(2)}, "not an adapter for this model.*model.weight.*expected lora_unet_"),
        ({"lora_transformer_a.lora_down.weight": torch.zeros(2, 2)}, "not an adapter for this model"),
        ({"lora_unet_a.lokr_t2": torch.zeros(2, 2)}, "Tucker LoKr adapter"),
        ({"transformer.a.lokr_w1": torch.zeros(2, 2)}, "LoKr or LoHa for diffusers' layers"),
        ({"lycoris_transformer_blocks_0_attn_to_q.lokr_w1": torch.zeros(2, 2)}, "LoKr or LoHa for diffusers' layers"),
        ({"lycoris_transformer_blocks_0_attn_to_out_0.hada_w1_a": torch.zeros(2, 2)}, "LoHa for diffusers' layers"),
        ({"lora_unet_a.dora_scale": torch.zeros(2, 2)}, "DoRA adapter"),
        (broken(lambda t: t.pop(f"{QKV}.lora_up.weight")), "has no up weights"),
        (broken(lambda t: t.update({f"{QKV}.lora_up.weight": torch.zeros(96, 5)})), "no rank in common"),
        (broken(lambda t: t.update({f"{QKV}.lora_up.weight": torch.full((96, 3), torch.nan)})), "not finite"),
        (broken(lambda t: t.update({f"{QKV}.alpha": torch.tensor(torch.inf)})), "not finite"),
        (
            broken(lambda t: t.update({"other_layer.lora_down.weight": torch.zeros(3, 3)})),
            "1 layers are not this model's",
        ),
        (broken(lambda t: t.update({"strange": torch.zeros(3, 3)})), "1 keys are not an adapter's: strange"),
        (
            {"transformer.blocks.0.lora_A.weight": torch.zeros(2, 2)},
            "1 layers are not this model's: transformer.blocks.0",
        ),
    ],
)
def test_broken_files_are_refused(tensors, message):
    with pytest.raises(ConfigError, match=message):
        read_weights(tensors, {}, TARGETS, "file")
