"""Stable Diffusion 1.x and 2.x with random weights and no files: for benches and conformance tests."""

from typing import Any, cast

import torch
from torch import nn

from library.config.ddpm import DdpmConfig
from library.config.loss import LossConfig
from library.diffusion.ddpm import Ddpm
from library.families.sd.adapter_targets import adapter_targets
from library.families.sd.family import SdFamily
from library.families.sd.files import SAMPLING_DEFAULTS, UNSKIPPABLE, SdFiles
from library.families.sd.latents import SdLatentStrategy
from library.families.sd.options import SdOptions
from library.families.sd.text import SdText, SdTextStrategy
from library.families.sd.tokenizers import SdTokenizer
from library.families.sd.unet import CONFIGS, UNet, UNetConfig
from library.nn.attention import attention_function
from library.records import ModelDescription, Resolution

TINY = UNetConfig(
    in_channels=4,
    out_channels=4,
    width=64,
    multipliers=(1, 2, 2, 2),
    attention_levels=3,
    blocks_per_level=1,
    context_width=128,
    num_heads=8,
    head_dim=None,
    linear_projections=False,
)
SIZES = {"tiny": TINY, **CONFIGS}
_TOKENS = 77


def synthetic_family(
    size: str, *, options: SdOptions | None = None, ddpm: DdpmConfig | None = None, loss: LossConfig | None = None
) -> SdFamily:
    """The family at a size of ``SIZES``, with no files behind it: nothing can be loaded, everything else works."""
    sizes = SIZES[size]
    unet = meta_denoiser(sizes)
    return SdFamily(
        files=cast(SdFiles, None),
        options=options or SdOptions(),
        denoiser=sizes,
        description=ModelDescription(
            title=f"Stable Diffusion ({size}, random weights)",
            architecture="stable-diffusion-v1",
            base_model_version=size,
            parameters=sum(parameter.numel() for parameter in unet.parameters()),
            sizes={"width": sizes.width},
            native_resolution=Resolution(512, 512),
            blocks=len(unet.stages),
            unskippable=UNSKIPPABLE,
            sampling=SAMPLING_DEFAULTS,
        ),
        latents=SdLatentStrategy("random"),
        objective=Ddpm(ddpm or DdpmConfig(), loss or LossConfig()),
        adapter_targets=adapter_targets(),
        tokenizers=cast(Any, None),
        attention="sdpa",
        mmap=True,
    )


def synthetic_strategy(family: SdFamily) -> SdTextStrategy:
    """The family's text strategy without a tokenizer: it drops, but can't tokenize."""
    return SdTextStrategy(cast(SdTokenizer, None), 1, "random")


def meta_denoiser(sizes: UNetConfig, attention: str = "sdpa") -> UNet:
    """The denoiser's shapes, without memory."""
    with torch.device("meta"):
        return UNet(sizes, attention=attention_function(attention))


def synthetic_denoiser(size: str, *, device: Any, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A frozen denoiser with random weights, made on the device: every layer answers, none blows up."""
    denoiser = meta_denoiser(SIZES[size]).to_empty(device=device).to(dtype).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for tensor in denoiser.state_dict().values():
        tensor.normal_(0.0, 0.02, generator=generator)
    return denoiser


def synthetic_text(size: str, batch_size: int, *, device: Any, dtype: torch.dtype, seed: int = 0) -> SdText:
    """Random text features."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (batch_size, _TOKENS, SIZES[size].context_width)
    return SdText(torch.randn(shape, generator=generator, device=device).to(dtype))
