"""The weights of the denoiser and the DC-AE, streamed from the files into modules."""

import dataclasses

import torch

from library.config.errors import ConfigError
from library.families.sana.dc_ae import DCAE, DCAEConfig
from library.families.sana.files import SanaFiles
from library.families.sana.linear_dit import LinearDiT, LinearDiTConfig
from library.families.sana.options import SanaOptions
from library.families.sana.sizes import denoiser_sizes, image_size, vae_sizes
from library.io.part_loading import fill
from library.nn.attention import AttentionFunction, attention_function


def read_dit_config(files: SanaFiles, options: SanaOptions) -> LinearDiTConfig:
    """This reads the denoiser's sizes from its tensors' names and shapes, and its positions from what is said of them.

    Args:
        files: From ``files.locate``.
        options: With ``sana_image_size``.
    """
    sizes = dataclasses.asdict(denoiser_sizes(files.denoiser))
    config = LinearDiTConfig(**sizes, position_base=None, position_scale=1.0)
    return config.at(image_size(files.denoiser, options))


def read_vae_config(files: SanaFiles) -> DCAEConfig:
    """This reads the DC-AE's sizes from its tensors' names and shapes.

    Args:
        files: From ``files.locate``.
    """
    return DCAEConfig(**dataclasses.asdict(vae_sizes(files.vae)))


def load_dit(
    files: SanaFiles,
    config: LinearDiTConfig,
    *,
    attention: AttentionFunction,
    device: torch.device | str,
    dtype: torch.dtype,
    mmap: bool = True,
) -> LinearDiT:
    """This builds the denoiser and streams its weights in; no more than one tensor is ever held twice.

    Args:
        files: From ``files.locate``.
        config: From ``read_dit_config``.
        attention: From ``nn.attention.attention_function``; of the attention to the text.
        device: Where it goes.
        dtype: Of all its weights. fp8 is converted too.
        mmap: Map the files rather than reading them.

    Returns:
        The denoiser, frozen, in eval mode.

    Raises:
        ConfigError: The file doesn't have exactly the tensors that its sizes ask for. Nothing was read then.
    """
    with torch.device("meta"):
        dit = LinearDiT(config, attention=attention)
    fill(dit, files.denoiser, denoiser_sizes(files.denoiser).key_maps, device=device, dtype=dtype, mmap=mmap)
    return dit.eval().requires_grad_(False)


def load_vae(files: SanaFiles, *, device: torch.device | str, dtype: torch.dtype, mmap: bool = True) -> DCAE:
    """This builds the DC-AE and streams its weights in.

    Args:
        files: From ``files.locate``.
        device: Where it goes.
        dtype: Of its weights; not fp16, in which its activations overflow.
        mmap: Map the files rather than reading them.

    Returns:
        The DC-AE, frozen, in eval mode.

    Raises:
        ConfigError: See ``load_dit``, or ``dtype`` is fp16.
    """
    if dtype == torch.float16:
        raise ConfigError("DC-AE overflows in fp16 and gives black pictures; use --mixed_precision bf16 or no")
    with torch.device("meta"):
        vae = DCAE(read_vae_config(files))
    fill(vae, files.vae, vae_sizes(files.vae).key_maps, device=device, dtype=dtype, mmap=mmap)
    return vae.eval().requires_grad_(False)


def check_weights(files: SanaFiles, config: LinearDiTConfig) -> list[str]:
    """This checks names and shapes of the denoiser and the DC-AE against their modules without reading a weight.

    Args:
        files: From ``files.locate``.
        config: From ``read_dit_config``.

    Returns:
        What is wrong, a line per part.
    """
    problems = []
    for load in (
        lambda: load_dit(files, config, attention=attention_function("sdpa"), device="meta", dtype=torch.float32),
        lambda: load_vae(files, device="meta", dtype=torch.float32),
    ):
        try:
            load()
        except ConfigError as error:
            problems.append(str(error))
    return problems
