import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from library.families.sana.blocks import linear_attention
from library.families.sana.key_maps import denoiser_key_maps
from library.families.sana.linear_dit import CONFIGS, LinearDiT, LinearDiTConfig
from library.io.key_maps import from_diffusers, to_diffusers
from library.nn.attention import sdpa

KEYS = Path(__file__).parents[2] / "data" / "keys"
PUBLISHED = {"sana-600m": "keys_sana_600M_P1_D28.txt", "sana-1.5-1600m": "keys_sana_1.5_1600M_P1_D20.txt"}
LEARNABLE = {
    "sana-600m": 591_747_872,
    "sana-1600m": 1_604_462_752,
    "sana-1.5-1600m": 1_604_641_952,
    "sana-1.5-4800m": 4_721_825_952,
}
TENSORS = {
    "sana-600m": (436, 548),
    "sana-1600m": (316, 396),
    "sana-1.5-1600m": (396, 476),
    "sana-1.5-4800m": (1156, 1396),
}

# the heads of both attentions differ in number and width, so that mixing them up shows
TINY = LinearDiTConfig(
    depth=3,
    width=96,
    head_dim=32,
    num_cross_heads=4,
    mlp_ratio=2.5,
    patch_size=1,
    in_channels=8,
    context_width=20,
    qk_norm=False,
    position_base=None,
    position_scale=1.0,
)
KINDS = {
    "sana": TINY,
    "sana-1.5": dataclasses.replace(TINY, qk_norm=True),
    "sana-2k": dataclasses.replace(TINY, position_base=8, position_scale=1.0),
    "sana-4k": dataclasses.replace(TINY, position_base=8, position_scale=2.0),
}


def random_dit(config):
    """All weights random and of a size that lets every part show."""
    torch.manual_seed(0)
    dit = LinearDiT(config, attention=sdpa)
    for name, parameter in dit.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.15)
    return dit


def inputs(config, *, height=6, width=10, tokens=7):
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[0, 4:] = False
    return {
        "x_t": torch.randn(2, config.in_channels, height, width, generator=generator),
        "timestep": torch.tensor([3.25, 871.5]),
        "context": torch.randn(2, tokens, config.context_width, generator=generator),
        "mask": mask,
    }


def assert_close(actual, expected, tolerance=2e-5):
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def diffusers_twin(dit, height=6):
    diffusers = pytest.importorskip("diffusers")
    config = dit.config
    twin = diffusers.SanaTransformer2DModel(
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        num_layers=config.depth,
        num_cross_attention_heads=config.num_cross_heads,
        cross_attention_head_dim=config.width // config.num_cross_heads,
        cross_attention_dim=config.width,
        caption_channels=config.context_width,
        mlp_ratio=config.mlp_ratio,
        sample_size=config.position_base or 32,
        patch_size=config.patch_size,
        interpolation_scale=None if config.position_base is None else config.position_scale,
        qk_norm="rms_norm_across_heads" if config.qk_norm else None,
    )
    maps = denoiser_key_maps(depth=config.depth, qk_norm=config.qk_norm)
    twin.load_state_dict(dict(to_diffusers(dit.state_dict(), maps)), strict=True)
    return twin, maps


@pytest.mark.reference
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_equal_those_of_diffusers(kind):
    dit = random_dit(KINDS[kind])
    # positions: diffusers stretches its table to one size per model, so that the grid must be the base's
    size = {"height": 8, "width": 8} if dit.config.position_base else {}
    batch = inputs(dit.config, **size)
    twin, maps = diffusers_twin(dit)
    ours = {key: value.clone().requires_grad_(key in ("x_t", "context")) for key, value in batch.items()}
    theirs = {key: value.clone().requires_grad_(key in ("x_t", "context")) for key, value in batch.items()}
    output = dit(**ours)
    expected = twin(
        theirs["x_t"],
        encoder_hidden_states=theirs["context"],
        timestep=theirs["timestep"],
        encoder_attention_mask=theirs["mask"].float(),
    ).sample
    assert_close(output, expected)
    direction = torch.randn_like(output)
    (output * direction).sum().backward()
    (expected * direction).sum().backward()
    for name in ("x_t", "context"):
        assert_close(ours[name].grad, theirs[name].grad)
    gradients = dict(from_diffusers({name: p.grad for name, p in twin.named_parameters()}, maps))
    for name, parameter in dit.named_parameters():
        assert_close(parameter.grad, gradients[name], 2e-4)  # some are sums over all tokens that nearly cancel


@pytest.mark.reference
@pytest.mark.parametrize("kind", ["sana-2k", "sana-4k"])
def test_positions_are_stretched_on_other_grids(kind):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    from library.families.sana.linear_dit import position_table

    config = KINDS[kind]
    expected = embeddings.get_2d_sincos_pos_embed(
        config.width,
        (6, 10),
        base_size=config.position_base,
        interpolation_scale=config.position_scale,
        output_type="pt",
    )
    assert torch.allclose(position_table(config, 6, 10, "cpu")[0], expected.float(), atol=1e-6)


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_and_shapes_equal_those_of_the_published_file(name):
    with torch.device("meta"):
        dit = LinearDiT(CONFIGS[name], attention=sdpa)
    published = dict(line.split("\t") for line in (KEYS / PUBLISHED[name]).read_text().splitlines())
    published = {key: shape for key, shape in published.items() if key != "y_embedder.y_embedding"}
    assert {key: str(list(tensor.shape)) for key, tensor in dit.state_dict().items()} == published


@pytest.mark.parametrize("name", CONFIGS)
def test_published_sizes(name):
    with torch.device("meta"):
        dit = LinearDiT(CONFIGS[name], attention=sdpa)
    maps = denoiser_key_maps(depth=dit.config.depth, qk_norm=dit.config.qk_norm)
    assert sum(parameter.numel() for parameter in dit.parameters()) == LEARNABLE[name]
    assert (len(dit.state_dict()), len(dict(to_diffusers(dit.state_dict(), maps)))) == TENSORS[name]


def test_positions_belong_to_large_pictures():
    config = CONFIGS["sana-1600m"]
    assert config.at(1024) == config.at(512) == config
    assert (config.at(2048).position_base, config.at(2048).position_scale) == (64, 1.0)
    assert (config.at(4096).position_base, config.at(4096).position_scale) == (128, 2.0)


def test_masked_text_is_not_seen():
    dit = random_dit(TINY)
    batch = inputs(TINY)
    with torch.no_grad():
        expected = dit(**batch)
        changed = batch["context"].clone()
        changed[0, 4:] = 9.0
        assert torch.equal(dit(**{**batch, "context": changed}), expected)
        changed[1, 4:] = 9.0
        assert not torch.allclose(dit(**{**batch, "context": changed})[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_without_positive_queries_stays_finite_under_autocast(dtype):
    q, k, v = (torch.randn(1, 2, 5, 32, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", dtype):
        empty = linear_attention(-q.abs(), k, v)
        both = linear_attention(-q.abs(), -k.abs(), v)
        projected = linear_attention(*(nn.functional.linear(part, torch.eye(32)) for part in (q, k, v)))
    assert torch.equal(empty, torch.zeros_like(empty)) and torch.equal(both, torch.zeros_like(both))
    (empty.sum() + both.sum() + projected.float().sum()).backward()
    assert all(part.grad.isfinite().all() for part in (q, k, v))
    exact = linear_attention(*(part.to(dtype).float() for part in (q, k, v)))
    assert torch.allclose(projected.float(), exact, atol=0.02)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16 weights"])
@pytest.mark.parametrize("kind", ["sana", "sana-1.5"])
def test_bf16_is_finite_and_near_fp32(kind, autocast):
    dit = random_dit(KINDS[kind])
    batch = inputs(dit.config)
    with torch.no_grad():
        exact = dit(**batch)
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            rough = dit(**batch)
    else:
        halves = {key: value.bfloat16() if key in ("x_t", "context") else value for key, value in batch.items()}
        rough = dit.bfloat16()(**halves)
    rough.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in dit.parameters())
    assert_close(rough.float(), exact, 0.15)


def test_latents_that_do_not_divide_into_patches_are_refused():
    config = dataclasses.replace(TINY, patch_size=2)
    with pytest.raises(ValueError, match=r"5x10 don't divide into patches of 2x2"):
        LinearDiT(config, attention=sdpa)(**inputs(config, height=5))
