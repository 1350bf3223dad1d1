"""What a person can choose for Sana and Sana-1.5 alone, and what they can't."""

from dataclasses import dataclass
from typing import ClassVar

from library.config.flow import FlowConfig
from library.config.loss import LossConfig
from library.config.options import option, redeclared
from library.config.picture_groups import FlowGenerateConfig, FlowSamplingConfig
from library.records import LatentFormat

IMAGE_SIZES = ("512", "1024", "2048", "4096")
NO_PREFIX = "none"


@dataclass(frozen=True, kw_only=True)
class SanaOptions:
    """Sana."""

    gemma: str | None = option(
        None,
        "Gemma 2 2b it, the text encoder: a safetensors file, a folder, or an index of shards. It replaces the one "
        "inside the base model, which is used by default.",
        metavar="PATH",
    )
    sana_image_size: str | None = option(
        None,
        "Side in pixels of the pictures that the weights were made for: it decides the positions (from 2048 on), the "
        "shift and the size of samples. By default what the file or folder says, or 1024 where it says nothing.",
        choices=IMAGE_SIZES,
        parse=str,
        metadata_key="ss_sana_image_size",
    )
    sana_prompt_prefix: str | None = option(
        None,
        "Text that Gemma reads before every caption: a UTF-8 text file, or none. By default the eight lines of "
        'instruction ("complex human instruction") that the published weights were trained with. Empty captions have '
        "none.",
        metavar="FILE|none",
    )
    sana_lower_case: bool = option(
        False,
        "Lower-case every caption. By default captions stay as they are, as in the model's own training. diffusers' "
        "pipeline lower-cases all prompts, so turn it on where a trigger word has capitals and diffusers draws.",
        metadata_key="ss_sana_lower_case",
    )
    sana_max_token_length: int = option(
        300,
        "Tokens per caption that the denoiser sees, the start token among them and the instruction not; longer "
        "captions are cut.",
        minimum=2,
        maximum=2048,
        aliases=("tokenizer_max_length",),
        metadata_key="ss_sana_max_token_length",
    )


@dataclass(frozen=True, kw_only=True)
class SanaFlowConfig(FlowConfig):
    """Noise levels (flow matching)."""

    own_density: ClassVar[str] = "logit_normal"

    weighting_scheme: str = redeclared(FlowConfig, "weighting_scheme", "sigma_sqrt")
    timestep_sampling: str | None = redeclared(
        FlowConfig,
        "timestep_sampling",
        None,
        "Density that noise levels are drawn from, before the shift. sigmoid: sigmoid(sigmoid_scale * normal). By "
        "default what --weighting_scheme implies: mode its own, all others logit_normal, as published. Levels are then "
        "those of a table of 1000, as published.",
    )
    training_shift: float | None = redeclared(
        FlowConfig,
        "training_shift",
        None,
        "Shift k of the noise levels, s' = k s / (1 + (k - 1) s): above 1 trains composition, below 1 fine detail, and "
        "1 shifts nothing. By default as published: 3; for the 0.6B at 1024 px 4; for the 4096 px model 6.",
    )
    flow_schedule_auto_shift: bool = redeclared(
        FlowConfig,
        "flow_schedule_auto_shift",
        False,
        "Takes the shift from each picture's number of tokens instead of --training_shift: 1.65 at 512 px and 1.88 at "
        "1024 px for Sana; above 4096 tokens it grows with the square root of their number. By default the shift is "
        "the same for all sizes.",
    )


OPTIONS = SanaOptions
OBJECTIVE_GROUPS = {"flow": SanaFlowConfig, "loss": LossConfig}
SAMPLING, GENERATE_GROUPS = FlowSamplingConfig, {"generate": FlowGenerateConfig}
SCRIPTS = {"adapter": "sana_train_network", "full": "sana_train"}
"""What is trained (``library.config.run.JOBS``) -> the script that trains it."""
TITLE = "Sana / Sana-1.5"
LATENTS = LatentFormat(channels=32, stride=32, patch=1, scale=0.41407, shift=0.0)
RESOLUTION_STEP = LATENTS.resolution_step
TRAINING_ONLY: tuple[str, ...] = ()
"""Options that do nothing where pictures are made and nothing is trained."""

_NOISE = "Sana's flow matching mixes the picture with plain Gaussian noise. Remove it"
_DIFFUSION_WEIGHT = (
    "it weights the losses of noise-prediction models, and Sana predicts a velocity. Use --weighting_scheme, or "
    "remove it"
)
_NO_CLIP = "Sana has no CLIP and no T5: Gemma reads the captions. Remove it"
_NO_TABLE = "Sana has no table of positions up to 1024 pixels, and computes it for any size above. Remove it"

UNSUPPORTED: dict[str, str] = {
    "v2": "it switches the older trainers to Stable Diffusion 2. Remove it",
    "v_parameterization": "Sana always predicts the velocity of its flow. Remove it",
    "clip_skip": "Sana has no CLIP, and always takes Gemma's last layer. Remove it",
    "max_token_length": "use --sana_max_token_length, or remove it",
    "weighted_captions": "Gemma has no rule for (word:1.2). Remove it, and the brackets from the captions",
    "clip_l": _NO_CLIP,
    "clip_g": _NO_CLIP,
    "t5xxl": _NO_CLIP,
    "t5xxl_max_token_length": "Gemma takes T5's place. Use --sana_max_token_length, or remove it",
    "text_encoder_3_max_length": "Gemma takes T5's place. Use --sana_max_token_length, or remove it",
    "t5xxl_device": _NO_CLIP,
    "t5xxl_dtype": _NO_CLIP,
    "t5_padding": "padding never reaches Sana's denoiser. Remove it",
    "apply_lg_attn_mask": _NO_CLIP,
    "apply_t5_attn_mask": "Gemma never sees padding. Remove it",
    "clip_l_dropout_rate": _NO_CLIP,
    "clip_g_dropout_rate": _NO_CLIP,
    "sd3_clip_uncond_behaviour": _NO_CLIP,
    "sd3_t5_uncond_behaviour": _NO_CLIP,
    "t5_dropout_rate": "Sana has one text encoder. Use --caption_dropout_rate, or remove it",
    "pos_emb_random_crop_rate": _NO_TABLE,
    "enable_scaled_pos_embed": _NO_TABLE,
    "save_clip": _NO_CLIP,
    "save_t5xxl": _NO_CLIP,
    "noise_offset": _NOISE,
    "noise_offset_random_strength": _NOISE,
    "adaptive_noise_scale": _NOISE,
    "multires_noise_iterations": _NOISE,
    "multires_noise_discount": _NOISE,
    "ip_noise_gamma": _NOISE,
    "ip_noise_gamma_random_strength": _NOISE,
    "zero_terminal_snr": "Sana's schedule ends in nearly pure noise already. Remove it",
    "min_snr_gamma": _DIFFUSION_WEIGHT,
    "debiased_estimation_loss": _DIFFUSION_WEIGHT,
    "scale_v_pred_loss_like_noise_pred": _DIFFUSION_WEIGHT,
    "v_pred_like_loss": _DIFFUSION_WEIGHT,
}
"""Option of other trainers or families -> the end of ``--name does nothing for sana: ...``."""
