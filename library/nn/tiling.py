"""Decoding large latents in overlapping tiles that fade into each other, so that memory depends on the tile alone."""

from collections.abc import Callable

import torch
from torch import Tensor


def decode_in_tiles(
    decode: Callable[[Tensor], Tensor], latents: Tensor, *, stride: int, tile: int, overlap: int
) -> Tensor:
    """This decodes tile by tile. Latents that are no larger than a tile are decoded at once.

    Tiles of one size cover the latents evenly. Where two overlap, the outer quarter of each, which lacks its
    neighbours, is not used; over the half between, one fades into the other.

    Args:
        decode: Latents (B, C, h, w) to pictures (B, c, h stride, w stride).
        latents: (B, C, h, w).
        stride: Pixels per latent position, on each side.
        tile: Sides of a tile, in latent positions.
        overlap: How far tiles reach into each other, in latent positions; at least, and below ``tile``.

    Returns:
        Pictures (B, c, h stride, w stride), in the type that ``decode`` answers with.

    Raises:
        ValueError: The overlap isn't smaller than the tile.
    """
    if not 0 < overlap < tile:
        raise ValueError(f"tiles of {tile} can't overlap by {overlap}; the overlap must be from 1 to {tile - 1}")
    height, width = latents.shape[2:]
    if height <= tile and width <= tile:
        return decode(latents)
    rows, columns = _starts(height, tile, overlap), _starts(width, tile, overlap)
    total: Tensor | None = None
    weights = torch.zeros(1, 1, height * stride, width * stride, device=latents.device)
    for top in rows:
        for left in columns:
            part = decode(latents[:, :, top : top + tile, left : left + tile])
            if total is None:
                shape = (*part.shape[:2], height * stride, width * stride)
                total = torch.zeros(shape, device=part.device)
            down = _fade(top, height, tile, overlap, stride, part.device)
            across = _fade(left, width, tile, overlap, stride, part.device)
            weight = down[:, None] * across
            place = (
                ...,
                slice(top * stride, top * stride + part.shape[2]),
                slice(left * stride, left * stride + part.shape[3]),
            )
            total[place] += part.float() * weight
            weights[place] += weight
    assert total is not None
    return (total / weights).to(part.dtype)


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles begin along one side."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _fade(start: int, length: int, tile: int, overlap: int, stride: int, device: torch.device) -> Tensor:
    """Weights of a tile's pixels along one side: 1 inside and at the picture's edge, falling to 0 at a neighbour."""
    tile = min(tile, length)
    pixel = (torch.arange(tile * stride, device=device, dtype=torch.float32) + 0.5) / stride
    unused, fading = overlap / 4, overlap / 2
    weight = torch.ones_like(pixel)
    if start > 0:
        weight = torch.minimum(weight, (pixel - unused) / fading)
    if start + tile < length:
        weight = torch.minimum(weight, (tile - pixel - unused) / fading)
    return weight.clamp(min=0)
