"""What the log says of files in fp8."""

import logging

import torch

from library.config.run import RunConfig
from library.families.protocols import ModelFamily
from library.io.fp8_matrices import Fp8Matrices
from library.training.full_model import DENOISER

log = logging.getLogger(__name__)


def log_fp8(config: RunConfig, family: ModelFamily, component: str, dtype: torch.dtype, *, trained: bool) -> None:
    """Say what becomes of the matrices that the files hold in fp8, if any.

    Args:
        config: The run.
        family: The model's parts.
        component: The one that was loaded.
        dtype: Of its weights.
        trained: Whether it is among what is trained; its own weights are in a full fine-tune only.
    """
    matrices = family.stored_fp8(component)
    if not matrices:
        return
    told, width = _contents(component, matrices), str(dtype).removeprefix("torch.")
    if trained and config.full is not None:
        log.warning(
            "%s. They are trained from there in %s: what fp8 rounded away, some 3 %% of each number, is not in the "
            "file. Better start from the fp16 or bf16 file, if there is one",
            told,
            width,
        )
        return
    option, chosen = "base_model_precision", config.memory.base_format
    if component != DENOISER:
        number = family.description.text_encoders.index(component) + 1
        option, chosen = f"text_encoder_{number}_precision", config.memory.encoder_formats.get(number)
    if chosen is None:
        log.info("%s. They become %s; --%s fp8 keeps them as they are", told, width, option)
    elif chosen == "fp8":
        log.info("%s. Those of the blocks stay as they are, others become %s", told, width)
    else:
        log.info("%s. Those of the blocks are rounded again, to %s", told, chosen)


def _contents(component: str, matrices: Fp8Matrices) -> str:
    part = matrices.part
    scaled = len(part.scales)
    told = f"{component}: {part.title} holds {len(matrices)} matrices in fp8"
    told += f", {scaled} of its weights with a scale" if scaled else ", without scales"
    return told + (f" ({len(part.unused)} scales of activations are left out)" if part.unused else "")
