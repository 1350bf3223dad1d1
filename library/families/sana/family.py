"""Sana and Sana-1.5 as the trainer sees them (Xie et al. 2024, arXiv:2410.10629; 2025, arXiv:2501.18427)."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.config.errors import ConfigError
from library.config.flow import FlowConfig
from library.config.full import PARTS
from library.diffusion.flow_matching import FlowMatching
from library.diffusion.flow_path import FlowPath
from library.diffusion.samplers import SAMPLERS
from library.diffusion.timesteps import shift
from library.families.protocols import Modulation
from library.families.sana.adapter_targets import adapter_targets
from library.families.sana.checkpoint import check_weights, load_dit, load_vae, read_dit_config, read_vae_config
from library.families.sana.export import (
    complete_pipeline,
    gemma_weights,
    save_folder,
    save_gemma,
    save_single,
    save_vae,
    stored_empty_caption,
    vae_weights,
)
from library.families.sana.files import SanaFiles, describe, locate
from library.families.sana.latents import SanaLatentStrategy
from library.families.sana.linear_dit import LinearDiTConfig
from library.families.sana.options import SanaOptions
from library.families.sana.sizes import denoiser_sizes
from library.families.sana.skip_layers import skipped_layers
from library.families.sana.text import SanaText, SanaTextStrategy
from library.families.sana.tokenizers import load_tokenizer, tokenizer_folder
from library.io.fp8_matrices import Fp8Matrices
from library.io.parts import number_count, part_identity
from library.io.safetensors import LazyTensors
from library.nn.attention import AttentionShape, attention_function
from library.randomness import Draws
from library.records import AdapterTargets, ModelDescription, NoisedLatents, Resolution, TensorRecord
from library.text_encoders.gemma import load_gemma
from library.text_encoders.tokenizers import TokenizerPlaces, tokenizer_places

TIMESTEPS = 1000
_MASKLESS = ("torch-flash", "flash", "sage")
SAMPLING_SHIFT, LARGEST_SAMPLING_SHIFT = 3.0, 6.0
_LARGEST_SIDE = 4096


@dataclass(frozen=True)
class SanaFamily:
    """One Sana checkpoint with the options that act on it (``library.families.protocols.ModelFamily``).

    Attributes:
        files: Where each part lies.
        options: The family's own options.
        denoiser: Sizes of the denoiser.
        description: What the files said about the model.
        latents: Pictures to latents.
        objective: How a picture is noised and the answer is measured.
        adapter_targets: Which layers an adapter changes, by component.
        tokenizers: Where to look for the tokenizer.
        attention: Name of the function for the attention to the text.
        mmap: Whether weights are mapped rather than read.
        name: In the registry.
    """

    files: SanaFiles
    options: SanaOptions
    denoiser: LinearDiTConfig
    description: ModelDescription
    latents: SanaLatentStrategy
    objective: FlowMatching
    adapter_targets: Mapping[str, AdapterTargets]
    tokenizers: TokenizerPlaces
    attention: str
    mmap: bool
    name: str = "sana"

    def identities(self) -> dict[str, str]:
        """What names the contents of the denoiser, the DC-AE and Gemma."""
        parts = {"denoiser": self.files.denoiser, "vae": self.files.vae, "gemma": self.files.gemma}
        return {name: part_identity(part) for name, part in parts.items()}

    def text_strategy(self) -> SanaTextStrategy:
        """The strategy with the tokenizer loaded."""
        tokenizer = load_tokenizer(self.tokenizers, self.options, self.files)
        return SanaTextStrategy(tokenizer, part_identity(self.files.gemma))

    def load_text_encoders(
        self, *, device: Any, dtype: Any, names: Collection[str] | None = None
    ) -> dict[str, nn.Module]:
        """``gemma``, frozen, in eval mode."""
        if names is not None and "gemma" not in names:
            return {}
        part = self.files.gemma
        read_to = "meta" if torch.device(device).type == "meta" else "cpu"
        tensors = LazyTensors(part, device=read_to, mmap=self.mmap).items()
        return {"gemma": load_gemma(tensors, part.shapes, device=device, dtype=dtype, source=part.title)}

    def text_shapes(self, rows: int) -> SanaText:
        """Text features of so many captions on the meta device, fp32."""
        length, width = self.options.sana_max_token_length, self.denoiser.context_width
        context = torch.empty(rows, length, width, device="meta")
        return SanaText(context, torch.empty(rows, length, dtype=torch.bool, device="meta"))

    def encoder_numbers(self) -> dict[str, int]:
        """How many numbers Gemma's weights have, from headers alone."""
        return {"gemma": number_count(self.files.gemma)}

    def load_vae(self, *, device: Any, dtype: Any) -> nn.Module:
        """The DC-AE, frozen, in eval mode."""
        return load_vae(self.files, device=device, dtype=dtype, mmap=self.mmap)

    def load_denoiser(self, *, device: Any, dtype: Any) -> nn.Module:
        """The denoiser, frozen, in eval mode."""
        attention = attention_function(self.attention)
        return load_dit(self.files, self.denoiser, attention=attention, device=device, dtype=dtype, mmap=self.mmap)

    def stored_fp8(self, component: str) -> Fp8Matrices:
        """What the files hold in fp8 of the denoiser or of Gemma, by the weights' names in its module."""
        if component == "denoiser":
            return Fp8Matrices(self.files.denoiser, denoiser_sizes(self.files.denoiser).key_maps)
        return Fp8Matrices(self.files.gemma)

    def augment(self, text: TensorRecord, draws: Draws, latent_size: tuple[int, int]) -> SanaText:
        """The conditioning as it is: nothing acts in training only."""
        assert isinstance(text, SanaText)
        return text

    def predict(self, denoiser: nn.Module, noised: NoisedLatents, text: TensorRecord) -> Tensor:
        """The denoiser's velocity (B, C, h, w). It is told the noise level in thousandths, without their fraction."""
        assert isinstance(text, SanaText)
        dtype = next(denoiser.parameters()).dtype
        timestep = torch.floor(noised.sigma.float() * TIMESTEPS)
        return denoiser(noised.x_t.to(dtype), timestep, text.context.to(dtype), text.mask)

    def blocks(self, denoiser: nn.Module) -> Sequence[nn.Module]:
        """The blocks in forward order."""
        unwrapped: Any = getattr(denoiser, "module", denoiser)  # DistributedDataParallel keeps it in ``module``
        return list(unwrapped.blocks)

    def modulation(self, denoiser: nn.Module) -> Modulation:
        """None: one layer makes the vectors of all blocks."""
        return Modulation([], [])

    def sampling_path(self, sampler: str, steps: int, resolution: Resolution) -> FlowPath:
        """Through ``sampling_sigmas``, with any sampler."""
        return FlowPath(SAMPLERS[sampler], self.sampling_sigmas(steps, resolution))

    def sampling_sigmas(self, steps: int, resolution: Resolution) -> Tensor:
        """The noise levels of diffusers' flow schedule (steps + 1,), from a little below 1 to 0, fp32.

        Evenly spaced steps through the table of 1000 levels are shifted. The shift is the published scheduler's, at
        every resolution.
        """
        levels = 1 - torch.linspace(1 / TIMESTEPS, 1, steps + 1, dtype=torch.float64)
        return shift(levels, self.sampling_shift).float()

    @property
    def sampling_shift(self) -> float:
        """The published scheduler's shift."""
        side = max(self.description.native_resolution)
        return LARGEST_SAMPLING_SHIFT if side >= _LARGEST_SIDE else SAMPLING_SHIFT

    def write_model(
        self,
        trained: Mapping[str, Mapping[str, Tensor]],
        path: Path,
        metadata: Mapping[str, str],
        *,
        layout: str,
        parts: Collection[str],
        dtype: torch.dtype | None,
    ) -> None:
        """The denoiser in NVlabs' layout, or the components in a folder in diffusers' layout."""
        denoiser = trained["denoiser"]
        if layout != "diffusers":
            save_single(denoiser, path, metadata, dtype=dtype, empty_caption=stored_empty_caption(self.files.denoiser))
            return
        side = max(self.description.native_resolution)
        save_folder(denoiser, self.denoiser, path / "transformer", metadata, image_size=side, dtype=dtype)
        if "vae" in parts:
            save_vae(vae_weights(self.files), read_vae_config(self.files), path / "vae")
        if "text_encoders" in parts:
            # the products of fp8 numbers and their scales are in fp32, which none of them needs
            widened = torch.bfloat16 if self.files.gemma.scales else None
            save_gemma(gemma_weights(self.files), path / "text_encoder", dtype=widened)
        if set(parts) == set(PARTS):
            complete_pipeline(path, tokenizer_folder(self.tokenizers, self.files), shift=self.sampling_shift)

    def attention_shape(self, resolution: Resolution) -> AttentionShape:
        """The image's look at the text, whose padding is hidden; that at itself is linear."""
        heads, queries = self.denoiser.num_cross_heads, self.latents.format.tokens(resolution)
        keys = self.options.sana_max_token_length
        return AttentionShape(heads, self.denoiser.width // heads, queries, keys, masked=True)

    def skipping(self, denoiser: nn.Module, layers: Sequence[int]) -> AbstractContextManager[None]:
        """A context manager inside which the blocks ``layers`` leave the image tokens as they are."""
        return skipped_layers(self.blocks(denoiser), layers)


def create(config: Any) -> SanaFamily:
    """This makes the family from a validated configuration. Only headers of files are read.

    Args:
        config: With the groups ``model``, ``family``, ``flow``, ``loss`` and ``memory``.

    Raises:
        ConfigError: The files are missing, unusable, or don't fit each other.
    """
    model, options = config.model, config.family
    files = locate(model, options)
    denoiser = read_dit_config(files, options)
    if wrong := check_weights(files, denoiser):
        raise ConfigError("\n".join(wrong))
    description = describe(files, options)
    if (mode := config.memory.attention_backend) in _MASKLESS:
        raise ConfigError(
            f"--attn_mode {mode} does nothing for Sana: its attention to the text hides padding, which this kernel "
            "can't, and the other one is linear. Remove it"
        )
    return SanaFamily(
        files=files,
        options=options,
        denoiser=denoiser,
        description=description,
        latents=SanaLatentStrategy(part_identity(files.vae)),
        objective=FlowMatching(with_own_shift(config.flow, description), config.loss, TIMESTEPS),
        adapter_targets=adapter_targets(depth=denoiser.depth),
        tokenizers=tokenizer_places(model),
        attention=config.memory.attention_backend,
        mmap=not model.disable_mmap_load_safetensors,
    )


def with_own_shift(flow: FlowConfig, description: ModelDescription) -> FlowConfig:
    """The noise levels with the model's published shift where nobody gave one."""
    if flow.training_shift is not None or flow.flow_schedule_auto_shift:
        return flow
    return dataclasses.replace(flow, training_shift=float(description.defaults["training_shift"]))
