"""Sana models with random weights and no files, at any published size: for benches and conformance tests."""

from typing import Any, cast

import torch
from torch import nn

from library.config.flow import FlowConfig
from library.config.loss import LossConfig
from library.diffusion.flow_matching import FlowMatching
from library.families.sana.adapter_targets import adapter_targets
from library.families.sana.family import TIMESTEPS, SanaFamily, with_own_shift
from library.families.sana.files import SanaFiles
from library.families.sana.latents import SanaLatentStrategy
from library.families.sana.linear_dit import CONFIGS, LinearDiT, LinearDiTConfig
from library.families.sana.options import SanaFlowConfig, SanaOptions
from library.families.sana.text import SanaText, SanaTextStrategy
from library.families.sana.tokenizers import SanaTokenizer
from library.nn.attention import attention_function
from library.records import ModelDescription, Resolution

TINY = LinearDiTConfig(
    depth=4,
    width=256,
    head_dim=32,
    num_cross_heads=8,
    mlp_ratio=2.5,
    patch_size=1,
    in_channels=32,
    context_width=256,
    qk_norm=True,
    position_base=None,
    position_scale=1.0,
)
SIZES = {
    "tiny": TINY,
    "sana-0.6b": CONFIGS["sana-600m"],
    "sana-1.6b": CONFIGS["sana-1600m"],
    "sana-1.5-1.6b": CONFIGS["sana-1.5-1600m"],
    "sana-1.5-4.8b": CONFIGS["sana-1.5-4800m"],
}
_WORDS = 60
"""Tokens of an ordinary caption."""


def synthetic_family(
    size: str, *, options: SanaOptions | None = None, flow: FlowConfig | None = None, loss: LossConfig | None = None
) -> SanaFamily:
    """The family at a size of ``SIZES``, with no files behind it: nothing can be loaded, everything else works."""
    sizes = SIZES[size]
    description = ModelDescription(
        title=f"Sana ({size}, random weights)",
        architecture="sana",
        base_model_version=size,
        parameters=sum(parameter.numel() for parameter in meta_denoiser(sizes).parameters()),
        sizes={"depth": sizes.depth, "width": sizes.width},
        native_resolution=Resolution(1024, 1024),
        defaults={"training_shift": 3.0},
    )
    return SanaFamily(
        files=cast(SanaFiles, None),
        options=options or SanaOptions(),
        denoiser=sizes,
        description=description,
        latents=SanaLatentStrategy("random"),
        objective=FlowMatching(with_own_shift(flow or SanaFlowConfig(), description), loss or LossConfig(), TIMESTEPS),
        adapter_targets=adapter_targets(depth=sizes.depth),
        tokenizers=cast(Any, None),
        attention="sdpa",
        mmap=True,
    )


def synthetic_strategy(family: SanaFamily) -> SanaTextStrategy:
    """The family's text strategy without a tokenizer: it drops, but can't tokenize."""
    return SanaTextStrategy(cast(SanaTokenizer, None), "random")


def meta_denoiser(sizes: LinearDiTConfig, attention: str = "sdpa") -> LinearDiT:
    """The denoiser's shapes, without memory."""
    with torch.device("meta"):
        return LinearDiT(sizes, attention=attention_function(attention))


def synthetic_denoiser(size: str, *, device: Any, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A frozen denoiser with random weights, made on the device: every layer answers, none blows up."""
    denoiser = meta_denoiser(SIZES[size]).to_empty(device=device).to(dtype).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for name, tensor in denoiser.state_dict().items():
        if name.endswith("norm.weight"):
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, 0.02, generator=generator)
    return denoiser


def synthetic_text(size: str, batch_size: int, *, device: Any, dtype: torch.dtype, seed: int = 0) -> SanaText:
    """Random text features of ordinary lengths."""
    sizes, generator = SIZES[size], torch.Generator(device).manual_seed(seed)
    length = SanaOptions().sana_max_token_length
    context = torch.randn(batch_size, length, sizes.context_width, generator=generator, device=device).to(dtype)
    mask = (torch.arange(length, device=device) < _WORDS).expand(batch_size, length)
    return SanaText(context.masked_fill(~mask[:, :, None], 0), mask.clone())
