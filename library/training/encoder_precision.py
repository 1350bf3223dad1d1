"""Frozen text encoders in fewer bits: ``--text_encoder_1_precision`` and its siblings."""

from collections.abc import Collection, Iterator

import torch
from torch import nn

from library.config.errors import ConfigError
from library.config.memory import MemoryConfig
from library.families.protocols import ModelFamily
from library.memory.quantization import FORMATS, Stored, WeightFormat, can_quantize, quantize_layer
from library.text_encoders.t5 import Float32Linear

_MIB = 1 << 20


def encoder_formats(memory: MemoryConfig, family: ModelFamily) -> dict[str, WeightFormat]:
    """In which format each text encoder's matrices are stored, by its name; those that stay are left out."""
    names = family.description.text_encoders
    return {names[number - 1]: FORMATS[chosen] for number, chosen in memory.encoder_formats.items()}


def precision_signature(memory: MemoryConfig) -> dict[str, str]:
    """What the formats add to the signature of text features; nothing where all encoders stay as they are."""
    return {f"text_encoder_{number}_precision": chosen for number, chosen in memory.encoder_formats.items()}


def check_encoder_precision(memory: MemoryConfig, family: ModelFamily, trained: Collection[str]) -> None:
    """Find out whether the text encoders can be stored as the options say.

    Args:
        memory: The options.
        family: The model's parts.
        trained: The components that are trained, by themselves or by an adapter.

    Raises:
        ConfigError: There is no such text encoder, or it is trained; a line for each.
    """
    names, problems = family.description.text_encoders, []
    for number, chosen in memory.encoder_formats.items():
        option = f"--text_encoder_{number}_precision"
        if number > len(names):
            problems.append(f"{option} does nothing: this model's text encoders are {', '.join(names)}; remove it")
        elif names[number - 1] in trained:
            problems.append(
                f"{option} {chosen} is for a text encoder that stays as it is, and {names[number - 1]} is trained; "
                "train the denoiser alone (--network_train_unet_only), or remove it"
            )
    if problems:
        raise ConfigError("\n".join(problems))


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
