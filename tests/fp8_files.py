"""Models in the layouts of ComfyUI's fp8 files."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn


def as_scaled_fp8(
    tensors: Mapping[str, Tensor], chosen: Callable[[str], bool], *, spelling: str = "scale_weight"
) -> dict[str, Tensor]:
    """The matrices that ``chosen`` tells, by their full name, as fp8 numbers with one scale each; the rest as it is.

    ``scale_weight`` is the older spelling, whose files mark themselves; ``weight_scale`` is the newer one.
    """
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not (chosen(name) and name.endswith(".weight") and tensor.ndim in (2, 4)):
            made[name] = tensor
            continue
        layer, scale = name.removesuffix(".weight"), (tensor.abs().max() / 448).float()
        made[name] = (tensor.float() / scale).to(FP8)
        made[f"{layer}.{spelling}"] = scale if spelling == "scale_weight" else scale.reshape(1)
        if spelling == "scale_weight":
            made[f"{layer}.scale_input"] = torch.tensor(0.5)
        else:
            made[f"{layer}.input_scale"] = torch.tensor(0.5)
            made[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    if spelling == "scale_weight":
        made["model.diffusion_model.scaled_fp8"] = torch.zeros(2).to(FP8)
        made["text_encoders.t5xxl.transformer.scaled_fp8"] = torch.zeros(0).to(FP8)
    return made


def without_scales(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The numbers that such a file stands for, in fp32."""
    made = {}
    for name, tensor in tensors.items():
        layer, _, word = name.rpartition(".")
        if word in ("scale_weight", "weight_scale", "scale_input", "input_scale", "comfy_quant", "scaled_fp8"):
            continue
        scale = tensors.get(f"{layer}.scale_weight", tensors.get(f"{layer}.weight_scale"))
        made[name] = tensor.float() * scale.reshape(()) if scale is not None and word == "weight" else tensor.float()
    return made
