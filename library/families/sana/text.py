"""Captions to Sana's conditioning: Gemma's features of the caption, read after an instruction.

Shapes:
    B captions, W tokens that Gemma reads, T tokens that the denoiser sees, D width of Gemma
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from library.families.sana.tokenizers import SanaTokenizer
from library.records import TensorRecord
from library.text_encoders.gemma import encode_gemma


@dataclass(frozen=True)
class SanaTokens(TensorRecord):
    """Token ids and which of them are text.

    Attributes:
        ids: (B, W), int64, padded at the end.
        mask: (B, W), bool.
    """

    ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class SanaText(TensorRecord):
    """The conditioning, as it is stored.

    Attributes:
        context: Gemma's features (B, T, D); zeros where there is no text, which the denoiser doesn't see.
        mask: Where there is text (B, T), bool: from the first position on, without a gap.
    """

    context: Tensor
    mask: Tensor


@dataclass(frozen=True)
class SanaTextStrategy:
    """Captions to ``SanaText``. It holds the tokenizer, no encoder, so it pickles into workers.

    Attributes:
        tokenizer: With prefix and window.
        gemma: Identity of the encoder's weights.
    """

    tokenizer: SanaTokenizer
    gemma: str

    def signature(self) -> Mapping[str, str]:
        """Every setting that changes the stored features, save the type that the encoder computes in."""
        return {"features": "sana text 1", "gemma": self.gemma, "tokenizer": self.tokenizer.identity()}

    def windows(self) -> Mapping[str, SanaTokenizer]:
        """The tokenizer by the name of its encoder, for reports of what is cut."""
        return {"Gemma": self.tokenizer}

    def tokenize(self, captions: Sequence[str]) -> SanaTokens:
        """Token ids of prefixes and captions, padded, on the CPU."""
        return SanaTokens(*self.tokenizer(captions))

    def encode(self, encoders: Mapping[str, Any], tokens: TensorRecord) -> SanaText:
        """Text features, on the encoder's device.

        Gemma reads from left to right: what stands before a caption acts on it, and padding on nothing, so that the
        padding that all captions have is not even read.

        Args:
            encoders: ``gemma``.
            tokens: From ``tokenize``.
        """
        assert isinstance(tokens, SanaTokens)
        longest = int(tokens.mask.sum(dim=1).max())
        ids, mask = tokens.ids[:, :longest], tokens.mask[:, :longest]
        features = _window(encode_gemma(encoders["gemma"], ids, mask), self.tokenizer.skipped)
        mask = _window(mask.to(features.device), self.tokenizer.skipped)
        missing = self.tokenizer.length - mask.shape[1]
        # Filled, not multiplied: -1 * 0 is -0, and what is left out of the store comes back as +0.
        context = features.masked_fill(~mask[:, :, None], 0)
        return SanaText(F.pad(context, (0, 0, 0, missing)), F.pad(mask, (0, missing)))

    def record(self) -> type[SanaText]:
        """The class of what ``encode`` returns."""
        return SanaText

    def pack(self, text: TensorRecord, row: int) -> dict[str, Tensor]:
        """What a store keeps of one row: the features of its text."""
        assert isinstance(text, SanaText)
        return {"context": text.context[row, : int(text.mask[row].sum())]}

    def unpack(self, rows: Sequence[Mapping[str, Tensor]]) -> SanaText:
        """The batch of packed rows, bit for bit what ``encode`` gave."""
        packed = [row["context"] for row in rows]
        context = packed[0].new_zeros(len(rows), self.tokenizer.length, packed[0].shape[-1])
        for padded, tokens in zip(context, packed):
            padded[: len(tokens)] = tokens
        lengths = torch.tensor([len(tokens) for tokens in packed])
        mask = torch.arange(self.tokenizer.length) < lengths[:, None]  # (B, T)
        return SanaText(context, mask.to(context.device))

    def drop(self, text: TensorRecord, dropped: Tensor) -> SanaText:
        """The features as they are: dropped rows hold the encoded empty caption already, the start token alone."""
        assert isinstance(text, SanaText)
        return text

    def for_negatives(self) -> "SanaTextStrategy":
        """The strategy without the instruction, which asks Gemma for something to show."""
        return SanaTextStrategy(self.tokenizer.without_prefix(), self.gemma)


def _window(positions: Tensor, skipped: int) -> Tensor:
    """The first position and those after the ``skipped`` ones: (B, W, ...) -> (B, T, ...)."""
    return torch.cat([positions[:, :1], positions[:, skipped + 1 :]], dim=1)
