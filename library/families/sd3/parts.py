"""The parts of Stable Diffusion 3, and how they are recognised in weights files."""

import re

from library.io.components import BASE, OTHER_PARTS, Component

CLIP_EMBEDDING = "text_model.embeddings.token_embedding.weight"
_CLIP_ANCHOR = {"single": (re.escape(CLIP_EMBEDDING),)}
_CLIP_KEEP = r"text_model\.|text_projection\.weight$"
_CLIP_DROP = r"text_model\.embeddings\.position_ids$"
COMPONENTS = {
    "denoiser": Component(
        "denoiser",
        BASE,
        "transformer",
        "SD3 (joint_blocks.*)",
        {
            "single": (r"joint_blocks\.0\.x_block\.attn\.qkv\.weight",),
            "diffusers": (r"transformer_blocks\.0\.norm1_context\.linear\.weight", r"pos_embed\.proj\.weight"),
        },
        keep=rf"(?!{OTHER_PARTS})",
        architectures=("SD3",),
    ),
    "vae": Component(
        "VAE",
        "--vae",
        "vae",
        "SD3's VAE (encoder.*, decoder.*, 16 channels)",
        {
            "single": (r"decoder\.mid\.block_1\.norm1\.weight",),
            "diffusers": (r"decoder\.mid_block\.resnets\.0\.norm1\.weight",),
        },
        keep=r"(?:encoder|decoder|quant_conv|post_quant_conv)\.",
    ),
    "clip_l": Component(
        "CLIP-L",
        "--clip_l",
        "text_encoder",
        "CLIP-L (text_model.*, width 768)",
        _CLIP_ANCHOR,
        _CLIP_KEEP,
        _CLIP_DROP,
        embedding=CLIP_EMBEDDING,
        marks="clip_",
        mark="clip_l",
        width=768,
    ),
    "clip_g": Component(
        "CLIP-G",
        "--clip_g",
        "text_encoder_2",
        "CLIP-G (text_model.*, width 1280)",
        _CLIP_ANCHOR,
        _CLIP_KEEP,
        _CLIP_DROP,
        embedding=CLIP_EMBEDDING,
        marks="clip_",
        mark="clip_g",
        width=1280,
    ),
    "t5xxl": Component(
        "T5-XXL",
        "--t5xxl",
        "text_encoder_3",
        "T5-XXL (encoder.block.*, width 4096)",
        {"single": (r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight",)},
        keep=r"(?:shared|encoder)\.",
    ),
}
