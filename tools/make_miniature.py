"""Make a tiny but complete model with random weights, for tests and for trying things out without a download.

python tools/make_miniature.py sd3 --output miniatures/sd3
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, from anywhere

from tools.miniature_parts import DTYPES
from tools.miniature_sana import make_sana
from tools.miniature_sd import VARIANTS, make_sd
from tools.miniature_sd3 import make_sd3

MAKERS: dict[str, Callable[..., Path]] = {"sd3": make_sd3, "sana": make_sana, "sd": make_sd}


def main(arguments: Sequence[str] | None = None) -> int:
    """This writes the miniature that the command line asks for, and says where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=sorted(MAKERS), help="Which model family.")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="Where to write; default: miniatures/<family>. Made if missing."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the weights; default: %(default)s.")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default="fp32", help="What the weights are stored as; default: %(default)s."
    )
    parser.add_argument(
        "--layout",
        choices=("single", "diffusers"),
        default="single",
        help="One file with all parts, as published (single), or a diffusers folder; default: %(default)s.",
    )
    parser.add_argument(
        "--variant",
        choices=VARIANTS,
        help="Of sd alone: Stable Diffusion 1.x (sd1, the default), 2.x (sd2), or a 2.x that predicts velocities "
        "(sd2-v).",
    )
    chosen = parser.parse_args(arguments)
    if chosen.variant is not None and chosen.family != "sd":
        parser.error(f"--variant does nothing for {chosen.family}: only sd has variants. Remove it")
    own = {} if chosen.variant is None else {"variant": chosen.variant}
    output = chosen.output or Path("miniatures") / chosen.family
    path = MAKERS[chosen.family](output, seed=chosen.seed, dtype=chosen.dtype, layout=chosen.layout, **own)
    print(f"--pretrained_model_name_or_path {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
