"""How the parts of Stable Diffusion 3 are recognised in weights files.

By a tensor that each of them has and no other part has (the anchor), whatever prefix stands before it: so all common
spellings of a file are the same case.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from library.config.errors import ConfigError
from library.io.architectures import identify
from library.io.header import Header
from library.io.parts import Part

BASE = "--pretrained_model_name_or_path"

_READABLE_TYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3"})
_SCALES = ("scale_weight", "scale_input", "weight_scale", "input_scale", "comfy_quant", "scaled_fp8")
_BITSANDBYTES = (".absmax", ".quant_map", ".SCB", ".weight_format")
_OTHER_PARTS = r"(?:first_stage_model|vae|text_encoders|cond_stage_model|conditioner|model_ema)\."


@dataclass(frozen=True)
class Component:
    """One part of the model, and how it is recognised.

    Attributes:
        title: For people.
        option: The option that names its file.
        folder: Its sub-folder in diffusers' layout.
        expected: What its file should look like, for messages.
        anchors: Layout -> patterns of tensors that it has and no other part has.
        keep: Pattern of the names, without prefix, that belong to it.
        drop: Pattern of names that some files store beside and that are no weights.
        mark: Word in the prefix that tells it from a part with the same names.
        width: Width of its embedding where the prefix tells nothing, or None.
    """

    title: str
    option: str
    folder: str
    expected: str
    anchors: Mapping[str, tuple[str, ...]]
    keep: str
    drop: str = r"(?!)"
    mark: str = ""
    width: int | None = None


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
        keep=rf"(?!{_OTHER_PARTS})",
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


def find_part(component: Component, headers: tuple[Header, ...], title: str) -> Part | None:
    """This finds a part among others in one file; None: it isn't there.

    Args:
        component: Which part.
        headers: The files.
        title: Where they lie, for messages.

    Raises:
        ConfigError: The part is stored in a way that can't be used.
    """
    part = _chosen(component, _candidates(component, headers, title))
    if part is not None:
        _refuse_quantised(part)
        _refuse_types(part)
    return part


def require_part(component: Component, headers: tuple[Header, ...], title: str) -> Part:
    """This finds a part in files that should hold it.

    Args:
        component: Which part.
        headers: The files.
        title: Where they lie, for messages.

    Raises:
        ConfigError: They hold something else, or the part can't be used.
    """
    found = _candidates(component, headers, title)
    shapes = {name: info.shape for header in headers for name, info in header.tensors.items()}
    looks_like = identify(shapes, shapes)
    if component.option == BASE and looks_like is not None and not looks_like.startswith("SD3"):
        found = []  # a ControlNet and a LoRA of SD3 have some of its names
    if len(found) == 1:
        others = {other.width: other.title for other in COMPONENTS.values() if other.width is not None}
        if component.width and others.get(found[0].shapes[CLIP_EMBEDDING][-1], component.title) != component.title:
            looks_like = identify(found[0].shapes, found[0].shapes)
            found = []
    part = found[0] if len(found) == 1 else _chosen(component, found)
    if part is None:
        seen = (
            f"looks like {looks_like}" if looks_like else f"is not known (it holds {', '.join(list(shapes)[:3])}, ...)"
        )
        raise ConfigError(f"{title} {seen}, expected {component.expected}")
    _refuse_quantised(part)
    _refuse_types(part)
    return part


def _candidates(component: Component, headers: tuple[Header, ...], title: str) -> list[Part]:
    """Every place in the files that looks like the part."""
    names = [name for header in headers for name in header.tensors]
    found = []
    for layout, anchors in component.anchors.items():
        prefixes = [_prefixes(anchor, names) for anchor in anchors]
        for prefix in sorted(set.intersection(*prefixes), key=len):
            own = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
            wanted = {
                name: stored
                for name, stored in own.items()
                if re.match(component.keep, name) and not re.match(component.drop, name)
            }
            found.append(Part(title, headers, wanted, layout))
    return found


def _prefixes(anchor: str, names: Sequence[str]) -> set[str]:
    pattern = re.compile(rf"(|.*\.){anchor}$")
    return {match[1] for name in names if (match := pattern.match(name))}


def _chosen(component: Component, found: Sequence[Part]) -> Part | None:
    """The part among several that the prefix or the width tells to be the right one."""
    if not component.mark:
        return found[0] if found else None
    for part in found:
        if component.mark in part.names[CLIP_EMBEDDING]:
            return part
    unmarked = [part for part in found if "clip_" not in part.names[CLIP_EMBEDDING]]
    return next((part for part in unmarked if part.shapes[CLIP_EMBEDDING][-1] == component.width), None)


def _refuse_quantised(part: Part) -> None:
    if scaled := [name for name in part.names if name.endswith(_SCALES)]:
        raise ConfigError(
            f"{part.title} holds fp8 weights with scales of their own ({scaled[0]}), which are not applied here, and "
            "the weights are wrong without; use the fp16 or the plain fp8_e4m3fn file"
        )
    if packed := [name for name in part.names if name.endswith(_BITSANDBYTES)]:
        raise ConfigError(
            f"{part.title} is quantised by bitsandbytes ({packed[0]}), and can't be trained; use fp16 or bf16"
        )


def _refuse_types(part: Part) -> None:
    for name, info in part.tensors.items():
        if info.dtype == "F8_E5M2":
            raise ConfigError(
                f"{part.title} stores {name} as fp8 e5m2, which keeps two bits of precision: too few to start a "
                "training from; use the fp16 or the fp8_e4m3fn file"
            )
        if info.dtype not in _READABLE_TYPES:
            raise ConfigError(
                f"{part.title} stores {name} as {info.dtype}, which is no plain weight; use the fp16 or bf16 file"
            )
