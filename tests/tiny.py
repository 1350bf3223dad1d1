"""Sizes of the models that tests train."""

import dataclasses

from tools.miniature_sana import SanaSizes
from tools.miniature_sd import SdSizes
from tools.miniature_sd3 import Sd3Sizes

TINY_SD3 = Sd3Sizes(
    depth=3,
    width=64,
    dual_attention_blocks=(0,),
    pos_embed_max_size=16,
    clip_l_width=64,
    clip_g_width=128,
    clip_depth=2,
    t5_width=256,
    t5_heads=2,
    t5_hidden=96,
    t5_depth=1,
    vae_widths=(32, 32, 64, 64),
)

TINY_SANA = SanaSizes(
    depth=3,
    width=64,
    gemma_width=64,
    gemma_depth=1,
    gemma_hidden=96,
    vae_widths=(8, 8, 16, 32, 32, 32),
)

TINY_SD = SdSizes(
    width=32,
    multipliers=(1, 1, 2, 2),
    clip_width=64,
    clip_depth=2,
    vae_widths=(32, 32, 64, 64),
)

TINY_SD2 = dataclasses.replace(TINY_SD, is_v2=True, width=64)  # a head is 64 wide
