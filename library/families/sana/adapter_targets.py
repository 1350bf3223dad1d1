"""Which layers of Sana an adapter changes, and what other tools call them."""

from collections.abc import Mapping

from library.families.sana.key_maps import fused_layers
from library.records import AdapterTargets


def adapter_targets(*, depth: int) -> Mapping[str, AdapterTargets]:
    """This describes the adapter's place in the denoiser and in Gemma.

    By default every linear layer of the blocks is changed, and the 1x1 convolutions of the feed-forward, which hold
    half of each block. The 3x3 convolution can't be: it is depthwise. The embedders and the final layer are switched on
    by ``emb_dims``, Gemma by ``train_gemma``.

    Args:
        depth: Number of blocks.

    Returns:
        By component: ``denoiser``, ``gemma``.
    """
    return {"denoiser": _denoiser(depth), "gemma": _gemma()}


def _denoiser(depth: int) -> AdapterTargets:
    return AdapterTargets(
        prefix="lora_unet",
        include=("blocks.*.attn.*", "blocks.*.cross_attn.*", "blocks.*.mlp.*"),
        exclude=("blocks.*.mlp.depth_conv.conv",),
        dims={
            "attn_dim": ("blocks.*.attn.*",),
            "cross_attn_dim": ("blocks.*.cross_attn.*",),
            "mlp_dim": ("blocks.*.mlp.*",),
        },
        optional=(
            ("y_embedder.*",),
            ("t_embedder.*",),
            ("x_embedder.*",),
            ("t_block.*",),
            ("final_layer.linear",),
        ),
        block_prefix="blocks",
        fused=fused_layers(depth=depth),
        diffusers_prefix="transformer",
    )


def _gemma() -> AdapterTargets:
    # Without diffusers' spelling: its Sana pipeline loads adapters into the denoiser only.
    return AdapterTargets(
        prefix="lora_te1",
        include=("layers.*.self_attn.*", "layers.*.mlp.*"),
        enabled_by="train_gemma",
    )
