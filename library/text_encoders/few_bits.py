"""Frozen text encoders whose matrices are stored in fewer bits."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from library.config.memory import MemoryConfig
from library.memory.quantization import FORMATS, Stored, WeightFormat, can_quantize, quantize_layer
from library.text_encoders.t5 import Float32Linear

_MIB = 1 << 20


def encoder_formats(memory: MemoryConfig, names: Sequence[str]) -> dict[str, WeightFormat]:
    """In which format the matrices of the text encoders ``names`` are stored; those that stay are left out."""
    return {names[number - 1]: FORMATS[chosen] for number, chosen in memory.encoder_formats.items()}


def quantize_encoder(
    name: str, encoder: nn.Module, chosen: WeightFormat, stored: Stored | None, device: torch.device, *, via: str
) -> str:
    """This stores the matrices of a text encoder's layers in a format and brings the encoder to the device.

    Embeddings, norms and what comes after the last layer stay.

    Args:
        name: Of the encoder.
        encoder: On the host, in its own type.
        chosen: The format.
        stored: Tells what the files have of a layer in fp8.
        device: Where it encodes.
        via: ``accelerator``: the codes are computed on the device, layer by layer. ``cpu``: on the host.

    Returns:
        What was done, in a line.
    """
    before = sum(parameter.nbytes for parameter in encoder.parameters())
    count = kept = 0
    for block in _repeated(encoder):
        if via == "accelerator":
            block.to(device)
        for layer in [layer for layer in block.modules() if can_quantize(layer, chosen)]:
            # what T5 computes in fp32 overflows fp16
            dtype = torch.float32 if isinstance(layer, Float32Linear) else None
            kept += quantize_layer(layer, chosen, stored and stored(layer), dtype=dtype)  # type: ignore[arg-type]
            layer.weight = None  # type: ignore[assignment]  # transformers' T5 asks for its type
            count += 1
    encoder.to(device)
    after = sum(tensor.nbytes for tensor in (*encoder.parameters(), *encoder.buffers()))
    told = f"{name} in {chosen.name}: {count} layers, {before / _MIB:,.0f} MiB, take {after / _MIB:,.0f} MiB"
    return told + (f"; {kept} layers are as the file has them" if kept else "")


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    """The layers that an encoder repeats, outermost lists of modules in order."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _repeated(child)
