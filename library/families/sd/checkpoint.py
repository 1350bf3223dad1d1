"""The weights of the U-Net, the VAE and the text encoder, streamed from the files into modules."""

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from library.config.errors import ConfigError
from library.families.sd.files import SdFiles
from library.families.sd.sizes import clip_sizes, unet_sizes, vae_sizes
from library.families.sd.unet import UNet, UNetConfig
from library.io.key_maps import to_diffusers
from library.io.part_loading import fill
from library.io.parts import Part
from library.io.safetensors import LazyTensors
from library.nn.attention import AttentionFunction, attention_function
from library.nn.autoencoder_files import autoencoder_config, load_autoencoder
from library.nn.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from library.text_encoders.clip import load_clip
from library.text_encoders.open_clip import open_clip_key_maps


def read_unet_config(files: SdFiles) -> UNetConfig:
    """This reads the U-Net's sizes from its tensors' names and shapes."""
    return UNetConfig(**dataclasses.asdict(unet_sizes(files.denoiser)))


def read_vae_config(files: SdFiles) -> AutoencoderKLConfig:
    """This reads the VAE's sizes from its tensors' names and shapes."""
    return autoencoder_config(vae_sizes(files.vae))


def load_unet(
    files: SdFiles,
    *,
    attention: AttentionFunction,
    device: torch.device | str,
    dtype: torch.dtype,
    mmap: bool = True,
) -> UNet:
    """This builds the U-Net and streams its weights in; no more than one tensor is ever held twice.

    Args:
        files: From ``files.locate``.
        attention: From ``nn.attention.attention_function``.
        device: Where it goes.
        dtype: Of its weights.
        mmap: Map the files rather than reading them.

    Returns:
        The U-Net, frozen, in eval mode.

    Raises:
        ConfigError: The file doesn't have exactly the tensors that its sizes ask for. Nothing was read then.
    """
    with torch.device("meta"):
        unet = UNet(read_unet_config(files), attention=attention)
    fill(unet, files.denoiser, unet_sizes(files.denoiser).key_maps, device=device, dtype=dtype, mmap=mmap)
    return unet.eval().requires_grad_(False)


def load_vae(files: SdFiles, *, device: torch.device | str, dtype: torch.dtype, mmap: bool = True) -> AutoencoderKL:
    """This builds the VAE and streams its weights in; see ``load_unet``."""
    return load_autoencoder(files.vae, vae_sizes(files.vae), device=device, dtype=dtype, mmap=mmap)


def load_text_encoder(
    part: Part, *, is_v2: bool, device: torch.device | str, dtype: torch.dtype, mmap: bool = True
) -> nn.Module:
    """This builds the text encoder and streams its weights in.

    Args:
        part: In transformers' or OpenCLIP's spelling.
        is_v2: Whether it is OpenCLIP's, whose activation is another.
        device: Where it goes.
        dtype: Of its weights.
        mmap: Map the files rather than reading them.

    Returns:
        The encoder, frozen, in eval mode.
    """
    read_to = "meta" if torch.device(device).type == "meta" else "cpu"
    shapes = {name: tuple(tensor.shape) for name, tensor in named_as_module(part, LazyTensors(part, device="meta"))}
    tensors = named_as_module(part, LazyTensors(part, device=read_to, mmap=mmap))
    activation = "gelu" if is_v2 else "quick_gelu"
    return load_clip(tensors, shapes, activation=activation, device=device, dtype=dtype, source=part.title)


def named_as_module(part: Part, tensors: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """A text encoder's tensors under the names of transformers.

    Args:
        part: The text encoder.
        tensors: By the part's own names.
    """
    if part.layout == "single":
        return to_diffusers(tensors, open_clip_key_maps(depth=clip_sizes(part).depth))
    return tensors.items()


def check_weights(files: SdFiles) -> list[str]:
    """This checks names and shapes of the U-Net and the VAE against their modules without reading a weight.

    Returns:
        What is wrong, a line per part.
    """
    problems = []
    for load in (
        lambda: load_unet(files, attention=attention_function("sdpa"), device="meta", dtype=torch.float32),
        lambda: load_vae(files, device="meta", dtype=torch.float32),
    ):
        try:
            load()
        except ConfigError as error:
            problems.append(str(error))
    return problems
