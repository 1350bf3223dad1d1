"""What the shared code asks of a model family. Protocols, not base classes: a family inherits from nothing."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from library.data.report_captions import Window
from library.diffusion.ddpm_samplers import NoiseOfStep
from library.diffusion.samplers import Callback, Denoise
from library.io.fp8_matrices import Fp8Matrices
from library.nn.attention import AttentionShape
from library.randomness import Draws
from library.records import AdapterTargets, LatentFormat, ModelDescription, NoisedLatents, Resolution, TensorRecord


class TextEncodingStrategy(Protocol):
    """Captions to conditioning. Holds tokenizers and settings, no text encoder, so that it pickles into workers."""

    def signature(self) -> Mapping[str, str]:
        """Every setting that changes the result, the encoders' identity included."""
        ...

    def windows(self) -> Mapping[str, Window]:
        """What tokenizers keep, by the name of their encoder, for people: the start of a caption, cutting the rest."""
        ...

    def tokenize(self, captions: Sequence[str]) -> TensorRecord:
        """Token ids of the captions, padded, on the CPU."""
        ...

    def encode(self, encoders: Mapping[str, nn.Module], tokens: TensorRecord) -> TensorRecord:
        """Text features (B, ...), on the encoders' device. Gradients flow when they are enabled."""
        ...

    def record(self) -> type[TensorRecord]:
        """The class of what ``encode`` returns."""
        ...

    def pack(self, text: TensorRecord, row: int) -> dict[str, Tensor]:
        """What a store keeps of one row, by name and without the batch dimension.

        Padding is left out where it is known to be zeros.
        """
        ...

    def unpack(self, rows: Sequence[Mapping[str, Tensor]]) -> TensorRecord:
        """The batch of packed rows, bit for bit what ``encode`` gave."""
        ...

    def drop(self, text: TensorRecord, dropped: Tensor) -> TensorRecord:
        """The features with the rows in ``dropped`` (B,) made unconditional.

        Those rows hold the encoded empty caption already; a family replaces it where its options say so.
        """
        ...

    def for_negatives(self) -> "TextEncodingStrategy":
        """The strategy for negative prompts, with a signature of its own if it reads them in another way."""
        ...


class LatentCachingStrategy(Protocol):
    """Pixels to latents."""

    format: LatentFormat

    def signature(self) -> Mapping[str, str]:
        """Every setting that changes the result, the VAE's identity included."""
        ...

    def encode(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        """Raw latents (B, C, h, w), not normalised, of pictures (B, 3, H, W) in -1..1."""
        ...

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in -1..1 of normalised latents (B, C, h, w)."""
        ...


class Objective(Protocol):
    """How a picture is noised and what the denoiser's answer is measured against."""

    def sigmas(self, uniform: Tensor, *, tokens: int) -> Tensor:
        """Noise levels (B,), fp32, in (0, 1], from numbers of the open interval (0, 1)."""
        ...

    def add_noise(self, x_0: Tensor, noise: Tensor, sigma: Tensor, draws: Draws | None = None) -> NoisedLatents:
        """The noised latents, fp32; without ``draws``, options that change the noise don't act."""
        ...

    def target(self, noised: NoisedLatents) -> Tensor:
        """What the denoiser should answer (B, C, h, w), fp32."""
        ...

    def loss(self, prediction: Tensor, noised: NoisedLatents, target: Tensor | None = None) -> Tensor:
        """Loss per element (B, C, h, w), fp32, weighted by noise level, against ``target`` or by default its own."""
        ...


class SamplingPath(Protocol):
    """The way from noise to latents. A sampler may walk in coordinates of its own: ``x`` at a level."""

    levels: Tensor
    """Noise levels (steps + 1,) in those coordinates, falling strictly, on the CPU."""

    def asked(self, x: Tensor, level: float) -> NoisedLatents:
        """What the denoiser is asked about, at ``x`` (B, C, h, w)."""
        ...

    def estimate(self, x: Tensor, answer: Tensor, level: float) -> Tensor:
        """The estimate of the clean, normalised latents (B, C, h, w), fp32, that the denoiser's answer stands for."""
        ...

    def walk(self, denoise: Denoise, noise: Tensor, *, fresh: NoiseOfStep, callback: Callback | None = None) -> Tensor:
        """The normalised latents (B, C, h, w), fp32.

        Args:
            denoise: ``x`` and its level to the estimate of the clean latents.
            noise: Gaussian noise (B, C, h, w).
            fresh: More of it for a step's number, where the sampler adds some.
            callback: Called after each step with its number (from 0) and the estimate that it used.
        """
        ...


class Modulation(NamedTuple):
    """What an MMDiT makes of the noise level and the pooled text.

    Attributes:
        layers: Each maps the conditioning (B, D) to vectors (B, n), in forward order.
        embedders: What makes the conditioning.
    """

    layers: Sequence[nn.Module]
    embedders: Sequence[nn.Module]


class ModelFamily(Protocol):
    """One architecture, in a few parts. The trainer knows nothing else about it."""

    name: str
    description: ModelDescription
    latents: LatentCachingStrategy
    objective: Objective
    adapter_targets: Mapping[str, AdapterTargets]
    """By component: ``denoiser`` and the names of the text encoders."""

    def identities(self) -> Mapping[str, str]:
        """What names the contents of each part's weights, by the part: cheap to compute, and no path in it."""
        ...

    def text_strategy(self) -> TextEncodingStrategy:
        """The strategy with tokenizers loaded."""
        ...

    def load_text_encoders(
        self, *, device: Any, dtype: Any, names: Collection[str] | None = None
    ) -> dict[str, nn.Module]:
        """The text encoders by name, frozen, in eval mode: all of them, or those in ``names``."""
        ...

    def text_shapes(self, rows: int) -> TensorRecord:
        """Text features of so many captions on the meta device, fp32, of the length that the denoiser gets."""
        ...

    def encoder_numbers(self) -> Mapping[str, int]:
        """How many numbers the weights of each text encoder have, from headers alone."""
        ...

    def load_vae(self, *, device: Any, dtype: Any) -> nn.Module:
        """The VAE, frozen, in eval mode."""
        ...

    def load_denoiser(self, *, device: Any, dtype: Any) -> nn.Module:
        """The denoiser, frozen, in eval mode."""
        ...

    def stored_fp8(self, component: str) -> Fp8Matrices:
        """What the files hold in fp8 of the denoiser or of a text encoder, by the weights' names in its module."""
        ...

    def augment(self, text: TensorRecord, draws: Draws, latent_size: tuple[int, int]) -> TensorRecord:
        """The conditioning with what acts in training only: per-encoder dropout, crops of the position table."""
        ...

    def predict(self, denoiser: nn.Module, noised: NoisedLatents, text: TensorRecord) -> Tensor:
        """The denoiser's answer (B, C, h, w)."""
        ...

    def blocks(self, denoiser: nn.Module) -> Sequence[nn.Module]:
        """The repeated blocks in forward order: what checkpointing and block swap act on."""
        ...

    def modulation(self, denoiser: nn.Module) -> Modulation:
        """The layers of blocks that see the conditioning vector alone; none where a model has one for all blocks."""
        ...

    def write_model(
        self,
        trained: Mapping[str, Mapping[str, Tensor]],
        path: Path,
        metadata: Mapping[str, str],
        *,
        layout: str,
        parts: Collection[str],
        dtype: Any,
    ) -> None:
        """This writes a model whose own weights were trained.

        Args:
            trained: State dicts of the trained components, by name.
            path: The file, or the folder, which need not exist.
            metadata: Of the denoiser's file.
            layout: One of ``description.save_layouts``.
            parts: What else is written, as it was loaded: of the parts that the layout allows.
            dtype: Type to convert what was trained to; None: each tensor keeps its own.
        """
        ...

    def sampling_path(self, sampler: str, steps: int, resolution: Resolution) -> SamplingPath:
        """The way of a sampler, one of ``description.sampling.samplers``, in so many steps."""
        ...

    def attention_shape(self, resolution: Resolution) -> AttentionShape:
        """The softmax attention over a picture of this size that takes most of the time."""
        ...

    def skipping(self, denoiser: nn.Module, layers: Sequence[int]) -> Any:
        """A context manager inside which the blocks ``layers`` leave their input as it is (skip-layer guidance).

        Raises:
            ValueError: There is no such block, or none can be left out (``description.unskippable``).
        """
        ...


class ControlNetFamily(ModelFamily, Protocol):
    """A family whose denoiser a ControlNet can steer: its options name a script for ``control_net``."""

    def load_control_net(self, path: str | None, *, seed: int, device: Any, dtype: Any) -> nn.Module:
        """The ControlNet at ``path``, or one that begins as a copy of the denoiser; ``seed`` is the run's.

        Raises:
            ConfigError: It can't be used with this model. Nothing was read then.
        """
        ...

    def steer(self, denoiser: nn.Module, control_net: nn.Module) -> None:
        """From now on ``predict`` shows ``NoisedLatents.control`` to the ControlNet, which acts on the denoiser."""
        ...

    def control_net_blocks(self, control_net: nn.Module) -> Sequence[nn.Module]:
        """Its repeated blocks in forward order: what checkpointing acts on."""
        ...

    def write_control_net(
        self, weights: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str], *, layout: str, dtype: Any
    ) -> None:
        """This writes a trained ControlNet.

        Args:
            weights: Its state dict.
            path: The file, or the folder.
            metadata: Of the weights' file.
            layout: One of ``library.config.control_net.SAVE_LAYOUTS``.
            dtype: Type to convert to; None: each tensor keeps its own.
        """
        ...
