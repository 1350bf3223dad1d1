"""Weights in fp8 with a scale beside each, as ComfyUI's ``fp8_scaled`` files hold them, told from names and types.

Two spellings are in use. Older files mark themselves by a tensor ``scaled_fp8`` and have ``<layer>.scale_weight``.
Newer ones have ``<layer>.weight_scale`` and say in ``<layer>.comfy_quant`` or in their metadata that the format is
``float8_e4m3fn``. In both the weight is its fp8 number times the scale, which is one number for the whole matrix.
``scale_input`` and ``input_scale`` are for activations in 8-bit inference; nothing here needs them.

Format: https://github.com/comfyanonymous/ComfyUI/blob/master/QUANTIZATION.md
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from library.config.errors import ConfigError

if TYPE_CHECKING:
    from library.io.parts import Part

FP8 = "F8_E4M3"
WEIGHT_SCALES = ("scale_weight", "weight_scale")
"""Last words of the names of scales that belong to a weight."""

ACTIVATION_SCALES = ("scale_input", "input_scale")
"""Last words of the names of scales that are for 8-bit inference."""

_MARKS = ("scaled_fp8", "comfy_quant")
_OTHER_SCALES = ("weight_scale_2", "pre_quant_scale")
_SCALE_TYPES = frozenset({"F32", "BF16", "F16"})


def is_beside(name: str) -> bool:
    """Whether a tensor is no weight but says something about one: a scale of activations, or a mark."""
    return _last_word(name) in (*ACTIVATION_SCALES, *_MARKS)


def find_scales(weights: Iterable[str], stored: Mapping[str, str]) -> dict[str, str]:
    """This pairs weights with their scales.

    Args:
        weights: Names of a part's weights.
        stored: Everything that lies where the part lies: its own name -> its name in the file.

    Returns:
        Weight's own name -> its scale's name in the file, for the weights that have one.
    """
    scales = {}
    for weight in weights:
        layer, _, word = weight.rpartition(".")
        if word != "weight":
            continue
        for kind in WEIGHT_SCALES:
            if (name := f"{layer}.{kind}") in stored:
                scales[weight] = stored[name]
    return scales


def refuse_other_scales(part: "Part") -> None:
    """This refuses a part whose scales aren't one number for a matrix in fp8.

    Raises:
        ConfigError: See above; the name of the scale is told.
    """
    advice = "use the fp16 or the bf16 file"
    for name in part.names:
        if _last_word(name) in _OTHER_SCALES:
            raise ConfigError(f"{part.title} is quantised in a format that is not known here ({name}); {advice}")
        if _last_word(name) in WEIGHT_SCALES:
            raise ConfigError(f"{part.title} has the scale {name} of a weight that is not there; {advice}")
    for weight, stored in part.scales.items():
        scale, of = part.holder(stored).tensors[stored], part.tensors[weight]
        if of.dtype != FP8:
            raise ConfigError(f"{part.title} has a scale for {weight}, which is no fp8 but {of.dtype}; {advice}")
        if scale.elements != 1 or scale.dtype not in _SCALE_TYPES:
            size = "x".join(map(str, scale.shape)) or "one number"
            raise ConfigError(
                f"{part.title}: {stored} is {size} of {scale.dtype}, and only one number in fp32 for a whole matrix is "
                f"known as a scale; {advice}"
            )


def _last_word(name: str) -> str:
    return name.rpartition(".")[2]
