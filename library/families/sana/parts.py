"""The parts of Sana, and how they are recognised in weights files."""

from library.io.base_model import Layout
from library.io.components import BASE, OTHER_PARTS, Component

COMPONENTS = {
    "denoiser": Component(
        "denoiser",
        BASE,
        "transformer",
        "Sana (blocks.*.mlp.inverted_conv)",
        {
            "single": (
                r"blocks\.0\.cross_attn\.q_linear\.weight",
                r"blocks\.0\.mlp\.inverted_conv\.conv\.weight",
                r"x_embedder\.proj\.weight",
            ),
            "diffusers": (
                r"transformer_blocks\.0\.attn2\.to_q\.weight",
                r"transformer_blocks\.0\.ff\.conv_inverted\.weight",
                r"patch_embed\.proj\.weight",
            ),
        },
        keep=rf"(?!{OTHER_PARTS})",
        # the encoded empty caption, positions that are computed here, and what only the teacher of Sprint has
        drop=r"(?:y_embedder\.y_embedding$|pos_embed$|logvar_linear\.)",
        architectures=("Sana",),
    ),
    "vae": Component(
        "VAE",
        "--vae",
        "vae",
        "Sana's DC-AE f32c32 (encoder.stages.*, or encoder.down_blocks.* in diffusers' spelling)",
        {
            "single": (r"encoder\.project_in\.conv\.weight", r"decoder\.project_in\.conv\.weight"),
            "diffusers": (r"encoder\.down_blocks\.0\.0\.conv1\.weight", r"decoder\.up_blocks\.0\.0\.conv\.weight"),
        },
        keep=r"(?:encoder|decoder)\.",
    ),
    "gemma": Component(
        "Gemma 2",
        "--gemma",
        "text_encoder",
        "Gemma 2 2b it (layers.*.pre_feedforward_layernorm, width 2304)",
        {"single": (r"layers\.0\.pre_feedforward_layernorm\.weight", r"embed_tokens\.weight")},
        keep=r"(?:embed_tokens|layers|norm)\.",
    ),
}
LAYOUT = Layout("Sana", "SanaPipeline", "Sana", COMPONENTS)
