"""Unfinished pictures, seen through a map from latents to colours that is fitted to the VAE.

A trained VAE's latents tell the mean colour of the pixels that they stand for nearly as an affine function. So the map
is the best affine one: least squares over pictures that the VAE itself encodes. Those are drawn, always the same ones:
discs that hide each other, whose radii fall with their cube, which have edges and statistics like those of photographs
(Lee, Mumford and Huang 2001, "Occlusion Models for Natural Images: A Statistical Study of a Scale-Invariant Dead Leaves
Model").
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch.nn import functional

from library.diffusion.samplers import Callback
from library.families.protocols import LatentCachingStrategy
from library.randomness import python_random
from library.sampling.pictures import save_picture, to_image
from library.sampling.prompts import PromptRequest

_PICTURES = 8
_POSITIONS = 16
"""Latent positions per side of a drawn picture: together some 2000 points for a map of at most a hundred numbers."""
_DISCS = 600
_SMALLEST, _LARGEST = 0.02, 0.4
"""Radius of a disc, as a part of the picture's side."""


@dataclass(frozen=True)
class LatentColours:
    """An affine map from normalised latents to the mean colour of the pixels that they stand for.

    Attributes:
        weights: (C, 3).
        offset: (3,).
    """

    weights: Tensor
    offset: Tensor

    def __call__(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, h, w), about -1..1, one pixel per position, of normalised latents (B, C, h, w)."""
        mixed = torch.einsum("bchw,cd->bdhw", latents.float(), self.weights.to(latents.device))
        return mixed + self.offset.to(latents.device).view(1, 3, 1, 1)


@torch.no_grad()
def fit_latent_colours(latents: LatentCachingStrategy, vae: nn.Module) -> LatentColours:
    """This fits the map to a VAE. The same VAE gives the same map.

    Args:
        latents: How pictures become latents.
        vae: It encodes where it is and in its own type.

    Raises:
        ValueError: Its latents are not finite.
    """
    stride, weight = latents.format.stride, next(vae.parameters())
    points, colours = [], []
    with torch.autocast(weight.device.type, enabled=False):
        for number in range(_PICTURES):
            pixels = drawn_picture(_POSITIONS * stride, number)  # (1, 3, H, W)
            raw = latents.encode(vae, pixels.to(weight.device, weight.dtype))
            points.append(latents.format.normalise(raw).double().cpu()[0].flatten(1).T)  # (h w, C)
            colours.append(functional.avg_pool2d(pixels, stride).double()[0].flatten(1).T)  # (h w, 3)
    known = torch.cat(points)
    if not known.isfinite().all():
        raise ValueError(f"the VAE's latents of plain pictures are not finite in {weight.dtype}; use --no_half_vae")
    known = torch.cat([known, torch.ones(len(known), 1, dtype=known.dtype)], dim=1)  # (N, C + 1)
    solution = torch.linalg.lstsq(known, torch.cat(colours), driver="gelsd").solution.float()  # (C + 1, 3)
    return LatentColours(solution[:-1], solution[-1])


def drawn_picture(side: int, number: int) -> Tensor:
    """A picture of discs that hide each other (1, 3, side, side), in -1..1.

    Args:
        side: Pixels.
        number: Every number gives another picture, always the same one.
    """
    rng = python_random("discs", number)

    def colour() -> tuple[int, ...]:
        brightness, strength = rng.uniform(0, 255), rng.choice((0.2, 1.0))
        return tuple(round(brightness + strength * (rng.uniform(0, 255) - brightness)) for _ in range(3))

    image = Image.new("RGB", (side, side), colour())
    draw = ImageDraw.Draw(image)
    for _ in range(_DISCS):  # the density of radii falls with their cube
        share = rng.random()
        radius = side * (share * _LARGEST**-2 + (1 - share) * _SMALLEST**-2) ** -0.5
        x, y = rng.uniform(0, side), rng.uniform(0, side)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour())
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, H, W)
    return (levels.float() / 127.5 - 1).unsqueeze(0)


def preview_path(path: Path) -> Path:
    """Where the previews of a picture lie, each in place of the one before, until the picture itself is there."""
    return path.with_name(f"{path.stem}_preview.png")


@dataclass(frozen=True)
class Previews:
    """Unfinished pictures, every so many steps.

    Attributes:
        colours: The fitted map.
        every: Steps.
    """

    colours: LatentColours
    every: int

    def writer(self, request: PromptRequest, path: Path, settings: Mapping[str, str | int | float]) -> Callback:
        """What a sampler calls after each step.

        Args:
            request: The picture.
            path: Where the finished picture will lie.
            settings: Of the picture; its previews hold them too.
        """

        def write(step: int, x_0: Tensor) -> None:
            done = step + 1
            if done % self.every == 0 and done < request.steps:
                image = to_image(self.colours(x_0)[0])
                image = ImageOps.fit(image, request.resolution, Image.Resampling.BICUBIC)
                save_picture(image, preview_path(path), {**settings, "steps_done": done})

        return write
