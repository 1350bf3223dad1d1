"""One picture from a request to its file, with previews on the way."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from library.config.sampling import SkipLayerGuidance
from library.diffusion.samplers import Callback
from library.families.protocols import ModelFamily
from library.records import TensorRecord
from library.sampling.pictures import describe, generate, save_picture
from library.sampling.previews import Previews, preview_path
from library.sampling.prompts import PromptRequest, PromptText


def draw(
    family: ModelFamily,
    denoiser: nn.Module,
    vae: nn.Module,
    texts: Mapping[PromptText, TensorRecord],
    request: PromptRequest,
    path: Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    skip: SkipLayerGuidance | None,
    previews: Previews | None,
    facts: Mapping[str, str | int | float],
    callback: Callback | None = None,
) -> None:
    """This makes a picture and writes it, with its settings inside.

    Args:
        family: See ``generate``, as for all that isn't said here.
        denoiser: See there.
        vae: See there.
        texts: See there.
        request: See there.
        path: Where the picture belongs.
        device: See there.
        dtype: See there.
        skip: See there.
        previews: Writes unfinished pictures beside ``path``, which the finished one replaces; None: none are written.
        facts: What else to write into the files: model, adapter.
        callback: See there.
    """
    sampler = request.sampler or family.description.sampling.sampler
    watchers = [] if callback is None else [callback]
    if previews is not None:
        settings = {**describe(request, sampler=sampler, skip=skip), **facts}
        watchers.append(previews.writer(request, path, settings))

    def watch(step: int, x_0: Tensor) -> None:
        for watcher in watchers:
            watcher(step, x_0)

    image, settings = generate(
        family, denoiser, vae, texts, request, sampler=sampler, device=device, dtype=dtype, skip=skip, callback=watch
    )
    save_picture(image, path, {**settings, **facts})
    preview_path(path).unlink(missing_ok=True)
