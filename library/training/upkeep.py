"""The cache on disk apart from training: filled ahead of a run, and what of it a run asks for."""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from library.config.errors import ConfigError
from library.config.run import RunConfig
from library.data.cache_keys import text_key
from library.families import create_family
from library.families.protocols import ModelFamily
from library.training.data import TrainingData, captions_of, find_data, latent_items, latent_signature
from library.training.encoders import LatentPreparation, cached_text_signature, prepare_text, prompt_readers
from library.training.precision import resolve_precision
from library.training.prepare_data import prepare_data
from library.training.resume_from import RunIsComplete, agree_on_resumed
from library.training.setup import has_accelerator, make_folder, resolve_seed, sample_requests, start_accelerator


@dataclass(frozen=True)
class Filling:
    """How the cache of a run was filled.

    Attributes:
        seconds: Spent per store, the time to load its encoder included; only the stores that the run keeps on disk.
        speaks: Whether this process is the one that says so.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    speaks: bool = True

    @contextmanager
    def timed(self, store: str) -> Iterator[None]:
        """Adds the time that is spent inside."""
        start = time.perf_counter()
        yield
        self.seconds[store] = self.seconds.get(store, 0) + time.perf_counter() - start


def fill_cache(config: RunConfig) -> Filling:
    """This encodes what the cache on disk lacks for a run, and stops; every process that was started does its share.

    Raises:
        ConfigError: The run keeps nothing on disk, or training would stop at the same.
    """
    latents, texts = config.caching.cache_latents_to_disk, config.caching.cache_text_encoder_outputs_to_disk
    if not (latents or texts):
        raise ConfigError(
            "nothing would be kept: add --cache_latents_to_disk, --cache_text_encoder_outputs_to_disk, or both"
        )
    family: ModelFamily = create_family(config.family_name, config)
    precision = resolve_precision(config, accelerator_available=has_accelerator())
    accelerator = start_accelerator(config, precision)
    try:
        resumed = agree_on_resumed(config, accelerator)
    except RunIsComplete:
        resumed = None  # its pictures may be wanted again all the same
    seed = resolve_seed(config, resumed, accelerator)
    make_folder("cache_dir", config.local_cache_dir)
    text, requests = family.text_strategy(), sample_requests(config, family, seed)
    preparation = LatentPreparation(config, family, precision, accelerator)
    filling = Filling(speaks=accelerator.is_main_process)

    def fill(data: TrainingData) -> Mapping[str, str]:
        if not latents:
            return {}
        with filling.timed("latents"):
            return preparation.fill(data)

    data = prepare_data(
        config, family, text, resumed, accelerator, seed=seed, foresee=lambda data, report: (), fill=fill
    ).data
    if latents:
        preparation.finish(keep=False)
    if texts:
        with filling.timed("text"):
            prepare_text(config, data, family, text, requests, precision, accelerator)
    return filling


def used_entries(config: RunConfig) -> dict[str, set[str]]:
    """The keys of what a run may ask the cache on disk for, by store; no model is loaded.

    It errs towards more: another seed may hold out other pictures, another machine may compute in another type.

    Raises:
        ConfigError: The data or the model's files aren't there, or aren't right.
    """
    family: ModelFamily = create_family(config.family_name, config)
    seed = config.training.seed or 0
    shape, largest_side = family.latents.format, family.description.largest_side
    data = find_data(config, seed, resolution_step=shape.resolution_step, largest_side=largest_side)
    found, used = data.discovery, {"latents": set[str](), "masks": set[str](), "text": set[str]()}
    everything = dataclasses.replace(found, samples=found.samples + found.validation)
    everywhere = TrainingData(everything, data.placements + data.validation_placements, data.validation_placements)
    for dtype in _types(config):
        if config.caching.cache_latents_to_disk:
            vae_type = torch.float32 if config.caching.no_half_vae else dtype
            for item in latent_items(config, everywhere, family, latent_signature(family, vae_type)):
                used["latents"].add(item.key)
                used["masks"].add(item.mask_key)
        if config.caching.cache_text_encoder_outputs_to_disk:
            text = family.text_strategy()
            signature = cached_text_signature(config, text, dtype)
            used["text"].update(text_key(caption, signature) for caption in captions_of(config, everything))
            for reader, prompts in prompt_readers(text, sample_requests(config, family, seed)):
                signature = cached_text_signature(config, reader, dtype)
                used["text"].update(text_key(prompt.text, signature) for prompt in prompts)
    return used


def _types(config: RunConfig) -> set[torch.dtype]:
    """What the encoders compute in, with and without an accelerator."""
    return {resolve_precision(config, accelerator_available=available).frozen for available in (False, True)}
