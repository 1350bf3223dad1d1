import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from library.families.sd3.key_maps import denoiser_key_maps
from library.families.sd3.mmdit import CONFIGS, MMDiT, MMDiTConfig
from library.families.sd3.position_table import crop, sincos_table
from library.families.sd3.skip_layers import skipped_layers
from library.io.key_maps import to_diffusers
from library.memory.checkpointing import enable_checkpointing
from library.nn.attention import sdpa

GOLDEN = Path(__file__).parents[2] / "golden" / "sd3"
LEARNABLE = {"sd3-medium": 2_028_328_000, "sd3.5-medium": 2_243_171_520, "sd3.5-large": 8_056_627_520}
STORED = {"sd3-medium": 2_084_951_104, "sd3.5-medium": 2_469_663_936, "sd3.5-large": 8_146_280_768}

# head_dim differs from num_heads, so that mixing them up shows.
TINY = MMDiTConfig(
    depth=4,
    width=48,
    num_heads=3,
    patch_size=2,
    in_channels=4,
    context_width=20,
    pooled_width=12,
    pos_embed_max_size=12,
    qk_norm=False,
    dual_attention_blocks=(),
)
KINDS = {
    "sd3-medium": TINY,
    "sd3.5-medium": dataclasses.replace(TINY, qk_norm=True, dual_attention_blocks=(0, 1)),
    "sd3.5-large": dataclasses.replace(TINY, qk_norm=True),
}


def random_mmdit(config):
    """All weights random: those that start at zero would hide what lies behind them."""
    torch.manual_seed(0)
    mmdit = MMDiT(config, attention=sdpa)
    for name, parameter in mmdit.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if ".ln_" in name else 0.0, std=0.15)
    mmdit.pos_embed.copy_(sincos_table(config.pos_embed_max_size, config.width))
    return mmdit


def inputs(config, *, batch=2, height=10, width=14, tokens=5):
    generator = torch.Generator().manual_seed(1)
    return {
        "x_t": torch.randn(batch, config.in_channels, height, width, generator=generator),
        "timestep": torch.tensor([3.25, 871.5])[:batch],
        "context": torch.randn(batch, tokens, config.context_width, generator=generator),
        "pooled": torch.randn(batch, config.pooled_width, generator=generator),
    }


def assert_close(actual, expected, tolerance=1e-5):
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_and_shapes_equal_those_of_the_published_file(name):
    with torch.device("meta"):
        mmdit = MMDiT(CONFIGS[name], attention=sdpa)
    published = {}
    for line in (GOLDEN / f"{name}.txt").read_text().splitlines():
        key, shape = line.split("\t")
        blocks = re.search(r"\{(\d+)\.\.(\d+)\}", key)
        for i in range(int(blocks[1]), int(blocks[2]) + 1) if blocks else [None]:
            published[key if i is None else key.replace(blocks[0], str(i))] = shape
    assert {key: str(list(tensor.shape)) for key, tensor in mmdit.state_dict().items()} == published
    assert sum(parameter.numel() for parameter in mmdit.parameters()) == LEARNABLE[name]
    assert sum(tensor.numel() for tensor in mmdit.state_dict().values()) == STORED[name]
    assert mmdit.config.head_dim == 64


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_two_equals_two_batches_of_one(kind):
    mmdit = random_mmdit(KINDS[kind])
    both = inputs(KINDS[kind])
    with torch.no_grad():
        together = mmdit(**both)
        apart = torch.cat([mmdit(**{key: value[i : i + 1] for key, value in both.items()}) for i in range(2)])
    assert together.shape == both["x_t"].shape
    assert_close(together, apart)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16 weights"])
def test_bf16_is_finite_and_near_fp32(kind, autocast):
    mmdit = random_mmdit(KINDS[kind])
    batch = inputs(KINDS[kind])
    with torch.no_grad():
        exact = mmdit(**batch)
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            rough = mmdit(**batch)
    else:
        timestep = batch.pop("timestep")
        rough = mmdit.bfloat16()(**{key: value.bfloat16() for key, value in batch.items()}, timestep=timestep)
    assert rough.dtype == torch.bfloat16
    rough.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in mmdit.parameters())
    assert_close(rough.float(), exact, 0.15)


def test_a_given_position_table_replaces_the_middle_of_the_stored_one():
    mmdit = random_mmdit(TINY)
    batch = inputs(TINY)
    with torch.no_grad():
        default = mmdit(**batch)
        middle = crop(mmdit.pos_embed, 5, 7)
        assert torch.equal(mmdit(**batch, position_table=middle), default)
        tables = crop(mmdit.pos_embed, 5, 7, torch.tensor([[3, 2], [0, 5]]))
        moved = mmdit(**batch, position_table=tables)
    assert torch.allclose(moved[0], default[0], atol=1e-5)  # (12 - 5) // 2, (12 - 7) // 2
    assert not torch.allclose(moved[1], default[1], atol=1e-2)


def test_latents_that_do_not_divide_into_patches_are_refused():
    with pytest.raises(ValueError, match=r"10x13 don't divide into patches of 2x2"):
        random_mmdit(TINY)(**inputs(TINY, width=13))
    with pytest.raises(ValueError, match=r"5x13 tokens do not fit into a position table of 12x12"):
        random_mmdit(TINY)(**inputs(TINY, width=26))


def test_the_conditioning_alone_decides_the_modulation():
    """So that all blocks' vectors can be computed once per step and looked up, from outside the model."""
    mmdit = random_mmdit(KINDS["sd3.5-medium"])
    batch = inputs(mmdit.config)
    vectors = {}
    layers = {name: module for name, module in mmdit.named_modules() if name.endswith("adaLN_modulation")}
    hooks = [
        layer.register_forward_hook(lambda layer, args, result, name=name: vectors.update({name: (args, result)}))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        expected = mmdit(**batch)
        for hook in hooks:
            hook.remove()
        for name, layer in layers.items():
            ((c,), result) = vectors[name]
            assert c.shape == (2, 48)
            layer.forward = lambda c, result=result: result
        assert torch.equal(mmdit(**batch), expected)
    assert len(vectors) == 2 * 4 + 1


def test_skipped_layers_pass_both_streams_through_and_come_back():
    mmdit = random_mmdit(KINDS["sd3.5-medium"])
    batch = inputs(mmdit.config)
    enable_checkpointing(mmdit.joint_blocks, 2)
    wrapped = mmdit.joint_blocks[2].forward
    seen = {}
    mmdit.joint_blocks[2].register_forward_hook(lambda block, args, result: seen.update(args=args, result=result))
    with torch.no_grad():
        full = mmdit(**batch)
        with skipped_layers(mmdit.joint_blocks, [1, 2, 2]):
            skipped = mmdit(**batch)
        assert seen["result"][0] is seen["args"][0] and seen["result"][1] is seen["args"][1]
        assert not torch.allclose(skipped, full, rtol=0.1)
        with pytest.raises(KeyError), skipped_layers(mmdit.joint_blocks, [0]):
            raise KeyError
        assert torch.equal(mmdit(**batch), full)
    assert mmdit.joint_blocks[2].forward is wrapped
    assert "forward" not in mmdit.joint_blocks[1].__dict__
    with (
        pytest.raises(ValueError, match=r"no block \[4\]: the model has blocks 0 to 3"),
        skipped_layers(mmdit.joint_blocks, [4]),
    ):
        pass


def diffusers_twin(mmdit):
    diffusers = pytest.importorskip("diffusers")
    config = mmdit.config
    twin = diffusers.SD3Transformer2DModel(
        sample_size=128,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        num_layers=config.depth,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_width,
        caption_projection_dim=config.width,
        pooled_projection_dim=config.pooled_width,
        pos_embed_max_size=config.pos_embed_max_size,
        dual_attention_layers=config.dual_attention_blocks,
        qk_norm="rms_norm" if config.qk_norm else None,
    )
    twin.load_state_dict(dict(to_diffusers(mmdit.state_dict(), key_maps(config))), strict=True)
    return twin


def key_maps(config):
    return denoiser_key_maps(
        depth=config.depth, qk_norm=config.qk_norm, dual_attention_blocks=config.dual_attention_blocks
    )


def their_names(batch):
    return {
        "hidden_states": batch["x_t"],
        "timestep": batch["timestep"],
        "encoder_hidden_states": batch["context"],
        "pooled_projections": batch["pooled"],
    }


# In fp32, the gradients of biases that nearly cancel are rounding noise; fp64 tells whether the mathematics agree.
@pytest.mark.reference
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width"), [(10, 14), (24, 6)])
@pytest.mark.parametrize(("dtype", "parameter_tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-6)])
def test_answer_and_gradients_equal_those_of_diffusers(kind, height, width, dtype, parameter_tolerance):
    config = KINDS[kind]
    mmdit = random_mmdit(config)
    twin = diffusers_twin(mmdit).to(dtype)
    mmdit = mmdit.to(dtype)
    batch = {key: value.to(dtype) for key, value in inputs(config, height=height, width=width).items()}
    weight = torch.randn(batch["x_t"].shape, generator=torch.Generator().manual_seed(2), dtype=dtype)

    answers, input_gradients = [], []
    for run in (lambda batch: mmdit(**batch), lambda batch: twin(**their_names(batch)).sample):
        leaves = {key: value.clone().requires_grad_() for key, value in batch.items()}
        answer = run(leaves)
        (answer * weight).sum().backward()
        answers.append(answer.detach())
        input_gradients.append({key: leaf.grad for key, leaf in leaves.items()})
    assert answers[1].abs().mean() > 0.1
    assert_close(*answers)
    for key in batch:
        assert_close(input_gradients[0][key], input_gradients[1][key])

    ours = {name: parameter.grad for name, parameter in mmdit.named_parameters()}
    ours["pos_embed"] = mmdit.pos_embed  # no parameter, but the maps want every tensor
    mapped = dict(to_diffusers(ours, key_maps(config)))
    theirs = {name: parameter.grad for name, parameter in twin.named_parameters()}
    assert set(theirs) == set(mapped) - {"pos_embed.pos_embed"}
    for name, gradient in theirs.items():
        # Nobody reads what the text would ask for in the last block.
        unread = "3.attn.add_q_proj" in name or "3.attn.norm_added_q" in name
        assert (gradient.abs().max() > 0) == (not unread), name
        assert_close(mapped[name], gradient, parameter_tolerance)


@pytest.mark.reference
def test_skipping_equals_skip_layer_guidance_of_diffusers():
    mmdit = random_mmdit(KINDS["sd3.5-medium"])
    twin = diffusers_twin(mmdit)
    batch = inputs(mmdit.config)
    with torch.no_grad(), skipped_layers(mmdit.joint_blocks, [1, 2]):
        assert_close(mmdit(**batch), twin(**their_names(batch), skip_layers=[1, 2]).sample)
