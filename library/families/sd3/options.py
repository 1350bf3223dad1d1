"""What a person can choose for Stable Diffusion 3 / 3.5 alone, and what they can't."""

from dataclasses import dataclass

from library.config.flow import FlowConfig
from library.config.loss import LossConfig
from library.config.options import option
from library.config.picture_groups import FlowGenerateConfig, FlowSamplingConfig
from library.records import LatentFormat


@dataclass(frozen=True, kw_only=True)
class Sd3Options:
    """Stable Diffusion 3."""

    clip_l: str | None = option(
        None,
        "CLIP-L text encoder: a safetensors file or a diffusers sub-folder. It replaces the one inside the checkpoint, "
        "which is used by default.",
        metavar="PATH",
    )
    clip_g: str | None = option(
        None,
        "CLIP-G (OpenCLIP bigG) text encoder: a safetensors file or a diffusers sub-folder. It replaces the one inside "
        "the checkpoint, which is used by default.",
        metavar="PATH",
    )
    t5xxl: str | None = option(
        None,
        "T5-XXL text encoder: a safetensors file or a diffusers sub-folder. It replaces the one inside the checkpoint, "
        "which is used by default. With neither, 77 zero tokens stand in for T5's features.",
        metavar="PATH",
    )
    t5xxl_max_token_length: int = option(
        256,
        "Tokens that T5 reads per caption; longer captions are cut, shorter ones padded. SimpleTuner uses 154.",
        minimum=1,
        maximum=512,
        aliases=("tokenizer_max_length", "text_encoder_3_max_length"),
        metadata_key="ss_t5xxl_max_token_length",
    )
    apply_lg_attn_mask: bool = option(
        False,
        "Hide the padding from the self-attention inside CLIP-L and CLIP-G. By default padding is attended to, as in "
        "the model's own training. The denoiser sees all positions either way.",
        metadata_key="ss_apply_lg_attn_mask",
    )
    apply_t5_attn_mask: bool = option(
        False,
        "Hide the padding from the self-attention inside T5. By default padding is attended to, as in the model's own "
        "training. The denoiser sees all positions either way; see --t5_padding.",
        metadata_key="ss_apply_t5_attn_mask",
    )
    t5_padding: str = option(
        "unmodified",
        "What the denoiser gets at T5's padded positions: T5's features there (unmodified), or zeros (zero).",
        choices=("unmodified", "zero"),
        metadata_key="ss_t5_padding",
    )
    clip_l_dropout_rate: float = option(
        0.0,
        "Probability per sample and step, in training only, that CLIP-L's features and pooled vector are zeros.",
        minimum=0.0,
        maximum=1.0,
        metadata_key="ss_clip_l_dropout_rate",
    )
    clip_g_dropout_rate: float = option(
        0.0,
        "Probability per sample and step, in training only, that CLIP-G's features and pooled vector are zeros.",
        minimum=0.0,
        maximum=1.0,
        metadata_key="ss_clip_g_dropout_rate",
    )
    t5_dropout_rate: float = option(
        0.0,
        "Probability per sample and step, in training only, that T5's features are zeros.",
        minimum=0.0,
        maximum=1.0,
        metadata_key="ss_t5_dropout_rate",
    )
    sd3_clip_uncond_behaviour: str = option(
        "empty_string",
        "What CLIP says where there is no caption, in caption dropout and for a sample's empty negative prompt: the "
        "encoded empty caption (empty_string), or zeros (zero).",
        choices=("empty_string", "zero"),
        metadata_key="ss_sd3_clip_uncond_behaviour",
    )
    sd3_t5_uncond_behaviour: str = option(
        "empty_string",
        "What T5 says where there is no caption, in caption dropout and for a sample's empty negative prompt: the "
        "encoded empty caption (empty_string), or zeros (zero).",
        choices=("empty_string", "zero"),
        metadata_key="ss_sd3_t5_uncond_behaviour",
    )
    pos_emb_random_crop_rate: float = option(
        0.0,
        "Probability per sample and step, in training only, that the window into the table of positions lies at a "
        "random place instead of the centre.",
        minimum=0.0,
        maximum=1.0,
        metadata_key="ss_pos_emb_random_crop_rate",
    )
    enable_scaled_pos_embed: bool = option(
        False,
        "Compute the table of positions for the training resolutions instead of cropping the checkpoint's: at each of "
        "them a picture spans the same positions, 0 to 16. Pictures must then be drawn with this option too.",
        metadata_key="ss_enable_scaled_pos_embed",
    )


OPTIONS = Sd3Options
OBJECTIVE_GROUPS = {"flow": FlowConfig, "loss": LossConfig}
SAMPLING, GENERATE_GROUPS = FlowSamplingConfig, {"generate": FlowGenerateConfig}
SCRIPTS = {"adapter": "sd3_train_network", "full": "sd3_train"}
"""What is trained (``library.config.run.JOBS``) -> the script that trains it."""
TITLE = "Stable Diffusion 3 / 3.5"
LATENTS = LatentFormat(channels=16, stride=8, patch=2, scale=1.5305, shift=0.0609)
RESOLUTION_STEP = LATENTS.resolution_step
TRAINING_ONLY = ("clip_l_dropout_rate", "clip_g_dropout_rate", "t5_dropout_rate", "pos_emb_random_crop_rate")
"""Options that do nothing where pictures are made and nothing is trained."""

_NOISE = "SD3's flow matching mixes the picture with plain Gaussian noise. Remove it"
_DIFFUSION_WEIGHT = (
    "it weights the losses of noise-prediction models, and SD3 predicts a velocity. Use --weighting_scheme or remove it"
)
_SAVED_ENCODERS = "a full fine-tune writes the text encoders too by --save_parts text_encoders. Remove it"

UNSUPPORTED: dict[str, str] = {
    "v2": "it switches the older trainers to Stable Diffusion 2. Remove it",
    "v_parameterization": "SD3 always predicts the velocity of its flow. Remove it",
    "clip_skip": "SD3 always takes CLIP's penultimate layer. Remove it",
    "max_token_length": "CLIP always reads 77 tokens here. Use --t5xxl_max_token_length, or remove it",
    "weighted_captions": "SD3's encoders have no rule for (word:1.2). Remove it, and the brackets from the captions",
    "noise_offset": _NOISE,
    "noise_offset_random_strength": _NOISE,
    "adaptive_noise_scale": _NOISE,
    "multires_noise_iterations": _NOISE,
    "multires_noise_discount": _NOISE,
    "ip_noise_gamma": _NOISE,
    "ip_noise_gamma_random_strength": _NOISE,
    "zero_terminal_snr": "SD3's schedule ends in pure noise already. Remove it",
    "min_snr_gamma": _DIFFUSION_WEIGHT,
    "debiased_estimation_loss": _DIFFUSION_WEIGHT,
    "scale_v_pred_loss_like_noise_pred": _DIFFUSION_WEIGHT,
    "v_pred_like_loss": _DIFFUSION_WEIGHT,
    "t5xxl_device": "the encoders run where the training runs. Use --cache_text_encoder_outputs to free their memory",
    "t5xxl_dtype": "T5 runs in the type of --mixed_precision. Remove it",
    "save_clip": _SAVED_ENCODERS,
    "save_t5xxl": _SAVED_ENCODERS,
    "gemma": "SD3 has no Gemma: CLIP and T5 read the captions. Remove it",
    "sana_image_size": "it is for Sana. Use resolution in the dataset TOML, or remove it",
    "sana_prompt_prefix": "it is for Sana. Use caption_prefix in the dataset TOML, or remove it",
    "sana_lower_case": "CLIP's tokenizers lower-case by themselves, and T5 tells capitals apart. Remove it",
    "sana_max_token_length": "use --t5xxl_max_token_length, or remove it",
}
"""Option of other trainers or families -> the end of ``--name does nothing for sd3: ...``."""
