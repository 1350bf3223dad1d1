"""The tables of sizes that the Sana models were trained on: names of ``bucket_table`` -> sizes, width first.

Published by Xie et al. 2024, "SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers",
arXiv:2410.10629, with its code. There an entry is named by its height divided by its width, rounded; we judge a picture
by the sizes themselves.
"""

import functools
import math

from library.config.pictures import BUCKET_TABLES
from library.records import Resolution

_ASPECT_1024 = (
    (512, 1856), (512, 1920), (512, 1984), (512, 2048), (576, 1664), (576, 1728), (576, 1792), (640, 1536),
    (640, 1600), (704, 1408), (704, 1472), (768, 1280), (768, 1344), (832, 1152), (832, 1216), (896, 1088),
    (896, 1152), (960, 1024), (960, 1088), (1024, 960), (1024, 1024), (1088, 896), (1088, 960), (1152, 832),
    (1152, 896), (1216, 832), (1280, 768), (1344, 704), (1344, 768), (1408, 704), (1472, 704), (1536, 640),
    (1600, 640), (1664, 576), (1728, 576), (1792, 576), (1856, 512), (1920, 512), (1984, 512), (2048, 512),
)  # fmt: skip
"""Also the tables for 256, 512, 2048 and 4096, whose sizes are these, scaled."""

_ASPECT_2880 = (
    (1408, 5184), (1408, 5376), (1408, 5568), (1408, 5760), (1600, 4672), (1600, 4800), (1600, 4992), (1792, 4288),
    (1792, 4480), (1920, 3904), (1920, 4096), (2112, 3584), (2112, 3840), (2304, 3200), (2304, 3392), (2496, 3008),
    (2496, 3200), (2688, 2880), (2688, 3008), (2880, 2688), (2880, 2880), (3008, 2496), (3008, 2688), (3200, 2304),
    (3200, 2496), (3392, 2304), (3584, 2112), (3776, 1920), (3840, 2112), (3904, 1920), (4096, 1920), (4288, 1792),
    (4480, 1792), (4672, 1600), (4800, 1600), (4992, 1600), (5184, 1408), (5376, 1408), (5568, 1408), (5760, 1408),
)  # fmt: skip


@functools.lru_cache(maxsize=16)
def table_resolutions(name: str) -> tuple[Resolution, ...]:
    """This lists the sizes of a published table, sorted.

    Args:
        name: One of ``library.config.pictures.BUCKET_TABLES``.

    Raises:
        ValueError: There is no such table.
    """
    if name not in BUCKET_TABLES:
        raise ValueError(f"there is no bucket table {name}; there are {', '.join(BUCKET_TABLES)}")
    side = BUCKET_TABLES[name]
    if side == 2880:
        return tuple(Resolution(*size) for size in _ASPECT_2880)
    return tuple(Resolution(width * side // 1024, height * side // 1024) for width, height in _ASPECT_1024)


@functools.lru_cache(maxsize=16)
def table_step(name: str) -> int:
    """The largest number that all sides in a published table are multiples of."""
    return math.gcd(*(side for size in table_resolutions(name) for side in size))
