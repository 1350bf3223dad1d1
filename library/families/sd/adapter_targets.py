"""Which layers of Stable Diffusion 1.x and 2.x an adapter changes, and what other tools call them.

kohya's scripts, LyCORIS and ComfyUI all spell adapters of these models with diffusers' module paths
(``down_blocks.0.attentions.0...``), though our modules carry the published LDM names.
"""

from collections.abc import Mapping

from library.families.sd.key_maps import unet_key_maps
from library.records import AdapterTargets, FusedLinear
from library.text_encoders.clip_targets import clip_targets

CLIP_L_LAYERS = 12
CLIP_H_LAYERS = 24

_ATTENTION = ("*.transformer_blocks.*.attn1.*", "*.transformer_blocks.*.attn2.*")
_OTHERS = ("*.transformer_blocks.*.ff.net.*", "*.proj_in", "*.proj_out")


def adapter_targets(
    *,
    multipliers: tuple[int, ...],
    attention_levels: int,
    blocks_per_level: int,
    clip_layers: int,
    read_clip_layers: int | None = None,
) -> Mapping[str, AdapterTargets]:
    """This describes the adapter's place in the U-Net and in the text encoder.

    By default every linear layer and 1x1 convolution of the transformers is changed, and every linear layer of the text
    encoder. ``conv_dim`` adds the residual blocks and the changes of resolution; ``emb_dims`` switches on the first
    convolution, the embedding of the timestep and the last convolution.

    Args:
        multipliers: Features of each resolution, of those of the first convolution.
        attention_levels: How many resolutions, from the first, look at the text.
        blocks_per_level: Residual blocks of a resolution on the way down; one more on the way up.
        clip_layers: Layers of the text encoder.
        read_clip_layers: How many of them, from the first, anything looks at: others would learn nothing. None: all.

    Returns:
        By component: ``denoiser``, ``clip``.
    """
    layers = _unet_layers(multipliers, attention_levels, blocks_per_level)
    return {
        "denoiser": _denoiser(layers),
        "clip": clip_targets("lora_te", "text_encoder", layers=clip_layers, read=read_clip_layers),
    }


def _unet_layers(multipliers: tuple[int, ...], attention_levels: int, blocks_per_level: int) -> dict[str, str]:
    """Our path -> diffusers' of every linear layer and convolution."""
    maps = unet_key_maps(multipliers=multipliers, attention_levels=attention_levels, blocks_per_level=blocks_per_level)
    weights = ((entry.ours, *entry.theirs) for entry in maps if entry.ours.endswith(".weight"))
    paths = ((ours.removesuffix(".weight"), theirs.removesuffix(".weight")) for ours, theirs in weights)
    return {ours: theirs for ours, theirs in paths if "norm" not in theirs}


def _denoiser(layers: Mapping[str, str]) -> AdapterTargets:
    blocks = list(dict.fromkeys(_block(path) for path in layers))
    return AdapterTargets(
        prefix="lora_unet",
        include=(*_ATTENTION, *_OTHERS),
        dims={"attn_dim": _ATTENTION, "mlp_dim": _OTHERS},
        optional=(("input_blocks.0.0",), ("time_embed.*",), ("out.2",)),
        ways={
            "down": tuple(block for block in blocks if block.startswith("input_blocks.")),
            "mid": ("middle_block",),
            "up": tuple(block for block in blocks if block.startswith("output_blocks.")),
        },
        convolutional=(
            "*.in_layers.2",
            "*.emb_layers.1",
            "*.out_layers.3",
            "*.skip_connection",
            "input_blocks.*.0.op",
            "output_blocks.*.*.conv",
        ),
        key_paths=layers,
        fused={ours: FusedLinear((theirs,)) for ours, theirs in layers.items()},
        diffusers_prefix="unet",
    )


def _block(path: str) -> str:
    """The stage that a layer stands in: ``input_blocks.4`` for ``input_blocks.4.1.proj_in``."""
    first, second, *_ = path.split(".")
    return first if first == "middle_block" else f"{first}.{second}"
