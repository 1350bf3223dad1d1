"""Which layers of Stable Diffusion 1.x and 2.x an adapter changes, and what other tools call them."""

from collections.abc import Mapping

from library.records import AdapterTargets


def adapter_targets() -> Mapping[str, AdapterTargets]:
    """This describes the adapter's place in the U-Net and in the text encoder.

    Returns:
        By component: ``denoiser``, ``clip``.
    """
    return {
        "denoiser": AdapterTargets(
            prefix="lora_unet",
            include=(
                "*.proj_in",
                "*.proj_out",
                "*.transformer_blocks.*.attn1.*",
                "*.transformer_blocks.*.attn2.*",
                "*.transformer_blocks.*.ff.net.*",
            ),
        ),
        "clip": AdapterTargets(
            prefix="lora_te",
            include=("text_model.encoder.layers.*.self_attn.*", "text_model.encoder.layers.*.mlp.*"),
        ),
    }
