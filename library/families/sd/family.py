"""Stable Diffusion 1.x and 2.x as the trainer sees them (Rombach et al. 2022, arXiv:2112.10752)."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.config.errors import ConfigError
from library.config.full import PARTS
from library.diffusion.ddpm import Ddpm, timestep_of
from library.diffusion.ddpm_path import DdpmPath, ddpm_path
from library.families.protocols import Modulation
from library.families.sd.adapter_targets import adapter_targets
from library.families.sd.checkpoint import (
    check_weights,
    load_text_encoder,
    load_unet,
    load_vae,
    read_unet_config,
    read_vae_config,
)
from library.families.sd.control_net import ControlNet, steer
from library.families.sd.control_net_weights import load_control_net, save_control_net
from library.families.sd.export import base_weights, complete_pipeline, kept_beside, save_folder, save_single
from library.families.sd.files import UNSKIPPABLE, SdFiles, describe, locate
from library.families.sd.latents import sd_latents
from library.families.sd.options import SdOptions
from library.families.sd.predictions import own_prediction, own_schedule_end
from library.families.sd.sizes import clip_sizes, unet_sizes
from library.families.sd.text import SdText, SdTextStrategy
from library.families.sd.tokenizers import load_tokenizer, tokenizer_folder
from library.families.sd.unet import UNetConfig
from library.io.fp8_matrices import Fp8Matrices
from library.io.parts import number_count, part_identity
from library.nn.attention import AttentionShape, attention_function
from library.nn.autoencoder_latents import AutoencoderLatents
from library.randomness import Draws
from library.records import AdapterTargets, ModelDescription, NoisedLatents, Resolution, TensorRecord
from library.text_encoders.tokenizers import TokenizerPlaces, tokenizer_places


@dataclass(frozen=True)
class SdFamily:
    """One checkpoint with the options that act on it (``library.families.protocols.ModelFamily``).

    Attributes:
        files: Where each part lies.
        options: The family's own options.
        denoiser: Sizes of the U-Net.
        description: What the files said about the model.
        latents: Pictures to latents.
        objective: How a picture is noised and the answer is measured.
        adapter_targets: Which layers an adapter changes, by component.
        tokenizers: Where to look for the tokenizer.
        attention: Name of the attention function.
        mmap: Whether weights are mapped rather than read.
        name: In the registry.
    """

    files: SdFiles
    options: SdOptions
    denoiser: UNetConfig
    description: ModelDescription
    latents: AutoencoderLatents
    objective: Ddpm
    adapter_targets: Mapping[str, AdapterTargets]
    tokenizers: TokenizerPlaces
    attention: str
    mmap: bool
    name: str = "sd"

    def identities(self) -> dict[str, str]:
        """What names the contents of the U-Net, the VAE and the text encoder."""
        parts = {"denoiser": self.files.denoiser, "vae": self.files.vae, "clip": self.files.clip}
        return {name: part_identity(part) for name, part in parts.items()}

    def text_strategy(self) -> SdTextStrategy:
        """The strategy with the tokenizer loaded."""
        is_v2 = self.files.is_v2
        tokenizer = load_tokenizer(self.tokenizers, self.options, is_v2=is_v2)
        layer = _layers_read(clip_sizes(self.files.clip).depth, self.options)
        return SdTextStrategy(tokenizer, layer, part_identity(self.files.clip))

    def load_text_encoders(
        self, *, device: Any, dtype: Any, names: Collection[str] | None = None
    ) -> dict[str, nn.Module]:
        """``clip``, frozen, in eval mode."""
        if names is not None and "clip" not in names:
            return {}
        files = self.files
        return {"clip": load_text_encoder(files.clip, is_v2=files.is_v2, device=device, dtype=dtype, mmap=self.mmap)}

    def text_shapes(self, rows: int) -> SdText:
        """Text features of so many captions on the meta device, fp32."""
        tokens = int(self.options.max_token_length) + 2
        return SdText(torch.empty(rows, tokens, self.denoiser.context_width, device="meta"))

    def encoder_numbers(self) -> dict[str, int]:
        """How many numbers the text encoder's weights have, from headers alone."""
        return {"clip": number_count(self.files.clip)}

    def load_vae(self, *, device: Any, dtype: Any) -> nn.Module:
        """The VAE, frozen, in eval mode."""
        return load_vae(self.files, device=device, dtype=dtype, mmap=self.mmap)

    def load_denoiser(self, *, device: Any, dtype: Any) -> nn.Module:
        """The U-Net, frozen, in eval mode."""
        attention = attention_function(self.attention)
        return load_unet(self.files, attention=attention, device=device, dtype=dtype, mmap=self.mmap)

    def stored_fp8(self, component: str) -> Fp8Matrices:
        """What the files hold in fp8 of the U-Net or of the text encoder, by the weights' names in its module."""
        if component == "denoiser":
            return Fp8Matrices(self.files.denoiser, unet_sizes(self.files.denoiser).key_maps)
        return Fp8Matrices(self.files.clip)

    def augment(self, text: TensorRecord, draws: Draws, latent_size: tuple[int, int]) -> SdText:
        """The conditioning as it is: nothing acts in training only."""
        assert isinstance(text, SdText)
        return text

    def predict(self, denoiser: nn.Module, noised: NoisedLatents, text: TensorRecord) -> Tensor:
        """The noise or the velocity (B, C, h, w), as the model answers."""
        assert isinstance(text, SdText)
        dtype = next(denoiser.parameters()).dtype
        control = {} if noised.control is None else {"hint": noised.control.to(dtype)}
        return denoiser(noised.x_t.to(dtype), timestep_of(noised.sigma), text.context.to(dtype), **control)

    def load_control_net(self, path: str | None, *, seed: int, device: Any, dtype: Any) -> ControlNet:
        """The ControlNet at ``path``, or one that begins as a copy of the U-Net."""
        attention = attention_function(self.attention)
        return load_control_net(
            path, self.files.denoiser, attention=attention, seed=seed, device=device, dtype=dtype, mmap=self.mmap
        )

    def steer(self, denoiser: nn.Module, control_net: nn.Module) -> None:
        """From now on ``predict`` shows ``NoisedLatents.control`` to the ControlNet, which acts on the U-Net."""
        steer(denoiser, control_net)

    def control_net_blocks(self, control_net: nn.Module) -> Sequence[nn.Module]:
        """Its stages in forward order."""
        assert isinstance(control_net, ControlNet)
        return control_net.stages

    def write_control_net(
        self, weights: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str], *, layout: str, dtype: Any
    ) -> None:
        """A file or a folder in diffusers' spelling."""
        save_control_net(weights, self.files.denoiser, path, metadata, layout=layout, dtype=dtype)

    def blocks(self, denoiser: nn.Module) -> Sequence[nn.Module]:
        """The stages in forward order."""
        unwrapped: Any = getattr(denoiser, "module", denoiser)  # DistributedDataParallel keeps it in ``module``
        return list(unwrapped.stages)

    def modulation(self, denoiser: nn.Module) -> Modulation:
        """None: a residual block sees the timestep alone, through a layer that is small beside its convolutions."""
        return Modulation([], [])

    def sampling_path(self, sampler: str, steps: int, resolution: Resolution) -> DdpmPath:
        """The way of diffusers' scheduler of that name, at every resolution."""
        ddpm = self.objective.ddpm
        velocity = bool(ddpm.v_parameterization)
        zero_terminal_snr = bool(ddpm.zero_terminal_snr)
        return ddpm_path(sampler, steps, v_parameterization=velocity, zero_terminal_snr=zero_terminal_snr)

    def skipping(self, denoiser: nn.Module, layers: Sequence[int]) -> AbstractContextManager[None]:
        """Not possible here.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"no stage can be left out: {UNSKIPPABLE}")

    def attention_shape(self, resolution: Resolution) -> AttentionShape:
        """The image's look at itself on the first level, where it has the most positions."""
        heads = self.denoiser.heads(self.denoiser.width)
        height, width = self.latents.format.latent_size(resolution)
        positions = height * width
        return AttentionShape(heads, self.denoiser.width // heads, positions, positions, masked=False)

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
        """The trained components as a single file, or in a folder in diffusers' layout."""
        files, ddpm = self.files, self.objective.ddpm
        weights = {**base_weights(files, parts), **trained}
        # the products of fp8 numbers and their scales are in fp32, which none of them needs
        widened = {name for name, part in (("vae", files.vae), ("clip", files.clip)) if part.scales}
        dtypes = {name: dtype if name in trained else torch.bfloat16 if name in widened else None for name in weights}
        if layout != "diffusers":
            beside = kept_beside(files.clip)
            save_single(weights, path, metadata, is_v2=files.is_v2, dtypes=dtypes, beside=beside)
            return
        native = self.description.native_resolution
        save_folder(weights, self.denoiser, read_vae_config(files), path, metadata, native=native, dtypes=dtypes)
        if set(parts) == set(PARTS):
            complete_pipeline(
                path,
                tokenizer_folder(self.tokenizers),
                is_v2=files.is_v2,
                v_prediction=bool(ddpm.v_parameterization),
                zero_terminal_snr=bool(ddpm.zero_terminal_snr),
            )


def _layers_read(depth: int, options: SdOptions) -> int:
    """How many of the text encoder's layers captions go through."""
    return depth + 1 - (options.clip_skip or 1)


def create(config: Any) -> SdFamily:
    """This makes the family from a validated configuration. Only headers of files are read.

    Args:
        config: With the groups ``model``, ``family``, ``ddpm``, ``loss`` and ``memory``.

    Raises:
        ConfigError: The files are missing, unusable, or don't fit each other.
    """
    model, options = config.model, config.family
    files = locate(model, options)
    if wrong := check_weights(files):
        raise ConfigError("\n".join(wrong))
    velocity = own_prediction(config.ddpm, files.v_prediction)
    zero_terminal_snr = own_schedule_end(config.ddpm, files.zero_terminal_snr)
    ddpm = dataclasses.replace(config.ddpm, v_parameterization=velocity, zero_terminal_snr=zero_terminal_snr)
    denoiser, clip_layers = read_unet_config(files), clip_sizes(files.clip).depth
    return SdFamily(
        files=files,
        options=options,
        denoiser=denoiser,
        description=describe(files, options, v_prediction=velocity),
        latents=sd_latents(part_identity(files.vae)),
        objective=Ddpm(ddpm, config.loss),
        adapter_targets=adapter_targets(
            multipliers=denoiser.multipliers,
            attention_levels=denoiser.attention_levels,
            blocks_per_level=denoiser.blocks_per_level,
            clip_layers=clip_layers,
            read_clip_layers=_layers_read(clip_layers, options),
        ),
        tokenizers=tokenizer_places(model),
        attention=config.memory.attention_backend,
        mmap=not model.disable_mmap_load_safetensors,
    )
