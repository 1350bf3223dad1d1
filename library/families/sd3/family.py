"""Stable Diffusion 3 and 3.5 as the trainer sees it (Esser et al. 2024, arXiv:2403.03206)."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.config.errors import ConfigError
from library.config.full import PARTS
from library.diffusion.flow_matching import FlowMatching
from library.diffusion.flow_path import FlowPath
from library.diffusion.samplers import SAMPLERS
from library.diffusion.timesteps import shift
from library.families.protocols import Modulation
from library.families.sd3 import position_table
from library.families.sd3.adapter_targets import adapter_targets
from library.families.sd3.checkpoint import check_weights, load_mmdit, load_vae, read_mmdit_config, read_vae_config
from library.families.sd3.export import base_weights, complete_pipeline, save_folder, save_single
from library.families.sd3.files import Sd3Files, describe, locate
from library.families.sd3.latents import Sd3LatentStrategy
from library.families.sd3.mmdit import MMDiTConfig
from library.families.sd3.options import Sd3Options
from library.families.sd3.sizes import clip_sizes, denoiser_sizes
from library.families.sd3.skip_layers import skipped_layers
from library.families.sd3.text import Sd3Text, Sd3TextStrategy, drop_encoders, sd3_text_strategy
from library.families.sd3.tokenizers import tokenizer_folders
from library.io.fp8_matrices import Fp8Matrices
from library.io.parts import Part, number_count, part_identity
from library.io.safetensors import LazyTensors
from library.nn.attention import AttentionShape, attention_function
from library.randomness import Draws
from library.records import AdapterTargets, ModelDescription, NoisedLatents, Resolution, TensorRecord
from library.text_encoders.clip import load_clip
from library.text_encoders.t5 import load_t5
from library.text_encoders.tokenizers import CLIP_LENGTH, TokenizerPlaces, tokenizer_places

SAMPLING_SHIFT = 3.0
"""The shift of the reference implementation's sampling schedule."""

_CLIP_TOKENS = 77
_TIMESTEPS = 1000


@dataclass(frozen=True)
class Sd3Family:
    """One SD3 checkpoint with the options that act on it (``library.families.protocols.ModelFamily``).

    Attributes:
        files: Where each part lies.
        options: The family's own options.
        denoiser: Sizes of the denoiser.
        description: What the files said about the model.
        latents: Pictures to latents.
        objective: How a picture is noised and the answer is measured.
        adapter_targets: Which layers an adapter changes, by component.
        tokenizers: Where to look for them.
        attention: Name of the attention function.
        mmap: Whether weights are mapped rather than read.
        scaled_sides: ``position_table.token_side`` of every training resolution, for ``--enable_scaled_pos_embed``;
            empty outside training: then each picture has its own.
        clip_l_width: Features of CLIP-L.
        name: In the registry.
    """

    files: Sd3Files
    options: Sd3Options
    denoiser: MMDiTConfig
    description: ModelDescription
    latents: Sd3LatentStrategy
    objective: FlowMatching
    adapter_targets: Mapping[str, AdapterTargets]
    tokenizers: TokenizerPlaces
    attention: str
    mmap: bool
    scaled_sides: tuple[int, ...]
    clip_l_width: int
    name: str = "sd3"

    def identities(self) -> dict[str, str]:
        """What names the contents of the denoiser, the VAE and the text encoders."""
        parts = {"denoiser": self.files.denoiser, "vae": self.files.vae, **self._encoders}
        return {name: part_identity(part) for name, part in parts.items()}

    @property
    def _encoders(self) -> dict[str, Part]:
        parts = {"clip_l": self.files.clip_l, "clip_g": self.files.clip_g, "t5xxl": self.files.t5xxl}
        return {name: part for name, part in parts.items() if part is not None}

    def text_strategy(self) -> Sd3TextStrategy:
        """The strategy with tokenizers loaded."""
        identities = {name: part_identity(part) for name, part in self._encoders.items()}
        return sd3_text_strategy(self.tokenizers, self.options, identities, has_t5=self.files.t5xxl is not None)

    def load_text_encoders(
        self, *, device: Any, dtype: Any, names: Collection[str] | None = None
    ) -> dict[str, nn.Module]:
        """``clip_l``, ``clip_g`` and, where the files have it, ``t5xxl``: frozen, in eval mode."""
        encoders: dict[str, nn.Module] = {}
        read_to = "meta" if torch.device(device).type == "meta" else "cpu"
        for name, part, activation in (
            ("clip_l", self.files.clip_l, "quick_gelu"),
            ("clip_g", self.files.clip_g, "gelu"),
        ):
            if names is not None and name not in names:
                continue
            tensors = LazyTensors(part, device=read_to, mmap=self.mmap).items()
            encoders[name] = load_clip(
                tensors, part.shapes, activation=activation, device=device, dtype=dtype, source=part.title
            )
        if (t5 := self.files.t5xxl) is not None and (names is None or "t5xxl" in names):
            tensors = LazyTensors(t5, device=read_to, mmap=self.mmap).items()
            encoders["t5xxl"] = load_t5(tensors, t5.shapes, device=device, dtype=dtype, source=t5.title)
        return encoders

    def text_shapes(self, rows: int) -> Sd3Text:
        """Text features of so many captions on the meta device, fp32."""
        sizes = self.denoiser
        t5 = torch.empty(rows, self.options.t5xxl_max_token_length, sizes.context_width, device="meta")
        return Sd3Text(
            clip=torch.empty(rows, CLIP_LENGTH, sizes.pooled_width, device="meta"),
            pooled=torch.empty(rows, sizes.pooled_width, device="meta"),
            t5=None if self.files is not None and self.files.t5xxl is None else t5,
        )

    def encoder_numbers(self) -> dict[str, int]:
        """How many numbers the weights of each text encoder have, from headers alone."""
        return {name: number_count(part) for name, part in self._encoders.items()}

    def load_vae(self, *, device: Any, dtype: Any) -> nn.Module:
        """The VAE, frozen, in eval mode."""
        return load_vae(self.files, device=device, dtype=dtype, mmap=self.mmap)

    def load_denoiser(self, *, device: Any, dtype: Any) -> nn.Module:
        """The denoiser, frozen, in eval mode."""
        attention = attention_function(self.attention)
        return load_mmdit(self.files, attention=attention, device=device, dtype=dtype, mmap=self.mmap)

    def stored_fp8(self, component: str) -> Fp8Matrices:
        """What the files hold in fp8 of the denoiser or of a text encoder, by the weights' names in its module."""
        if component == "denoiser":
            return Fp8Matrices(self.files.denoiser, denoiser_sizes(self.files.denoiser).key_maps)
        return Fp8Matrices(self._encoders[component])

    def augment(self, text: TensorRecord, draws: Draws, latent_size: tuple[int, int]) -> Sd3Text:
        """The conditioning with what acts in training only.

        Single encoders are silenced (``--clip_l_dropout_rate`` and its siblings), and windows into the position table
        are moved (``--pos_emb_random_crop_rate``), each for single samples.
        """
        assert isinstance(text, Sd3Text)
        options = self.options
        if options.clip_l_dropout_rate or options.clip_g_dropout_rate or options.t5_dropout_rate:
            text = drop_encoders(
                text,
                clip_l_width=self.clip_l_width,
                clip_l=draws.uniform("clip_l_dropout") < options.clip_l_dropout_rate,
                clip_g=draws.uniform("clip_g_dropout") < options.clip_g_dropout_rate,
                t5=draws.uniform("t5_dropout") < options.t5_dropout_rate,
            )
        if options.pos_emb_random_crop_rate:
            text = dataclasses.replace(text, positions=self._random_positions(draws, latent_size))
        return text

    def predict(self, denoiser: nn.Module, noised: NoisedLatents, text: TensorRecord) -> Tensor:
        """The denoiser's velocity (B, C, h, w). It is told the noise level in fp32, times 1000."""
        assert isinstance(text, Sd3Text)
        dtype = next(denoiser.parameters()).dtype
        return denoiser(
            noised.x_t.to(dtype),
            noised.sigma.float() * _TIMESTEPS,
            text.context(self.denoiser.context_width).to(dtype),
            text.pooled.to(dtype),
            position_table=self._position_table(denoiser, self._tokens(noised.x_t.shape[2:]), text.positions),
        )

    def blocks(self, denoiser: nn.Module) -> Sequence[nn.Module]:
        """The joint blocks in forward order."""
        return list(_unwrapped(denoiser).joint_blocks)

    def modulation(self, denoiser: nn.Module) -> Modulation:
        """A third of the model: two layers in each block, and one at the end."""
        mmdit = _unwrapped(denoiser)
        streams = [stream for block in mmdit.joint_blocks for stream in (block.context_block, block.x_block)]
        layers = [part.adaLN_modulation for part in (*streams, mmdit.final_layer)]
        return Modulation(layers, [mmdit.t_embedder, mmdit.y_embedder])

    def sampling_path(self, sampler: str, steps: int, resolution: Resolution) -> FlowPath:
        """Through ``sampling_sigmas``, with any sampler."""
        return FlowPath(SAMPLERS[sampler], self.sampling_sigmas(steps, resolution))

    def sampling_sigmas(self, steps: int, resolution: Resolution) -> Tensor:
        """The reference's noise levels (steps + 1,), from 1 down to 0, fp32, at every resolution.

        Its table of 1000 levels is shifted once; evenly spaced steps between the table's ends are shifted again.
        """
        lowest = float(shift(torch.tensor(1 / _TIMESTEPS, dtype=torch.float64), SAMPLING_SHIFT))
        levels = shift(torch.linspace(1, lowest, steps, dtype=torch.float64), SAMPLING_SHIFT)
        return torch.cat([levels, levels.new_zeros(1)]).float()

    def attention_shape(self, resolution: Resolution) -> AttentionShape:
        """Image and text together, without a mask."""
        tokens = self.latents.format.tokens(resolution) + _CLIP_TOKENS + self.options.t5xxl_max_token_length
        return AttentionShape(self.denoiser.num_heads, self.denoiser.head_dim, tokens, tokens, masked=False)

    def skipping(self, denoiser: nn.Module, layers: Sequence[int]) -> AbstractContextManager[None]:
        """A context manager inside which the blocks ``layers`` leave both streams as they are."""
        return skipped_layers(self.blocks(denoiser), layers)

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
        weights = {**base_weights(self.files, parts), **trained}
        # the products of fp8 numbers and their scales are in fp32, which none of them needs
        widened = {name for name, part in self._encoders.items() if part.scales}
        dtypes = {name: dtype if name in trained else torch.bfloat16 if name in widened else None for name in weights}
        if layout != "diffusers":
            save_single(weights, path, metadata, dtypes=dtypes)
            return
        save_folder(weights, self.denoiser, read_vae_config(self.files), path, metadata, dtypes=dtypes)
        if set(parts) == set(PARTS):
            has_t5 = self.files.t5xxl is not None
            complete_pipeline(path, tokenizer_folders(self.tokenizers, has_t5=has_t5), has_t5=has_t5)

    def _tokens(self, latent_size: Sequence[int]) -> tuple[int, int]:
        return latent_size[0] // self.denoiser.patch_size, latent_size[1] // self.denoiser.patch_size

    def _random_positions(self, draws: Draws, latent_size: Sequence[int]) -> Tensor:
        """First row and column of each sample's window (B, 2): a random one, or the middle."""
        height, width = self._tokens(latent_size)
        size = self.denoiser.pos_embed_max_size
        if self.options.enable_scaled_pos_embed:
            sides = self._scaled_sides(height, width)
            size = position_table.scaled_size(position_table.scaled_side(sides, height, width))
        uniform = torch.stack([draws.uniform("position_row"), draws.uniform("position_column")], dim=1)
        moved = draws.uniform("position_crop") < self.options.pos_emb_random_crop_rate
        middle = torch.tensor([position_table.centre_offset(size, height, width)])
        return torch.where(moved[:, None], position_table.random_offsets(uniform, size, height, width), middle)

    def _position_table(self, denoiser: nn.Module, tokens: tuple[int, int], positions: Tensor | None) -> Tensor | None:
        """What is added to the image tokens; None: the denoiser takes the middle of its own table."""
        stored = _unwrapped(denoiser).pos_embed
        if self.options.enable_scaled_pos_embed:
            return position_table.scaled_table(
                self._scaled_sides(*tokens), *tokens, self.denoiser.width, offsets=positions, device=stored.device
            )
        return None if positions is None else position_table.crop(stored, *tokens, positions)

    def _scaled_sides(self, height: int, width: int) -> tuple[int, ...]:
        return self.scaled_sides or (max(1, round(math.sqrt(height * width))),)


def create(config: Any) -> Sd3Family:
    """This makes the family from a validated configuration. Only headers of files are read.

    Args:
        config: With the groups ``model``, ``family``, ``flow``, ``loss`` and ``memory``, and in training ``datasets``.

    Raises:
        ConfigError: The files are missing, unusable, or don't fit each other.
    """
    files = locate(config.model, config.family)
    if wrong := check_weights(files):
        raise ConfigError("\n".join(wrong))
    denoiser = read_mmdit_config(files)
    clip_l = clip_sizes(files.clip_l)
    resolutions = [dataset.resolution for dataset in getattr(config, "datasets", ())]
    latents = Sd3LatentStrategy(part_identity(files.vae))
    step = latents.format.resolution_step
    model = config.model
    return Sd3Family(
        files=files,
        options=config.family,
        denoiser=denoiser,
        description=describe(files, config.family),
        latents=latents,
        objective=FlowMatching(config.flow, config.loss),
        adapter_targets=adapter_targets(
            depth=denoiser.depth,
            dual_attention_blocks=denoiser.dual_attention_blocks,
            clip_l_layers=clip_l.depth,
            clip_g_layers=clip_sizes(files.clip_g).depth,
        ),
        tokenizers=tokenizer_places(model),
        attention=config.memory.attention_backend,
        mmap=not model.disable_mmap_load_safetensors,
        scaled_sides=tuple(position_table.token_side(resolution, step) for resolution in resolutions),
        clip_l_width=clip_l.width,
    )


def _unwrapped(denoiser: nn.Module) -> Any:
    """The MMDiT itself: DistributedDataParallel keeps it in ``module``."""
    return getattr(denoiser, "module", denoiser)
