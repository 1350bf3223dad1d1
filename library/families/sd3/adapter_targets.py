"""Which layers of Stable Diffusion 3 an adapter changes, and what other tools call them."""

from collections.abc import Mapping, Sequence

from library.families.sd3.key_maps import fused_linears
from library.records import AdapterTargets
from library.text_encoders.clip_targets import clip_targets

CLIP_L_LAYERS = 12
CLIP_G_LAYERS = 32


def adapter_targets(
    *,
    depth: int,
    dual_attention_blocks: Sequence[int],
    clip_l_layers: int = CLIP_L_LAYERS,
    clip_g_layers: int = CLIP_G_LAYERS,
) -> Mapping[str, AdapterTargets]:
    """This describes the adapter's place in the denoiser and in the three text encoders.

    By default every linear layer of the joint blocks and of CLIP is changed. The embedders and the final layer are
    switched on by ``emb_dims``, T5 by ``train_t5xxl``.

    Args:
        depth: Number of joint blocks.
        dual_attention_blocks: Blocks with a second attention.
        clip_l_layers: Layers of CLIP-L.
        clip_g_layers: Layers of CLIP-G.

    Returns:
        By component: ``denoiser``, ``clip_l``, ``clip_g``, ``t5xxl``.
    """
    return {
        "denoiser": _denoiser(depth, dual_attention_blocks),
        "clip_l": clip_targets("lora_te1", "text_encoder", layers=clip_l_layers),
        "clip_g": clip_targets("lora_te2", "text_encoder_2", layers=clip_g_layers),
        "t5xxl": _t5(),
    }


def _denoiser(depth: int, dual_attention_blocks: Sequence[int]) -> AdapterTargets:
    return AdapterTargets(
        prefix="lora_unet",
        include=("joint_blocks.*.context_block.*", "joint_blocks.*.x_block.*"),
        dims={
            "context_attn_dim": ("joint_blocks.*.context_block.attn.*",),
            "context_mlp_dim": ("joint_blocks.*.context_block.mlp.*",),
            "context_mod_dim": ("joint_blocks.*.context_block.adaLN_modulation.*",),
            "x_attn_dim": ("joint_blocks.*.x_block.attn.*", "joint_blocks.*.x_block.attn2.*"),
            "x_mlp_dim": ("joint_blocks.*.x_block.mlp.*",),
            "x_mod_dim": ("joint_blocks.*.x_block.adaLN_modulation.*",),
        },
        optional=(
            ("context_embedder",),
            ("t_embedder.*",),
            ("x_embedder.*",),
            ("y_embedder.*",),
            ("final_layer.adaLN_modulation.*",),
            ("final_layer.linear",),
        ),
        block_prefix="joint_blocks",
        fused=fused_linears(depth=depth, dual_attention_blocks=dual_attention_blocks),
        diffusers_prefix="transformer",
    )


def _t5() -> AdapterTargets:
    # Without diffusers' spelling: its SD3 pipeline loads adapters into the denoiser and the two CLIPs only.
    return AdapterTargets(
        prefix="lora_te3",
        include=("encoder.block.*.SelfAttention.*", "encoder.block.*.DenseReluDense.*"),
        enabled_by="train_t5xxl",
    )
