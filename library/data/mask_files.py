"""Which file a picture's loss mask comes from: one of its own, or the picture's, whose transparency it then is."""

from typing import NamedTuple

from library.config.dataset import SubsetConfig
from library.records import Sample


class MaskFile(NamedTuple):
    """The file with the loss mask of a picture.

    Attributes:
        path: The file.
        content: Hash of its bytes.
        alpha: Whether the mask is the picture's own transparency.
    """

    path: str
    content: str
    alpha: bool

    @classmethod
    def of(cls, sample: Sample, subset: SubsetConfig) -> "MaskFile | None":
        """The mask of a sample; a file of its own goes before transparency. None: it has none."""
        if sample.mask is not None:
            return cls(sample.mask, sample.mask_content, alpha=False)
        return cls(sample.path, sample.content, alpha=True) if subset.alpha_mask else None
