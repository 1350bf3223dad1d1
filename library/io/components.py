"""How the parts of a model are recognised in weights files.

By tensors that a part has and no other part has (the anchors), whatever prefix stands before them: so all common
spellings of a file are the same case.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from library.config.errors import ConfigError
from library.io.architectures import find_architecture, scripts_for
from library.io.header import Header
from library.io.parts import Part
from library.io.scaled_fp8 import ACTIVATION_SCALES, find_scales, is_beside, refuse_other_scales

BASE = "--pretrained_model_name_or_path"
OTHER_PARTS = r"(?:first_stage_model|vae|text_encoders|cond_stage_model|conditioner|model_ema)\."
"""How names of what lies beside a denoiser begin in a file with everything inside."""

_READABLE_TYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3"})
_BITSANDBYTES = (".absmax", ".quant_map", ".SCB", ".weight_format")


@dataclass(frozen=True)
class Component:
    """One part of a model, and how it is recognised.

    Attributes:
        title: For people.
        option: The option that names its file.
        folder: Its sub-folder in diffusers' layout.
        expected: What its file should look like, for messages.
        anchors: Layout -> patterns of tensors that it has and no other part has.
        keep: Pattern of the names, without prefix, that belong to it.
        drop: Pattern of names that some files store beside and that are no weights.
        architectures: How the names of the architectures begin that its file may be called by
            (``library.io.architectures``): what has some of its names but is called otherwise is refused. By default
            any will do.
        embedding: Its embedding, by which it is told from a part with the same names; empty where there is none.
        marks: Word in the embedding's prefix that parts with the same names have in common: ``clip_``.
        mark: Word in the embedding's prefix that tells it from them: ``clip_l``.
        width: Width of the embedding where the prefix tells nothing, or None.
    """

    title: str
    option: str
    folder: str
    expected: str
    anchors: Mapping[str, tuple[str, ...]]
    keep: str
    drop: str = r"(?!)"
    architectures: tuple[str, ...] = ("",)
    embedding: str = ""
    marks: str = ""
    mark: str = ""
    width: int | None = None


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
        _refuse_unusable(part)
    return part


def require_part(
    component: Component, headers: tuple[Header, ...], title: str, others: Iterable[Component] = ()
) -> Part:
    """This finds a part in files that should hold it.

    Args:
        component: Which part.
        headers: The files.
        title: Where they lie, for messages.
        others: The model's other parts, some of which may have the same names.

    Raises:
        ConfigError: They hold something else, or the part can't be used.
    """
    found = _candidates(component, headers, title)
    shapes = {name: info.shape for header in headers for name, info in header.tensors.items()}
    looks_like = find_architecture(shapes, shapes)
    if looks_like is not None and not looks_like.title.startswith(component.architectures):
        found = []  # a ControlNet and a LoRA have some of a denoiser's names
    if len(found) == 1 and component.width is not None:
        width = found[0].shapes[component.embedding][-1]
        if any(width == other.width for other in others if other.title != component.title):
            looks_like = find_architecture(found[0].shapes, found[0].shapes)
            found = []
    part = found[0] if len(found) == 1 else _chosen(component, found)
    if part is None:
        seen = (
            f"looks like {looks_like}" if looks_like else f"is not known (it holds {', '.join(list(shapes)[:3])}, ...)"
        )
        remedy = scripts_for(looks_like) if component.option == BASE else ""
        raise ConfigError(f"{title} {seen}, expected {component.expected}{remedy}")
    _refuse_unusable(part)
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
            scales = find_scales(wanted, own)
            beside = {*scales.values(), *(stored for name, stored in wanted.items() if is_beside(name))}
            unused = tuple(stored for stored in wanted.values() if stored.endswith(ACTIVATION_SCALES))
            weights = {name: stored for name, stored in wanted.items() if stored not in beside}
            found.append(Part(title, headers, weights, layout, scales, unused))
    return found


def _prefixes(anchor: str, names: Sequence[str]) -> set[str]:
    pattern = re.compile(rf"(|.*\.){anchor}$")
    return {match[1] for name in names if (match := pattern.match(name))}


def _chosen(component: Component, found: Sequence[Part]) -> Part | None:
    """The part among several that the prefix or the width tells to be the right one."""
    if not component.mark:
        return found[0] if found else None
    for part in found:
        if component.mark in part.names[component.embedding]:
            return part
    unmarked = [part for part in found if component.marks not in part.names[component.embedding]]
    return next((part for part in unmarked if part.shapes[component.embedding][-1] == component.width), None)


def _refuse_unusable(part: Part) -> None:
    _refuse_bitsandbytes(part)
    _refuse_types(part)
    refuse_other_scales(part)


def _refuse_bitsandbytes(part: Part) -> None:
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
