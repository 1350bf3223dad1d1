"""Which model a file's tensor names belong to, so that a wrong file can be called by its name."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

_PREFIXES = re.compile(r"^(?:model\.diffusion_model\.|diffusion_model\.|module\.)")


class Width(NamedTuple):
    """One size of one tensor that tells models of equal names apart.

    Attributes:
        name: Pattern of the tensor's name.
        dim: Which of its sizes.
        value: What it is.
    """

    name: str
    dim: int
    value: int


class Architecture(NamedTuple):
    """A model that can be recognised.

    Attributes:
        title: The model's name.
        evidence: What gives it away, for people.
        names: Patterns that must all be found in the tensor names, without the denoiser's usual prefixes.
        width: A size that must hold too, or None.
        family: Name in the registry of the family that it belongs to; empty: of none.
    """

    title: str
    evidence: str
    names: tuple[str, ...]
    width: Width | None = None
    family: str = ""

    def __str__(self) -> str:
        return f"{self.title} ({self.evidence})"


_UNET = r"^input_blocks\.\d+\.1\.transformer_blocks\.0\.attn2\.to_k\.weight$"
_UNET_DIFFUSERS = r"^(?:down|up)_blocks\.\d+\.attentions\.0\.transformer_blocks\.0\.attn2\.to_k\.weight$"
_CLIP = r"(?:^|\.)text_model\.encoder\.layers\.0\."
_CLIP_WIDTH = r"(?:^|\.)text_model\.embeddings\.token_embedding\.weight$"
_T5 = r"(?:^|\.)encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight$"
_LDM_VAE = (r"(?:^|\.)encoder\.conv_in\.weight$", r"(?:^|\.)decoder\.conv_in\.weight$")
_LATENT_WIDTH = r"(?:^|\.)decoder\.conv_in\.weight$"

SCRIPTS = {
    "sd3": ("sd3_train_network.py", "sd3_train.py"),
    "sana": ("sana_train_network.py", "sana_train.py"),
    "sd": ("train_network.py", "train.py"),
}
"""Family -> the scripts that train it."""

_ADAPTERS: tuple[Architecture, ...] = (
    Architecture("a LoRA in kohya's spelling", "*.lora_down.weight", (r"^lora_\w+\.lora_down\.weight$",)),
    Architecture("a LyCORIS adapter", "*.lokr_w1, *.hada_w1_a", (r"\.(?:lokr_w1|hada_w1|oft_blocks|oft_diag)",)),
    Architecture("a LoRA in diffusers' spelling", "*.lora_A.weight", (r"\.lora_A\.(?:default\.)?weight$",)),
    Architecture("a LoRA in diffusers' older spelling", "*.lora.down.weight", (r"lora\.down\.weight$",)),
    Architecture("a ControlNet", "control_model.*", (r"^control_model\.",)),
    Architecture("a ControlNet", "controlnet_blocks.*", (r"^(?:controlnet_blocks|controlnet_down_blocks)\.",)),
)
_DENOISERS: tuple[Architecture, ...] = (
    Architecture("SD3", "joint_blocks.*", (r"^joint_blocks\.0\.",), family="sd3"),
    Architecture("Chroma", "distilled_guidance_layer.*", (r"^distilled_guidance_layer\.",)),
    Architecture("HunyuanVideo", "double_blocks.*.img_attn_qkv", (r"^double_blocks\.0\.img_attn_qkv\.",)),
    Architecture("FLUX", "double_blocks.*", (r"^double_blocks\.0\.",)),
    Architecture("HiDream", "double_stream_blocks.*", (r"^double_stream_blocks\.0\.",)),
    Architecture("AuraFlow", "double_layers.*", (r"^double_layers\.0\.",)),
    Architecture("AuraFlow in diffusers' spelling", "joint_transformer_blocks.*", (r"^joint_transformer_blocks\.0\.",)),
    Architecture("FLUX in diffusers' spelling", "single_transformer_blocks.*", (r"^single_transformer_blocks\.0\.",)),
    Architecture("Qwen-Image", "transformer_blocks.*.img_mod", (r"^transformer_blocks\.0\.img_mod\.",)),
    Architecture(
        "SD3 in diffusers' spelling",
        "transformer_blocks.*.norm1_context",
        (r"^transformer_blocks\.0\.norm1_context\.", r"^transformer_blocks\.0\.attn\.add_q_proj\."),
        family="sd3",
    ),
    Architecture(
        "Sana Sprint", "cfg_embedder.*", (r"^cfg_embedder\.", r"^blocks\.0\.mlp\.inverted_conv\.conv\.weight$")
    ),
    Architecture(
        "Sana", "blocks.*.mlp.inverted_conv", (r"^blocks\.0\.mlp\.inverted_conv\.conv\.weight$",), family="sana"
    ),
    Architecture(
        "Sana Sprint in diffusers' spelling",
        "time_embed.guidance_embedder",
        (r"^time_embed\.guidance_embedder\.", r"^transformer_blocks\.0\.ff\.conv_inverted\."),
    ),
    Architecture(
        "Sana in diffusers' spelling",
        "transformer_blocks.*.ff.conv_inverted",
        (r"^transformer_blocks\.0\.ff\.conv_inverted\.",),
        family="sana",
    ),
    Architecture("Hunyuan-DiT", "text_embedding_padding", (r"^text_embedding_padding$",)),
    Architecture("PixArt", "y_embedder.y_proj.*", (r"^y_embedder\.y_proj\.fc1\.weight$", r"^t_block\.1\.weight$")),
    Architecture("LTX-Video", "patchify_proj.*", (r"^patchify_proj\.weight$",)),
    Architecture("LTX-Video in diffusers' spelling", "proj_in.*", (r"^proj_in\.weight$", r"^adaln_single\.")),
    Architecture(
        "PixArt in diffusers' spelling", "adaln_single.*", (r"^adaln_single\.", r"^caption_projection\.linear_1\.")
    ),
    Architecture("Z-Image", "cap_pad_token", (r"^cap_pad_token$",)),
    Architecture("Lumina", "cap_embedder.*", (r"^(?:cap_embedder\.0|time_caption_embed\.caption_embedder\.0)\.",)),
    Architecture("Wan", "blocks.*.cross_attn.norm_q", (r"^blocks\.0\.cross_attn\.norm_q\.", r"^text_embedding\.0\.")),
    Architecture(
        "Wan in diffusers' spelling", "condition_embedder.*", (r"^condition_embedder\.text_embedder\.linear_1\.",)
    ),
    Architecture("Stable Cascade", "clip_txt_pooled_mapper.*", (r"^clip_txt_pooled_mapper\.",)),
    Architecture(
        "SDXL refiner", "input_blocks.*, label_emb", (r"^input_blocks\.",), Width(r"^label_emb\.0\.0\.weight$", 1, 2560)
    ),
    Architecture(
        "unCLIP of SD2.x",
        "input_blocks.*, label_emb",
        (r"^input_blocks\.", r"^label_emb\.0\.0\.weight$"),
        Width(_UNET, 1, 1024),
    ),
    Architecture("SDXL", "input_blocks.*, label_emb", (r"^input_blocks\.", r"^label_emb\.0\.0\.weight$")),
    Architecture("the upscaler of SD2.x", "input_blocks.*, label_emb", (r"^input_blocks\.", r"^label_emb\.weight$")),
    Architecture("SD2.x", "input_blocks.*", (r"^input_blocks\.",), Width(_UNET, 1, 1024), "sd"),
    Architecture("SD1.x", "input_blocks.*", (r"^input_blocks\.",), Width(_UNET, 1, 768), "sd"),
    Architecture("SD of no published size", "input_blocks.*", (_UNET, r"^out\.2\.weight$"), family="sd"),
    Architecture(
        "SDXL refiner in diffusers' spelling",
        "down_blocks.*, add_embedding",
        (r"^down_blocks\.",),
        Width(r"^add_embedding\.linear_1\.weight$", 1, 2560),
    ),
    Architecture(
        "SDXL in diffusers' spelling",
        "down_blocks.*, add_embedding",
        (r"^down_blocks\.", r"^add_embedding\.linear_1\.weight$"),
    ),
    Architecture(
        "unCLIP of SD2.x in diffusers' spelling",
        "down_blocks.*, class_embedding",
        (r"^down_blocks\.", r"^class_embedding\.linear_1\.weight$"),
    ),
    Architecture(
        "the upscaler of SD2.x in diffusers' spelling",
        "down_blocks.*, class_embedding",
        (r"^down_blocks\.", r"^class_embedding\.weight$"),
    ),
    Architecture(
        "SD2.x in diffusers' spelling", "down_blocks.*", (r"^down_blocks\.",), Width(_UNET_DIFFUSERS, 1, 1024), "sd"
    ),
    Architecture(
        "SD1.x in diffusers' spelling", "down_blocks.*", (r"^down_blocks\.",), Width(_UNET_DIFFUSERS, 1, 768), "sd"
    ),
    Architecture(
        "SD of no published size, in diffusers' spelling",
        "down_blocks.*",
        (_UNET_DIFFUSERS, r"^conv_out\.weight$"),
        family="sd",
    ),
)
_OTHER_PARTS: tuple[Architecture, ...] = (
    # Text encoders.
    Architecture("T5-XXL", "encoder.block.*", (_T5,), Width(_T5, 1, 4096)),
    Architecture("a T5", "encoder.block.*", (_T5,)),
    Architecture("CLIP-L", "text_model.*, width 768", (_CLIP,), Width(_CLIP_WIDTH, 1, 768)),
    Architecture("CLIP-G", "text_model.*, width 1280", (_CLIP,), Width(_CLIP_WIDTH, 1, 1280)),
    Architecture("CLIP-H", "text_model.*, width 1024", (_CLIP,), Width(_CLIP_WIDTH, 1, 1024)),
    Architecture("a CLIP text encoder", "text_model.*", (_CLIP,)),
    Architecture("OpenCLIP in its own spelling", "transformer.resblocks.*", (r"(?:^|\.)transformer\.resblocks\.0\.",)),
    Architecture("a CLIP vision model", "vision_model.*", (r"(?:^|\.)vision_model\.encoder\.layers\.0\.",)),
    Architecture(
        "Gemma 2", "layers.*.pre_feedforward_layernorm", (r"(?:^|\.)layers\.0\.pre_feedforward_layernorm\.weight$",)
    ),
    Architecture("a language model", "layers.*.self_attn", (r"(?:^|\.)layers\.0\.self_attn\.q_proj\.weight$",)),
    # VAEs.
    Architecture("a VAE with 4 channels (SD1, SD2, SDXL)", "decoder.conv_in", _LDM_VAE, Width(_LATENT_WIDTH, 1, 4)),
    Architecture("a VAE with 16 channels (SD3, FLUX)", "decoder.conv_in", _LDM_VAE, Width(_LATENT_WIDTH, 1, 16)),
    Architecture("DC-AE", "encoder.stages.*", (r"(?:^|\.)encoder\.project_in\.", r"(?:^|\.)encoder\.stages\.")),
    Architecture(
        "DC-AE in diffusers' spelling",
        "encoder.down_blocks.*.conv_inverted",
        (r"(?:^|\.)encoder\.down_blocks\.\d+\.\d+\.conv_out\.conv_inverted\.",),
    ),
    Architecture("a VAE", "encoder.*, decoder.*", (r"(?:^|\.)encoder\.conv\w*\.", r"(?:^|\.)decoder\.conv\w*\.")),
    Architecture("a VAE", "first_stage_model.*", (r"^first_stage_model\.",)),
)
ARCHITECTURES = (*_ADAPTERS, *_DENOISERS, *_OTHER_PARTS)
"""In order of preference: adapters have the names of layers that they change, and a file with a denoiser and encoders
inside is called by its denoiser."""


def find_architecture(names: Iterable[str], shapes: Mapping[str, tuple[int, ...]] | None = None) -> Architecture | None:
    """This recognises the model that tensor names belong to.

    Args:
        names: The file's tensor names.
        shapes: Their shapes; without them, models of equal names can't be told apart and the first isn't guessed.

    Returns:
        The first match of ``ARCHITECTURES``, or None.
    """
    stored = {_PREFIXES.sub("", name): name for name in names}
    joined = "\n".join(stored)
    for candidate in ARCHITECTURES:
        if all(re.search(pattern, joined, re.MULTILINE) for pattern in candidate.names) and (
            candidate.width is None or _has_width(candidate.width, stored, shapes or {})
        ):
            return candidate
    return None


def identify(names: Iterable[str], shapes: Mapping[str, tuple[int, ...]] | None = None) -> str | None:
    """This names the model that tensor names belong to, with the evidence: ``FLUX (double_blocks.*)``; None: unknown.

    Args:
        names: See ``find_architecture``.
        shapes: See ``find_architecture``.
    """
    found = find_architecture(names, shapes)
    return None if found is None else str(found)


def scripts_for(found: Architecture | None) -> str:
    """What a message about a wrong base model ends with: which scripts train it; empty where it is no denoiser.

    Args:
        found: From ``find_architecture``.
    """
    if found is None or found not in _DENOISERS:
        return ""
    if found.family:
        return f"; it is for {' and '.join(SCRIPTS[found.family])}"
    return "; no script here is for it"


def _has_width(width: Width, stored: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    for bare, name in stored.items():
        shape = shapes.get(name, ())
        if re.search(width.name, bare) and len(shape) > width.dim and shape[width.dim] == width.value:
            return True
    return False
