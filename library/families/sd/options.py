"""What a person can choose for Stable Diffusion 1.x and 2.x alone, and what they can't."""

from dataclasses import dataclass

from library.config.ddpm import DdpmConfig, DdpmPictureConfig
from library.config.loss import LossConfig
from library.config.options import option
from library.config.picture_groups import DdpmGenerateConfig, DdpmSamplingConfig
from library.records import LatentFormat

TOKEN_LENGTHS = ("75", "150", "225")


@dataclass(frozen=True, kw_only=True)
class SdOptions:
    """Stable Diffusion 1.x and 2.x."""

    v2: bool | None = option(
        None,
        "The base model is Stable Diffusion 2.x. By default the files say it; against them it is an error.",
        metadata_key="ss_v2",
    )
    clip_skip: int | None = option(
        None,
        "Take the text encoder's n-th layer from the end, followed by its last norm; 2 is usual for anime models. By "
        "default the last. The layer at the end of 2.x that the model was trained without doesn't count.",
        minimum=1,
        maximum=23,
        metadata_key="ss_clip_skip",
    )
    max_token_length: str = option(
        "75",
        "Tokens of a caption that are read, beside start and end: in chunks of 75, each encoded by itself.",
        choices=TOKEN_LENGTHS,
        parse=str,
        metadata_key="ss_max_token_length",
    )
    weighted_captions: bool = option(
        False,
        "Read (words:1.2), (words) and [words] in captions and prompts as weights of their tokens' features; a "
        "backslash before a bracket makes it a plain one.",
        metadata_key="ss_weighted_captions",
    )

    @property
    def idle_options(self) -> tuple[str, ...]:
        """Switches that are off, so that saved files don't mention them."""
        return tuple(name for name in ("v2", "weighted_captions") if getattr(self, name) is False)


OPTIONS = SdOptions
OBJECTIVE_GROUPS = {"ddpm": DdpmConfig, "loss": LossConfig}
SAMPLING, GENERATE_GROUPS = DdpmSamplingConfig, {"ddpm": DdpmPictureConfig, "generate": DdpmGenerateConfig}
SCRIPTS = {"adapter": "train_network", "full": "train", "control_net": "train_control_net"}
"""What is trained (``library.config.run.JOBS``) -> the script that trains it."""
TITLE = "Stable Diffusion 1.x / 2.x"
LATENTS = LatentFormat(channels=4, stride=8, patch=8, scale=0.18215, shift=0.0)
RESOLUTION_STEP = LATENTS.resolution_step
TRAINING_ONLY = ()
"""Options that do nothing where pictures are made and nothing is trained."""

_FLOW = "it is for models that learn a flow, and this one learns to remove noise"
_ONE_ENCODER = "this model has one text encoder, CLIP, which lies in the base model. Remove it"
_ENCODER_DROPOUT = "this model has one text encoder. Use --caption_dropout_rate, or remove it"
_PADDING = "this model was trained with its text encoder looking at the padding, and has no other way. Remove it"
_TOKEN_LENGTH = "use --max_token_length 150 or 225 for longer captions, or remove it"
_UNCONDITIONAL = "a dropped caption is always the encoded empty caption, as the model was trained. Remove it"
_NO_TABLE = "this model has no table of positions. Remove it"
_SANA = "it is for Sana"

UNSUPPORTED: dict[str, str] = {
    "weighting_scheme": f"{_FLOW}. Use --min_snr_gamma or --debiased_estimation_loss, or remove it",
    "timestep_sampling": f"{_FLOW}. Use --min_timestep and --max_timestep, or remove it",
    "logit_mean": f"{_FLOW}. Remove it",
    "logit_std": f"{_FLOW}. Remove it",
    "mode_scale": f"{_FLOW}. Remove it",
    "sigmoid_scale": f"{_FLOW}. Remove it",
    "training_shift": f"{_FLOW}. Remove it",
    "flow_schedule_shift": f"{_FLOW}. Remove it",
    "flow_schedule_auto_shift": f"{_FLOW}. Remove it",
    "flow_use_uniform_schedule": f"{_FLOW}. Remove it",
    "snr_gamma": "use --min_snr_gamma, which is its name here",
    "clip_l": _ONE_ENCODER,
    "clip_g": _ONE_ENCODER,
    "t5xxl": _ONE_ENCODER,
    "gemma": _ONE_ENCODER,
    "t5xxl_max_token_length": _TOKEN_LENGTH,
    "text_encoder_3_max_length": _TOKEN_LENGTH,
    "tokenizer_max_length": _TOKEN_LENGTH,
    "sana_max_token_length": _TOKEN_LENGTH,
    "t5xxl_device": _ONE_ENCODER,
    "t5xxl_dtype": _ONE_ENCODER,
    "t5_padding": _PADDING,
    "apply_lg_attn_mask": _PADDING,
    "apply_t5_attn_mask": _PADDING,
    "clip_l_dropout_rate": _ENCODER_DROPOUT,
    "clip_g_dropout_rate": _ENCODER_DROPOUT,
    "t5_dropout_rate": _ENCODER_DROPOUT,
    "sd3_clip_uncond_behaviour": _UNCONDITIONAL,
    "sd3_t5_uncond_behaviour": _UNCONDITIONAL,
    "pos_emb_random_crop_rate": _NO_TABLE,
    "enable_scaled_pos_embed": _NO_TABLE,
    "save_clip": "a full fine-tune writes the text encoder too by --save_parts text_encoders. Remove it",
    "save_t5xxl": "this model has no T5. Remove it",
    "sana_image_size": f"{_SANA}. Use resolution in the dataset TOML, or remove it",
    "sana_prompt_prefix": f"{_SANA}. Use caption_prefix in the dataset TOML, or remove it",
    # of kohya's scripts for the whole model
    "stop_text_encoder_training": "a text encoder learns in every step or in none. Use --text_encoder_lr, or remove it",
    "no_token_padding": "captions are always padded, as the model was trained. Remove it",
    "diffusers_xformers": "use --xformers, or remove it",
    "use_safetensors": "files are safetensors unless --save_model_as says otherwise. Remove it",
    "sana_lower_case": "CLIP's tokenizer lower-cases every caption by itself. Remove it",
}
"""Option of other trainers or families -> the end of ``--name does nothing for sd: ...``."""
