"""Which layers of the published models get an adapter, and under which keys, built without weights."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from library.families.sana.adapter_targets import adapter_targets as sana_targets
from library.families.sana.linear_dit import CONFIGS as SANA_CONFIGS
from library.families.sana.linear_dit import LinearDiT
from library.families.sd3.adapter_targets import adapter_targets
from library.families.sd3.mmdit import CONFIGS, MMDiT
from library.nn.attention import attention_function
from networks.lora import inject
from networks.settings import AdapterSettings

GOLDEN = Path(__file__).parents[1] / "golden"
RANK_4 = AdapterSettings(rank=4, alpha=1.0)


def targets_for(config):
    return adapter_targets(depth=config.depth, dual_attention_blocks=config.dual_attention_blocks)


def meta_mmdit(kind):
    with torch.device("meta"):
        return MMDiT(CONFIGS[kind], attention=attention_function("sdpa"))


def meta_clip(width, layers):
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64
    )
    with torch.device("meta"):
        return CLIPTextModelWithProjection(config)


def meta_t5():
    config = T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        return T5EncoderModel(config)


def listing(network):
    return sorted(f"{name}\t{list(tensor.shape)}" for name, tensor in network.state_dict_kohya().items())


def parameters_per_rank(network):
    return sum(parameter.numel() for parameter in network.parameters()) / 4


@pytest.mark.parametrize(
    ("kind", "modules", "parameters"),
    [("sd3-medium", 237, 1_671_168), ("sd3.5-large", 377, 4_212_224), ("sd3.5-medium", 263, 1_850_880)],
)
def test_keys_and_shapes_of_the_denoisers_adapter(kind, modules, parameters):
    targets = targets_for(CONFIGS[kind])
    network = inject({"denoiser": meta_mmdit(kind)}, targets, RANK_4)
    assert len(network.modules_by_name) == modules
    assert parameters_per_rank(network) == parameters
    assert listing(network) == (GOLDEN / f"sd3_lora_keys_{kind}.txt").read_text().splitlines()


KINDS = {
    "lokr": AdapterSettings(method="lokr", rank=4, alpha=1.0, factor=16),
    "lokr_full": AdapterSettings(method="lokr", rank=10_000, alpha=1.0, factor=16),
    "loha": AdapterSettings(method="loha", rank=4, alpha=1.0),
}


def meta_adapter(model, settings):
    if model in CONFIGS:
        return inject({"denoiser": meta_mmdit(model)}, targets_for(CONFIGS[model]), settings)
    config = SANA_CONFIGS[model]
    with torch.device("meta"):
        denoiser = LinearDiT(config, attention=attention_function("sdpa"))
    return inject({"denoiser": denoiser}, sana_targets(depth=config.depth), settings)


@pytest.mark.parametrize(
    ("model", "kind", "modules", "parameters"),
    [
        ("sd3.5-medium", "lokr", 263, 530_048),
        ("sd3.5-medium", "lokr_full", 263, 8_748_800),
        ("sd3.5-medium", "loha", 263, 14_807_040),
        ("sana-1600m", "lokr", 140, 287_840),
        ("sana-1600m", "lokr_full", 140, 6_111_840),
        ("sana-1600m", "loha", 140, 8_064_000),
    ],
)
def test_sizes_of_lokr_and_loha(model, kind, modules, parameters):
    network = meta_adapter(model, KINDS[kind])
    assert len(network.modules_by_name) == modules
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize("model", ["sd3.5-medium", "sana-1600m"])
@pytest.mark.parametrize("kind", ["lokr", "loha"])
def test_keys_and_shapes_of_lokr_and_loha(model, kind):
    golden = GOLDEN / f"{'sd3' if model in CONFIGS else 'sana'}_{kind}_keys_{model}.txt"
    assert listing(meta_adapter(model, KINDS[kind])) == golden.read_text().splitlines()


def test_keys_and_shapes_of_the_text_encoders_adapters():
    roots = {"clip_l": meta_clip(768, 12), "clip_g": meta_clip(1280, 32)}
    network = inject(roots, targets_for(CONFIGS["sd3-medium"]), RANK_4)
    golden = [(GOLDEN / f"sd3_lora_keys_{name}.txt").read_text().splitlines() for name in roots]
    assert len(network.modules_by_name) == 72 + 192
    assert parameters_per_rank(network) == 903_168
    assert listing(network) == sorted(golden[0] + golden[1])


def test_keys_and_shapes_of_t5s_adapter():
    network = inject({"t5xxl": meta_t5()}, targets_for(CONFIGS["sd3-medium"]), RANK_4)
    assert len(network.modules_by_name) == 168
    assert listing(network) == (GOLDEN / "sd3_lora_keys_t5xxl.txt").read_text().splitlines()


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_layer_that_can_be_changed_has_a_place_in_diffusers(kind):
    targets = targets_for(CONFIGS[kind])
    settings = AdapterSettings(rank=1, alpha=1.0, optional_ranks=(1,) * 6)
    network = inject({"denoiser": meta_mmdit(kind), "clip_l": meta_clip(768, 12)}, targets, settings)
    paths = {f"{target.prefix}_{path.replace('.', '_')}" for target in targets.values() for path in target.fused}
    assert set(network.modules_by_name) <= paths
