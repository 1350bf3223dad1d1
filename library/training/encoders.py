"""The text encoders and the VAE: they encode what can be cached, then leave memory before the denoiser is loaded."""

import functools
import gc
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from library.config.run import RunConfig
from library.data.cache_keys import text_key
from library.data.store import TensorStore
from library.families.protocols import ModelFamily, TextEncodingStrategy
from library.families.stored_fp8 import stored_codes
from library.records import TensorRecord
from library.sampling.prompts import PromptRequest, PromptText
from library.text_encoders.few_bits import encoder_formats, quantize_encoder
from library.training.data import (
    TrainingData,
    captions_of,
    fill_latents,
    fill_texts,
    latent_signature,
    open_store,
    text_signature,
)
from library.training.encoder_precision import precision_signature
from library.training.precision import Precision
from library.training.stored_fp8 import log_fp8
from networks.merge import merge

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextSide:
    """Where conditioning comes from during training.

    Attributes:
        encoders: By name, on the device; empty when everything is cached.
        store: Cached features; None when captions are encoded in the step.
        signature: Of the cached features.
        prompts: Features of the sample prompts; None when the encoders are there to encode them anew.
    """

    encoders: Mapping[str, nn.Module] = field(default_factory=dict)
    store: TensorStore | None = None
    signature: Mapping[str, str] = field(default_factory=dict)
    prompts: Mapping[PromptText, TensorRecord] | None = None


@dataclass(frozen=True)
class LatentSide:
    """Where latents come from during training.

    Attributes:
        vae: On the device when latents are encoded in the step, on the host when only samples need it, else None.
        store: Cached latents, or None.
        masks: Cached loss masks, or None.
        signature: Of the cached latents.
    """

    vae: nn.Module | None
    store: TensorStore | None = None
    masks: TensorStore | None = None
    signature: Mapping[str, str] = field(default_factory=dict)


def prepare_text(
    config: RunConfig,
    data: TrainingData,
    family: ModelFamily,
    text: TextEncodingStrategy,
    requests: Sequence[PromptRequest],
    precision: Precision,
    accelerator: Accelerator,
    *,
    trained: Mapping[str, torch.dtype] | None = None,
) -> TextSide:
    """Text encoders for the step; or, where caching was asked for, their outputs and no encoders.

    With caches they are loaded only when a caption or a prompt is missing there. Those in ``trained`` are kept in the
    type given there.
    """

    @functools.cache
    def encoders() -> dict[str, nn.Module]:
        return load_encoders(config, family, precision, accelerator.device, trained or {})

    if not config.caching.cache_text_encoder_outputs:
        return TextSide(encoders=encoders())
    store = open_store(config, "text", on_disk=config.caching.cache_text_encoder_outputs_to_disk)
    signature = cached_text_signature(config, text, precision.frozen)
    captions = sorted(captions_of(config, data.discovery))
    fill_texts(config, captions, store, text, encoders, signature, accelerator)
    stored: dict[PromptText, TensorRecord] = {}
    # Prompts apart: a batch's company moves the last bits, and samples must not change the training.
    for reader, prompts in prompt_readers(text, requests):
        own = cached_text_signature(config, reader, precision.frozen)
        fill_texts(config, [prompt.text for prompt in prompts], store, reader, encoders, own, accelerator)
        stored |= stored_prompts(store, reader, own, prompts)
    if encoders.cache_info().currsize:
        encoders.cache_clear()
        release_memory()
    return TextSide(store=store, signature=signature, prompts=stored)


def load_encoders(
    config: RunConfig,
    family: ModelFamily,
    precision: Precision,
    device: torch.device,
    trained: Mapping[str, torch.dtype],
) -> dict[str, nn.Module]:
    """The text encoders by name, on ``device``; those in ``trained`` in the type given there."""
    log.info("loading the text encoders")
    formats = encoder_formats(config.memory, family.description.text_encoders)
    loaded: dict[str, nn.Module] = {}
    for name in family.description.text_encoders:
        dtype = trained.get(name, precision.frozen)  # read in it, so that nothing is lost to a narrower type
        home = torch.device("cpu") if name in formats else device
        loaded |= family.load_text_encoders(device=home, dtype=dtype, names=[name])
        log_fp8(config, family, name, dtype, trained=name in trained)
    merge_base_weights(config, family, loaded)
    for name, chosen in formats.items():
        stored = stored_codes(family, name, loaded[name])
        log.info(quantize_encoder(name, loaded[name], chosen, stored, device, via=config.memory.quantize_via))
    return loaded


def prompt_readers(
    text: TextEncodingStrategy, requests: Sequence[PromptRequest]
) -> Iterator[tuple[TextEncodingStrategy, list[PromptText]]]:
    """The texts of sample pictures, with the strategy that reads them: prompts first, then negative prompts."""
    prompts = list(dict.fromkeys(prompt for request in requests for prompt in request.texts))
    for negative, reader in ((False, text), (True, text.for_negatives())):
        if chosen := [prompt for prompt in prompts if prompt.negative == negative]:
            yield reader, chosen


def cached_text_signature(config: RunConfig, text: TextEncodingStrategy, dtype: torch.dtype) -> dict[str, str]:
    """What stored text features depend on besides the caption; ``dtype`` is the encoders'."""
    return {**text_signature(text, dtype), **base_weights_signature(config), **precision_signature(config.memory)}


class LatentPreparation:
    """The VAE and the stores that it fills, until all pictures are encoded.

    With caches it is loaded only when a picture is missing there, or to keep it on the host for samples.
    """

    def __init__(self, config: RunConfig, family: ModelFamily, precision: Precision, accelerator: Accelerator):
        """This opens the stores, where caching was asked for, and loads nothing."""
        self._config, self._family, self._accelerator = config, family, accelerator
        self._dtype = torch.float32 if config.caching.no_half_vae else precision.frozen
        self._signature = latent_signature(family, self._dtype)
        self._store: TensorStore | None = None
        self._masks: TensorStore | None = None
        if config.caching.cache_latents:
            on_disk = config.caching.cache_latents_to_disk
            self._store, self._masks = (open_store(config, name, on_disk=on_disk) for name in ("latents", "masks"))
        self._vae: nn.Module | None = None

    def fill(self, data: TrainingData) -> Mapping[str, str]:
        """This encodes what the stores lack of these pictures, where caching was asked for.

        Returns:
            The pictures and masks that can't be decoded, in all processes: content -> why.
        """
        if self._store is None or self._masks is None:
            return {}
        config, accelerator = self._config, self._accelerator
        return fill_latents(
            config, data, self._store, self._masks, self._family, self._on_the_device, self._signature, accelerator
        )

    def finish(self, *, keep: bool) -> LatentSide:
        """What remains for the training; ``keep`` keeps a VAE on the host where the step needs none."""
        if self._store is None:
            return LatentSide(self._on_the_device())
        vae, self._vae = self._vae, None
        kept = None
        if keep:
            kept = self._family.load_vae(device="cpu", dtype=self._dtype) if vae is None else vae.to("cpu")
        if vae is not None:
            del vae
            release_memory()
        return LatentSide(kept, self._store, self._masks, self._signature)

    def _on_the_device(self) -> nn.Module:
        if self._vae is None:
            log.info("loading the VAE")
            self._vae = self._family.load_vae(device=self._accelerator.device, dtype=self._dtype)
        return self._vae


def stored_prompts(
    store: TensorStore, text: TextEncodingStrategy, signature: Mapping[str, str], prompts: Sequence[PromptText]
) -> dict[PromptText, TensorRecord]:
    """Features of sample prompts from the store, a row each; the empty prompt is unconditional, as in training."""
    stored = {prompt: text.unpack([store.read(text_key(prompt.text, signature))]) for prompt in prompts}
    if (empty := PromptText("")) in stored:
        stored[empty] = text.drop(stored[empty], torch.ones(1, dtype=torch.bool))
    return stored


def merge_base_weights(config: RunConfig, family: ModelFamily, components: Mapping[str, nn.Module]) -> None:
    """Merge what ``--base_weights`` have for these components into them."""
    if config.network is None or not config.network.base_weights:
        return
    files, multipliers = config.network.base_weights, config.network.base_weights_multipliers
    layers = merge(components, family.adapter_targets, files, multipliers, partial=True)
    if layers:
        log.info("merged %s into %d layers of %s", ", ".join(files), layers, ", ".join(components))


def base_weights_signature(config: RunConfig) -> dict[str, str]:
    """What ``--base_weights`` add to the identity of the text encoders; nothing without them."""
    if config.network is None or not config.network.base_weights:
        return {}
    digest = hashlib.blake2b(digest_size=16)
    for path, multiplier in zip(config.network.base_weights, config.network.base_weights_multipliers):
        digest.update(f"{multiplier!r}\n".encode() + Path(path).read_bytes())
    return {"base_weights": digest.hexdigest()}


def release_memory() -> None:
    """Give back what nothing refers to any more, on the host and on the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
