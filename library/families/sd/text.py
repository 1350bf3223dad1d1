"""Captions to the conditioning of Stable Diffusion 1.x and 2.x: CLIP's features of every token.

Shapes:
    B captions, M chunks of 77 ids, T = 75 M + 2 tokens that the denoiser sees, D width of the encoder
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from library.families.sd.tokenizers import SdTokenizer
from library.records import TensorRecord
from library.text_encoders.clip import encode_clip_layer


@dataclass(frozen=True)
class SdTokens(TensorRecord):
    """Token ids.

    Attributes:
        ids: (B, M, 77), int64; each chunk has its own start and end.
        weights: Of the tokens (B, T), fp32; None: all 1.
    """

    ids: Tensor
    weights: Tensor | None = None


@dataclass(frozen=True)
class SdText(TensorRecord):
    """The conditioning, as it is stored.

    Attributes:
        context: CLIP's features (B, T, D).
    """

    context: Tensor


@dataclass(frozen=True)
class SdTextStrategy:
    """Captions to ``SdText``. It holds the tokenizer, no encoder, so it pickles into workers.

    Attributes:
        tokenizer: With its chunks.
        layer: Which layer's features are taken, counted from the first, which is 1.
        clip: Identity of the encoder's weights.
    """

    tokenizer: SdTokenizer
    layer: int
    clip: str

    def signature(self) -> Mapping[str, str]:
        """Every setting that changes the stored features, save the type that the encoder computes in."""
        return {
            "features": "sd text 2",
            "clip": self.clip,
            "tokenizer": self.tokenizer.identity(),
            "layer": str(self.layer),
        }

    def windows(self) -> Mapping[str, SdTokenizer]:
        """The tokenizer by the name of its encoder, for reports of what is cut."""
        return {"CLIP": self.tokenizer}

    def tokenize(self, captions: Sequence[str]) -> SdTokens:
        """Token ids of the captions, in chunks, on the CPU."""
        return SdTokens(*self.tokenizer(captions))

    def encode(self, encoders: Mapping[str, Any], tokens: TensorRecord) -> SdText:
        """Text features, on the encoder's device.

        Each chunk is read by itself. The first start token stays, and the last chunk's last position.

        Args:
            encoders: ``clip``.
            tokens: From ``tokenize``.
        """
        assert isinstance(tokens, SdTokens)
        chunks = tokens.ids.shape[1]
        features = encode_clip_layer(encoders["clip"], rearrange(tokens.ids, "b m n -> (b m) n"), self.layer)
        features = rearrange(features, "(b m) n d -> b m n d", m=chunks)
        inside = rearrange(features[:, :, 1:-1], "b m n d -> b (m n) d")
        context = torch.cat([features[:, 0, :1], inside, features[:, -1, -1:]], dim=1)
        if tokens.weights is not None:
            context = context * tokens.weights.to(context.device, context.dtype, non_blocking=True)[:, :, None]
        return SdText(context)

    def record(self) -> type[SdText]:
        """The class of what ``encode`` returns."""
        return SdText

    def pack(self, text: TensorRecord, row: int) -> dict[str, Tensor]:
        """What a store keeps of one row."""
        assert isinstance(text, SdText)
        return {"context": text.context[row]}

    def unpack(self, rows: Sequence[Mapping[str, Tensor]]) -> SdText:
        """The batch of packed rows, bit for bit what ``encode`` gave."""
        return SdText(torch.stack([row["context"] for row in rows]))

    def drop(self, text: TensorRecord, dropped: Tensor) -> SdText:
        """The features as they are: dropped rows hold the encoded empty caption already."""
        assert isinstance(text, SdText)
        return text

    def for_negatives(self) -> "SdTextStrategy":
        """The same: a negative prompt is read like a caption."""
        return self
