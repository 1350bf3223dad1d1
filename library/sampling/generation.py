"""A checked run of generate.py: load, encode, walk, save. The text encoders leave memory before the denoiser comes."""

import gc
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from library.config.errors import ConfigError
from library.config.sampling import SkipLayerGuidance
from library.families import create_family
from library.families.protocols import ModelFamily
from library.families.stored_fp8 import stored_codes
from library.nn.attention import attention_function
from library.records import TensorRecord
from library.sampling.drawing import draw
from library.sampling.generate_command import GenerateRun
from library.sampling.pictures import encode_prompts
from library.sampling.previews import Previews, fit_latent_colours
from library.sampling.prompts import PromptText
from library.text_encoders.few_bits import encoder_formats, quantize_encoder
from networks.loading import adapter_components, layers_by_name, load_adapter, match_layers, read_adapter

log = logging.getLogger(__name__)

_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make_pictures(run: GenerateRun) -> list[Path]:
    """This makes every picture of the run and prints where each is.

    Args:
        run: What to do.

    Returns:
        The files, in order.

    Raises:
        ConfigError: The device, an adapter or a block number is wrong.
    """
    options = run.generate
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.mixed_precision, device)
    family: ModelFamily = create_family(run.family_name, run)
    changed = {path: adapter_components(path, family.adapter_targets) for path in options.network_weights}
    for name, warning in family.description.precision_warnings.items():
        if dtype == _DTYPES[name]:
            log.warning(warning)
    for guess in run.guesses:
        log.warning(guess)
    attention_function(run.memory.attention_backend)
    _check_adapters(options.network_weights, family)

    texts = _encode(run, family, changed, device, dtype)
    denoiser = family.load_denoiser(device=device, dtype=dtype)
    _put_adapters(run, family, changed, {"denoiser": denoiser})
    vae = family.load_vae(device=device, dtype=torch.float32 if options.no_half_vae else dtype)
    skip = SkipLayerGuidance.of(options)

    every = options.preview_every
    previews = None if every is None else Previews(fit_latent_colours(family.latents, vae), every)
    facts = {"model": Path(str(run.model.pretrained_model_name_or_path)).name} | _adapter_facts(run)
    start = options.output_name or time.strftime("%Y%m%d-%H%M%S")
    files = []
    with tqdm(total=sum(request.steps for request in run.requests), unit="step") as bar:

        def advance(step: int, x_0: Tensor) -> None:
            bar.update()

        for number, request in enumerate(run.requests):
            path = Path(options.output_dir) / f"{start}_{number:03d}_{request.file_stem}.png"
            draw(
                family,
                denoiser,
                vae,
                texts,
                request,
                path,
                device=device,
                dtype=dtype,
                skip=skip,
                previews=previews,
                facts=facts,
                callback=advance,
            )
            bar.write(str(path))
            files.append(path)
    return files


def resolve_device(name: str) -> torch.device:
    """This turns ``--device`` into a device that is there; ``auto`` takes an accelerator if any.

    Raises:
        ConfigError: There is no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name} can't be used ({reason}); auto takes what is there") from None
    return device


def resolve_dtype(mixed_precision: str, device: torch.device) -> torch.dtype:
    """This turns ``--mixed_precision`` into a type that the device computes in.

    Raises:
        ConfigError: It doesn't.
    """
    if mixed_precision == "fp16" and device.type == "cpu":
        raise ConfigError("--mixed_precision fp16: CPUs have no fast fp16; use bf16, or no for fp32")
    if mixed_precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("--mixed_precision bf16: this GPU has no bf16; use fp16")
    return _DTYPES[mixed_precision]


def _encode(
    run: GenerateRun,
    family: ModelFamily,
    changed: Mapping[str, set[str]],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[PromptText, TensorRecord]:
    """The conditioning of every text; the encoders are gone afterwards."""
    encoders = _load_encoders(run, family, device, dtype)
    _put_adapters(run, family, changed, encoders)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        texts = encode_prompts(family.text_strategy(), encoders, run.requests)
    encoders.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return texts


def _load_encoders(
    run: GenerateRun, family: ModelFamily, device: torch.device, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """The text encoders on the device, those in fewer bits by way of the host."""
    formats = encoder_formats(run.memory, family.description.text_encoders)
    whole = [name for name in family.description.text_encoders if name not in formats]
    encoders = family.load_text_encoders(device=device, dtype=dtype, names=whole)
    for name, chosen in formats.items():
        (encoder,) = family.load_text_encoders(device="cpu", dtype=dtype, names=[name]).values()
        stored = stored_codes(family, name, encoder)
        log.info(quantize_encoder(name, encoder, chosen, stored, device, via="accelerator"))
        encoders[name] = encoder
    return encoders


def _put_adapters(
    run: GenerateRun, family: ModelFamily, changed: Mapping[str, set[str]], roots: Mapping[str, nn.Module]
) -> None:
    """Add each adapter's share of ``roots``; the layers that it wraps keep it alive."""
    for path, multiplier in zip(run.generate.network_weights, run.generate.multipliers):
        if changed[path] & set(roots):
            load_adapter(path, roots, family.adapter_targets, multiplier, partial=True)


def _check_adapters(paths: Sequence[str], family: ModelFamily) -> None:
    """Match the adapters with modules that have shapes and no weights.

    Raises:
        ConfigError: An adapter is for another model.
    """
    if not paths:
        return
    meta: dict[str, Any] = {"device": "meta", "dtype": torch.float32}
    roots = {"denoiser": family.load_denoiser(**meta), **family.load_text_encoders(**meta)}
    layers = layers_by_name(roots, family.adapter_targets)
    for path in paths:
        weights = read_adapter(path, family.adapter_targets)
        match_layers(weights, layers, roots, family.adapter_targets, path, partial=False)


def _adapter_facts(run: GenerateRun) -> dict[str, str]:
    options = run.generate
    pairs = zip(options.network_weights, options.multipliers)
    adapters = ", ".join(f"{Path(path).name} x {multiplier:g}" for path, multiplier in pairs)
    return {"network": adapters} if adapters else {}
