"""Pictures from prompts: encode the texts, walk from noise to latents, decode, save."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from library.config.errors import ConfigError
from library.config.sampling import SkipLayerGuidance
from library.data.images import open_picture
from library.diffusion.samplers import Callback
from library.families.protocols import ModelFamily, SamplingPath, TextEncodingStrategy
from library.io.atomic import atomic_path
from library.randomness import torch_generator
from library.records import Resolution, TensorRecord
from library.sampling.prompts import PromptRequest, PromptText

Settings = Mapping[str, str | int | float]


@torch.no_grad()
def encode_prompts(
    strategy: TextEncodingStrategy, encoders: Mapping[str, nn.Module], requests: Sequence[PromptRequest]
) -> dict[PromptText, TensorRecord]:
    """This encodes every distinct text of the requests, one after another.

    The empty text is the unconditional one: it goes through the strategy's ``drop``, as a dropped caption in training.

    Args:
        strategy: How captions become conditioning.
        encoders: The text encoders by name.
        requests: What to make.

    Returns:
        Per text a record with one row, on the CPU.
    """
    texts, for_negatives = {}, strategy.for_negatives()
    for asked in dict.fromkeys(text for request in requests for text in request.texts):
        reader = for_negatives if asked.negative else strategy
        record = reader.encode(encoders, reader.tokenize([asked.text]))
        if not asked.text:
            device = next(iter(record.tensors().values())).device
            record = strategy.drop(record, torch.ones(1, dtype=torch.bool, device=device))
        texts[asked] = record.to("cpu")
    return texts


@torch.no_grad()
def generate(
    family: ModelFamily,
    denoiser: nn.Module,
    vae: nn.Module,
    texts: Mapping[PromptText, TensorRecord],
    request: PromptRequest,
    *,
    sampler: str | None = None,
    device: torch.device | str,
    dtype: torch.dtype,
    skip: SkipLayerGuidance | None = None,
    callback: Callback | None = None,
) -> tuple[Image.Image, dict[str, str | int | float]]:
    """This makes one picture. All noise is drawn on the CPU, so a seed means the same picture on every device.

    Args:
        family: The model's parts.
        denoiser: On ``device``, in eval mode.
        vae: On ``device``; it decodes in its own dtype.
        texts: What ``encode_prompts`` gave.
        request: What to make.
        sampler: Used where the request names none; None: the model's own.
        device: Where to compute.
        dtype: What the denoiser computes in; the latents stay in fp32 from step to step.
        skip: Skip-layer guidance, or None.
        callback: Called after each step with its number and the estimate of x_0.

    Returns:
        The picture, and the settings that made it.
    """
    device = torch.device(device)
    latent_format = family.latents.format
    resolution = request.computed_at or request.resolution
    shape = (1, latent_format.channels, *latent_format.latent_size(resolution))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(request.seed)).to(device)  # (1, C, h, w)
    conditions = [texts[text].to(device, dtype) for text in request.texts]
    name = request.sampler or sampler or family.description.sampling.sampler
    path = family.sampling_path(name, request.steps, resolution)
    guided = _GuidedDenoiser(family, denoiser, conditions, request.scale, skip, path)
    if request.control is not None:
        guided.control = control_picture(request.control, resolution).to(device)

    def fresh(step: int) -> Tensor:
        return torch.randn(shape, generator=torch_generator(request.seed, "fresh noise", step))  # (1, C, h, w)

    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        latents = path.walk(guided, noise, fresh=fresh, callback=callback)
    if not latents.isfinite().all():
        raise ValueError(
            f"the latents of {request.prompt!r} (seed {request.seed}) are not finite in {dtype}; use bf16 or fp32"
        )
    vae_dtype = next(vae.parameters()).dtype
    with torch.autocast(device.type, enabled=False):
        pixels = family.latents.decode(vae, latents.to(vae_dtype))  # (1, 3, H, W)
    image = to_image(pixels[0])
    if request.computed_at is not None:  # cover the size that was asked for, and cut what is over evenly
        image = ImageOps.fit(image, request.resolution, Image.Resampling.LANCZOS)
    return image, describe(request, sampler=name, skip=skip)


class _GuidedDenoiser:
    """The denoiser's estimate of x_0 under classifier-free and skip-layer guidance."""

    def __init__(
        self,
        family: ModelFamily,
        denoiser: nn.Module,
        conditions: Sequence[TensorRecord],
        scale: float,
        skip: SkipLayerGuidance | None,
        path: SamplingPath,
    ):
        self.family, self.denoiser, self.scale, self.skip, self.path = family, denoiser, scale, skip, path
        self.positive = conditions[0]
        rows = [condition.rows(0).tensors() for condition in conditions]
        self.both = type(self.positive).stack(rows)  # the positive text, then the negative one if it acts
        self.levels = path.levels.tolist()
        self.control: Tensor | None = None

    def __call__(self, x: Tensor, level: float) -> Tensor:
        answers = self._answer(x.expand(len(self.both), -1, -1, -1), level, self.both).float()
        guided = answers[:1]
        if len(answers) == 2:
            guided = answers[1:] + self.scale * (answers[:1] - answers[1:])
        if self.skip is not None and self.skip.acts(self.levels.index(level), len(self.levels) - 1):
            with self.family.skipping(self.denoiser, self.skip.layers):
                without = self._answer(x, level, self.positive).float()
            guided = guided + self.skip.scale * (answers[:1] - without)
        return self.path.estimate(x, guided, level)

    def _answer(self, x: Tensor, level: float, text: TensorRecord) -> Tensor:
        asked = self.path.asked(x, level)
        if self.control is not None:
            asked = dataclasses.replace(asked, control=self.control.expand(len(x), -1, -1, -1))
        return self.family.predict(self.denoiser, asked, text)


def control_picture(path: str, resolution: Resolution) -> Tensor:
    """A control picture (1, 3, H, W) in 0..1: scaled to cover the picture's size, and cut evenly.

    Raises:
        ConfigError: It can't be read.
    """
    try:
        picture = ImageOps.fit(open_picture(path), resolution, Image.Resampling.LANCZOS)
    except OSError as error:
        raise ConfigError(f"the control picture {path} can't be read: {error.strerror or error}") from error
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255  # (H, W, 3) -> (1, 3, H, W)


def to_image(pixels: Tensor) -> Image.Image:
    """This rounds a picture (3, H, W) in -1..1 to 8 bits."""
    levels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())  # (H, W, 3)


def describe(request: PromptRequest, *, sampler: str, skip: SkipLayerGuidance | None) -> dict[str, str | int | float]:
    """The settings that make a picture, and nothing that had no effect on it."""
    settings: dict[str, Any] = dataclasses.asdict(request)
    settings["sampler"] = sampler
    del settings["computed_at"]
    if request.computed_at is not None:
        settings["computed_at"] = str(request.computed_at)
    if request.control is None:
        del settings["control"]
    if not request.name:
        del settings["name"]
    if request.scale == 1 or not request.negative_prompt:
        del settings["negative_prompt"]
    if skip is not None:
        settings["skip_layers"] = " ".join(map(str, skip.layers))
        settings["skip_layers_scale"] = skip.scale
        settings["skip_layers_start"], settings["skip_layers_stop"] = skip.start, skip.stop
    return settings


def save_picture(image: Image.Image, path: str | Path, settings: Settings) -> None:
    """This writes a PNG with its settings inside: as ``parameters``, which other programs read, and as JSON.

    Args:
        image: The picture.
        path: Where it belongs; it appears complete or not at all.
        settings: What ``generate`` gave, with whatever else is worth keeping (model, adapter).
    """
    texts = PngInfo()
    texts.add_text("parameters", parameters_text(settings))
    texts.add_text("atelier", json.dumps(dict(settings)))
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=texts)


_KNOWN_NAMES = {"steps": "Steps", "sampler": "Sampler", "scale": "CFG scale", "seed": "Seed", "size": "Size"}


def parameters_text(settings: Settings) -> str:
    """The settings in the form of AUTOMATIC1111's web interface: prompt, negative prompt, one line of the rest."""
    rest = {name: value for name, value in settings.items() if name not in ("prompt", "negative_prompt")}
    if "width" in rest and "height" in rest:
        rest["size"] = f"{rest.pop('width')}x{rest.pop('height')}"
    first = {name: rest.pop(name) for name in _KNOWN_NAMES if name in rest}
    named = {_KNOWN_NAMES[name]: value for name, value in first.items()}
    named |= {name.replace("_", " ").capitalize(): value for name, value in rest.items()}
    lines = [str(settings["prompt"])]
    if "negative_prompt" in settings:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in named.items()))
    return "\n".join(lines)


def _quoted(value: str | int | float) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text
