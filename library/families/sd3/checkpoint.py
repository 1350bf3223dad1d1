"""The weights of the denoiser and the VAE, streamed from the files into modules."""

import dataclasses

import torch

from library.config.errors import ConfigError
from library.families.sd3.files import Sd3Files
from library.families.sd3.mmdit import MMDiT, MMDiTConfig
from library.families.sd3.sizes import denoiser_sizes, vae_sizes
from library.io.part_loading import fill
from library.nn.attention import AttentionFunction, attention_function
from library.nn.autoencoder_files import autoencoder_config, load_autoencoder
from library.nn.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig


def read_mmdit_config(files: Sd3Files) -> MMDiTConfig:
    """This reads the denoiser's sizes from its tensors' names and shapes.

    Args:
        files: From ``files.locate``.
    """
    return MMDiTConfig(**dataclasses.asdict(denoiser_sizes(files.denoiser)))


def read_vae_config(files: Sd3Files) -> AutoencoderKLConfig:
    """This reads the VAE's sizes from its tensors' names and shapes.

    Args:
        files: From ``files.locate``.
    """
    return autoencoder_config(vae_sizes(files.vae))


def load_mmdit(
    files: Sd3Files,
    *,
    attention: AttentionFunction,
    device: torch.device | str,
    dtype: torch.dtype,
    mmap: bool = True,
) -> MMDiT:
    """This builds the denoiser and streams its weights in; no more than one tensor is ever held twice.

    Args:
        files: From ``files.locate``.
        attention: From ``nn.attention.attention_function``.
        device: Where it goes.
        dtype: Of all its weights, and of its position table. fp8 is converted too.
        mmap: Map the files rather than reading them.

    Returns:
        The denoiser, frozen, in eval mode.

    Raises:
        ConfigError: The file doesn't have exactly the tensors that its sizes ask for. Nothing was read then.
    """
    with torch.device("meta"):
        mmdit = MMDiT(read_mmdit_config(files), attention=attention)
    fill(mmdit, files.denoiser, denoiser_sizes(files.denoiser).key_maps, device=device, dtype=dtype, mmap=mmap)
    return mmdit.eval().requires_grad_(False)


def load_vae(files: Sd3Files, *, device: torch.device | str, dtype: torch.dtype, mmap: bool = True) -> AutoencoderKL:
    """This builds the VAE and streams its weights in.

    Args:
        files: From ``files.locate``.
        device: Where it goes.
        dtype: Of its weights.
        mmap: Map the files rather than reading them.

    Returns:
        The VAE, frozen, in eval mode.

    Raises:
        ConfigError: See ``load_mmdit``.
    """
    return load_autoencoder(files.vae, vae_sizes(files.vae), device=device, dtype=dtype, mmap=mmap)


def check_weights(files: Sd3Files) -> list[str]:
    """This checks names and shapes of the denoiser and the VAE against their modules without reading a weight.

    Args:
        files: From ``files.locate``.

    Returns:
        What is wrong, a line per part.
    """
    problems = []
    for load in (
        lambda: load_mmdit(files, attention=attention_function("sdpa"), device="meta", dtype=torch.float32),
        lambda: load_vae(files, device="meta", dtype=torch.float32),
    ):
        try:
            load()
        except ConfigError as error:
            problems.append(str(error))
    return problems
