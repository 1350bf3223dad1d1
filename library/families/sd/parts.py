"""The parts of Stable Diffusion 1.x and 2.x, and how they are recognised in weights files."""

import re

from library.io.base_model import Layout
from library.io.components import BASE, OTHER_PARTS, Component

CLIP_EMBEDDING = "text_model.embeddings.token_embedding.weight"
OPEN_CLIP_EMBEDDING = "token_embedding.weight"
UNREAD = (
    r"text_model\.embeddings\.position_ids$|text_projection(?:\.weight)?$|logit_scale$|transformer\.resblocks\.23\."
)
"""What files hold of a text encoder that a picture doesn't depend on.

2.x was trained on the features before the last of OpenCLIP ViT-H's 24 layers. Its single files hold all of them, its
folders in diffusers' layout 23: so the 24th is left out, and layers are counted alike whatever the file is.
"""

COMPONENTS = {
    "denoiser": Component(
        "U-Net",
        BASE,
        "unet",
        "Stable Diffusion 1.x or 2.x (input_blocks.*, or down_blocks.* in diffusers' spelling)",
        {
            "single": (
                r"input_blocks\.0\.0\.weight",
                r"middle_block\.1\.transformer_blocks\.0\.attn2\.to_k\.weight",
                r"out\.2\.weight",
            ),
            "diffusers": (
                r"conv_in\.weight",
                r"mid_block\.attentions\.0\.transformer_blocks\.0\.attn2\.to_k\.weight",
                r"conv_out\.weight",
            ),
        },
        keep=rf"(?!{OTHER_PARTS}|cond_stage_model|alphas_|betas$|sqrt_|posterior_|log_one|model_ema)",
        architectures=("SD1.x", "SD2.x", "SD of"),
    ),
    "vae": Component(
        "VAE",
        "--vae",
        "vae",
        "the VAE of Stable Diffusion 1.x and 2.x (encoder.*, decoder.*, 4 channels)",
        {
            "single": (r"decoder\.mid\.block_1\.norm1\.weight",),
            "diffusers": (r"decoder\.mid_block\.resnets\.0\.norm1\.weight",),
        },
        keep=r"(?:encoder|decoder|quant_conv|post_quant_conv)\.",
    ),
    "clip": Component(
        "text encoder",
        BASE,
        "text_encoder",
        "CLIP ViT-L (text_model.*, width 768), or OpenCLIP ViT-H (text_model.* or transformer.resblocks.*, width 1024)",
        {
            "single": (r"transformer\.resblocks\.0\.attn\.in_proj_weight",),
            "diffusers": (re.escape(CLIP_EMBEDDING),),
        },
        keep=r"text_model\.|transformer\.resblocks\.|token_embedding\.|positional_embedding$|ln_final\.",
        drop=UNREAD,
    ),
}
LAYOUT = Layout("Stable Diffusion 1.x and 2.x", "StableDiffusionPipeline", "StableDiffusionPipeline", COMPONENTS)
