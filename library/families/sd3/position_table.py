"""The tables that tell SD3's image tokens where they are.

The denoiser stores a large square table of 2-D sines and cosines and adds a window of it to its tokens: the middle one,
or in training any other, so that sizes beyond the training sizes find their edges trained. The scaled table is another
answer to the same need: its middle has the same values at every training resolution.

Shapes: B batch, h and w sides of the token grid, N = h w tokens, D channels (the denoiser's width).
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from einops import rearrange, repeat
from torch import Tensor

from library.nn.embeddings import sincos_1d
from library.records import Resolution

BASE_SIZE = 64
"""The stored table's positions run from 0 to this, however many rows it has: its sides at 1024 pixels."""

SCALED_BASE_SIZE = 16
"""The range of positions that a picture of native size covers in a scaled table."""

SCALED_MARGIN = 1.5
"""Sides of a scaled table over those of the square it is made for, so that wide and tall pictures fit."""


def sincos_table(size: int, channels: int) -> Tensor:
    """This makes the table that the published files store as ``pos_embed``.

    Args:
        size: Its rows and columns.
        channels: D, a multiple of 4.

    Returns:
        (1, size * size, D), fp32, row by row; the first half of the channels tells the column, the second the row.
    """
    position = torch.arange(size, dtype=torch.float32) / (size / BASE_SIZE)
    return _grid(position[None], position[None], channels)


def crop(table: Tensor, height: int, width: int, offsets: Tensor | None = None) -> Tensor:
    """This cuts windows of ``height`` x ``width`` tokens out of a square table.

    Args:
        table: (1, M * M, D).
        height: Rows of the window, in tokens.
        width: Columns of the window, in tokens.
        offsets: First row and column of the window of each sample (B, 2), integers; None: the middle.

    Returns:
        (1, N, D) without offsets, else (B, N, D).

    Raises:
        ValueError: The window is larger than the table, or reaches beyond its edge.
    """
    size = math.isqrt(table.shape[1])
    _check_window(size, height, width, offsets)
    grid = table.view(size, size, -1)
    if offsets is None:
        top, left = centre_offset(size, height, width)
        return grid[top : top + height, left : left + width].reshape(1, height * width, -1)
    rows, columns = _window(height, width, offsets.to(table.device, non_blocking=True))
    return rearrange(grid[rows[:, :, None], columns[:, None, :]], "b h w d -> b (h w) d")


def centre_offset(size: int, height: int, width: int) -> tuple[int, int]:
    """This is the first row and column of the middle window of a table with ``size`` rows."""
    return (size - height) // 2, (size - width) // 2


def random_offsets(uniform: Tensor, size: int, height: int, width: int) -> Tensor:
    """This turns random numbers into windows; all windows that fit are equally likely.

    Args:
        uniform: Two numbers per sample (B, 2), from the open interval (0, 1).
        size: Rows and columns of the table.
        height: Rows of the window, in tokens.
        width: Columns of the window, in tokens.

    Returns:
        First row and column (B, 2), int64.
    """
    _check_window(size, height, width, None)
    choices = torch.tensor([size - height + 1, size - width + 1], device=uniform.device)
    return (uniform.double() * choices).long().minimum(choices - 1)


def token_side(resolution: Resolution, step: int) -> int:
    """This is the side of the square token grid with the area of ``resolution``, at ``step`` pixels per token."""
    return round(math.sqrt(resolution.area)) // step


def scaled_side(sides: Sequence[int], height: int, width: int) -> int:
    """This chooses the training resolution whose scaled table a picture uses.

    Args:
        sides: ``token_side`` of every training resolution.
        height: Rows of the picture, in tokens.
        width: Columns of the picture, in tokens.

    Returns:
        The side of the nearest resolution by area (between two, the border is the mean of their areas). A picture too
        tall or wide for that table gets one made for its longer side.
    """
    ordered = sorted(set(sides))
    borders = [(smaller**2 + larger**2) // 2 for smaller, larger in pairwise(ordered)]
    side = next((side for side, border in zip(ordered, borders) if height * width <= border), ordered[-1])
    return side if max(height, width) <= scaled_size(side) else max(height, width)


def scaled_size(side: int) -> int:
    """This is how many rows and columns the scaled table for ``side`` has: the limit of offsets into it."""
    return int(side * SCALED_MARGIN)


def scaled_table(
    sides: Sequence[int],
    height: int,
    width: int,
    channels: int,
    *,
    offsets: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """This makes a window of the scaled table (sd-scripts' ``--enable_scaled_pos_embed``).

    Only the window is computed, so there is nothing to keep between steps.

    Args:
        sides: ``token_side`` of every training resolution.
        height: Rows of the window, in tokens.
        width: Columns of the window, in tokens.
        channels: D, a multiple of 4.
        offsets: First row and column of each sample's window (B, 2) in the table of ``scaled_size(scaled_side(...))``
            rows; None: the middle.
        device: Where to make it.

    Returns:
        (1, N, D) without offsets, else (B, N, D), fp32.

    Raises:
        ValueError: A window reaches beyond the table's edge.
    """
    side = scaled_side(sides, height, width)
    size = scaled_size(side)
    _check_window(size, height, width, offsets)
    if offsets is None:
        offsets = torch.tensor([centre_offset(size, height, width)])
    rows, columns = _window(height, width, offsets.to(device, non_blocking=True))
    first = (size - side) / 2
    unit = SCALED_BASE_SIZE / side
    return _grid((rows - first) * unit, (columns - first) * unit, channels)


def _window(height: int, width: int, offsets: Tensor) -> tuple[Tensor, Tensor]:
    rows = offsets[:, :1] + torch.arange(height, device=offsets.device)  # (B, h)
    columns = offsets[:, 1:] + torch.arange(width, device=offsets.device)  # (B, w)
    return rows, columns


def _grid(rows: Tensor, columns: Tensor, channels: int) -> Tensor:
    height, width = rows.shape[1], columns.shape[1]
    column_channels = repeat(sincos_1d(columns, channels // 2), "b w d -> b (h w) d", h=height)
    row_channels = repeat(sincos_1d(rows, channels // 2), "b h d -> b (h w) d", w=width)
    return torch.cat([column_channels, row_channels], dim=-1)  # (B, N, D)


def _check_window(size: int, height: int, width: int, offsets: Tensor | None) -> None:
    if max(height, width) > size:
        raise ValueError(
            f"{height}x{width} tokens do not fit into a position table of {size}x{size}; use smaller pictures"
        )
    if offsets is not None:
        last = torch.tensor([size - height, size - width], device=offsets.device)
        if (offsets < 0).any() or (offsets > last).any():
            raise ValueError(f"offsets {offsets.tolist()} are not between 0 and {last.tolist()}")
