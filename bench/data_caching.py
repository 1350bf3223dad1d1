"""The caching pass with a VAE of random weights, a quarter as wide as SD3's, and that VAE alone."""

import dataclasses
import random
import time
from pathlib import Path
from tempfile import mkdtemp

import torch
from PIL import Image

from library.config.dataset import DatasetConfig, SubsetConfig
from library.data.buckets import place_all
from library.data.discovery import discover
from library.data.store import MemoryStore, PackedStore
from library.nn.autoencoder_kl import SD3_VAE, AutoencoderKL
from library.records import Resolution
from library.training.caching import cache_latents
from library.training.read_pictures import LatentItem

_STRIDE = 8
# the full width takes seconds per picture on a CPU, in which nothing else would show
_VAE = dataclasses.replace(SD3_VAE, level_widths=tuple(width // 4 for width in SD3_VAE.level_widths))


class OneProcess:
    """A run of one process."""

    process_index = 0
    num_processes = 1

    def wait_for_everyone(self) -> None:
        """There is nobody to wait for."""


class PictureFolder:
    """Pictures of twice the wanted size, found and placed, and the VAE that encodes them.

    Args:
        folder: Where the pictures and the store go.
        side: Pixels of the encoded pictures.
        count: How many there are.
    """

    def __init__(self, folder: Path, side: int, count: int):
        self._folder = Path(mkdtemp(dir=folder))
        pictures = self._folder / "pictures"
        pictures.mkdir()
        rng = random.Random(side)
        for number in range(count):
            small = Image.frombytes("RGB", (32, 32), rng.randbytes(32 * 32 * 3))
            small.resize((2 * side, 2 * side), Image.Resampling.BICUBIC).save(pictures / f"{number}.jpg", quality=92)
        subset = SubsetConfig(image_dir=str(pictures), class_tokens="a picture")
        dataset = DatasetConfig(resolution=Resolution(side, side), subsets=(subset,))
        samples = discover((dataset,)).samples
        placements = place_all(samples, (dataset,), 16)
        self._items = [
            LatentItem.of(sample, subset, placement, flipped=False, stride=_STRIDE, signature={})
            for sample, placement in zip(samples, placements)
        ]
        self._side, self._count = side, count
        torch.manual_seed(0)
        self._vae = AutoencoderKL(_VAE).eval()

    def vae_seconds(self) -> float:
        """The VAE alone, on pictures that are in memory."""
        pixels = torch.rand(1, 3, self._side, self._side) * 2 - 1
        self._encode(pixels)  # the first pass also sets memory up
        started = time.perf_counter()
        for _ in range(self._count):
            self._encode(pixels)
        return time.perf_counter() - started

    def cached_seconds(self) -> float:
        """The whole pass: read, decode, scale, encode, write."""
        started = time.perf_counter()
        with PackedStore(mkdtemp(dir=self._folder)) as store:
            cache_latents(store, MemoryStore(), self._items, self._encode, batch_size=1, accelerator=OneProcess())
        return time.perf_counter() - started

    @torch.no_grad()
    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        mean, _ = self._vae.encode(pixels)
        return mean
