"""SD3 models with random weights and no files, at any published size: for benches and conformance tests."""

from typing import Any, cast

import torch
from torch import nn

from library.config.flow import FlowConfig
from library.config.loss import LossConfig
from library.diffusion.flow_matching import FlowMatching
from library.families.sd3.adapter_targets import adapter_targets
from library.families.sd3.family import Sd3Family
from library.families.sd3.files import Sd3Files
from library.families.sd3.latents import sd3_latents
from library.families.sd3.mmdit import CONFIGS, MMDiT, MMDiTConfig
from library.families.sd3.options import Sd3Options
from library.families.sd3.text import Sd3Text, Sd3TextStrategy
from library.nn.attention import attention_function
from library.records import ModelDescription, Resolution
from library.text_encoders.tokenizers import CaptionTokenizer

TINY = MMDiTConfig(
    depth=4,
    width=256,
    num_heads=4,
    patch_size=2,
    in_channels=16,
    context_width=256,
    pooled_width=192,
    pos_embed_max_size=64,
    qk_norm=True,
    dual_attention_blocks=(0, 1),
)
SIZES = {"tiny": TINY, **CONFIGS}
CLIP_TOKENS, T5_TOKENS = 77, 256


def synthetic_family(
    size: str, *, options: Sd3Options | None = None, flow: FlowConfig | None = None, loss: LossConfig | None = None
) -> Sd3Family:
    """The family at a size of ``SIZES``, with no files behind it: nothing can be loaded, everything else works."""
    sizes = SIZES[size]
    return Sd3Family(
        files=cast(Sd3Files, None),
        options=options or Sd3Options(),
        denoiser=sizes,
        description=ModelDescription(
            title=f"Stable Diffusion 3 ({size}, random weights)",
            architecture="stable-diffusion-3",
            base_model_version=size,
            parameters=sum(parameter.numel() for parameter in meta_denoiser(sizes).parameters()),
            sizes={"depth": sizes.depth, "width": sizes.width},
            native_resolution=Resolution(1024, 1024),
        ),
        latents=sd3_latents("random"),
        objective=FlowMatching(flow or FlowConfig(), loss or LossConfig()),
        adapter_targets=adapter_targets(
            depth=sizes.depth, dual_attention_blocks=sizes.dual_attention_blocks, clip_l_layers=0, clip_g_layers=0
        ),
        tokenizers=cast(Any, None),
        attention="sdpa",
        mmap=True,
        scaled_sides=(),
        clip_l_width=sizes.pooled_width // 2,
    )


def synthetic_strategy(family: Sd3Family) -> Sd3TextStrategy:
    """The family's text strategy without tokenizers: it drops, but can't tokenize."""
    no_tokenizer = cast(CaptionTokenizer, None)
    return Sd3TextStrategy(no_tokenizer, no_tokenizer, None, family.options, {})


def meta_denoiser(sizes: MMDiTConfig, attention: str = "sdpa") -> MMDiT:
    """The denoiser's shapes, without memory."""
    with torch.device("meta"):
        return MMDiT(sizes, attention=attention_function(attention))


def synthetic_denoiser(size: str, *, device: Any, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A frozen denoiser with random weights, made on the device: every layer answers, none blows up."""
    denoiser = meta_denoiser(SIZES[size]).to_empty(device=device).to(dtype).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for name, tensor in denoiser.state_dict().items():
        if name.endswith(("ln_q.weight", "ln_k.weight")):
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, 0.02, generator=generator)
    return denoiser


def synthetic_text(size: str, batch_size: int, *, device: Any, dtype: torch.dtype, seed: int = 0) -> Sd3Text:
    """Random text features of ordinary lengths."""
    sizes, generator = SIZES[size], torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(batch_size, *shape, generator=generator, device=device).to(dtype)

    return Sd3Text(
        clip=draw(CLIP_TOKENS, sizes.pooled_width),
        pooled=draw(sizes.pooled_width),
        t5=draw(T5_TOKENS, sizes.context_width),
    )
