"""The codes of files in fp8, for whoever keeps them."""

from torch import nn

from library.families.protocols import ModelFamily
from library.memory.quantization import CodesAndScales, Stored


def stored_codes(family: ModelFamily, component: str, root: nn.Module) -> Stored:
    """What the files have in fp8 of a layer of ``root``, which was loaded from them as ``component``."""
    matrices = family.stored_fp8(component)
    names = {id(layer): f"{name}.weight" for name, layer in root.named_modules()}

    def stored(layer: nn.Module) -> CodesAndScales | None:
        name = names[id(layer)]
        return CodesAndScales(*matrices[name]) if name in matrices else None

    return stored
