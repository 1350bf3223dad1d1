"""Captions to Stable Diffusion 3's conditioning: two CLIPs side by side, T5 after them.

Shapes:
    B captions, T tokens of T5
    L and G widths of CLIP-L and CLIP-G, D width of T5 and of the denoiser's context (at least L + G)
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from library.families.sd3.options import Sd3Options
from library.families.sd3.tokenizers import Sd3Tokenizers, load_tokenizers
from library.records import TensorRecord
from library.text_encoders.clip import encode_clip
from library.text_encoders.t5 import encode_t5
from library.text_encoders.tokenizers import CLIP_LENGTH, CaptionTokenizer, TokenizerPlaces


@dataclass(frozen=True)
class Sd3Tokens(TensorRecord):
    """Token ids, int64, and which of them are the caption's, bool. T5's are None without a T5.

    Attributes:
        clip_l: (B, 77), padded with the end token.
        clip_g: (B, 77), padded with id 0.
        clip_l_mask: (B, 77).
        clip_g_mask: (B, 77).
        t5: (B, T).
        t5_mask: (B, T).
    """

    clip_l: Tensor
    clip_g: Tensor
    clip_l_mask: Tensor
    clip_g_mask: Tensor
    t5: Tensor | None = None
    t5_mask: Tensor | None = None


@dataclass(frozen=True)
class Sd3Text(TensorRecord):
    """The conditioning in parts, as it is stored.

    Attributes:
        clip: Features of CLIP-L, then of CLIP-G (B, 77, L + G).
        pooled: Pooled features of both (B, L + G).
        t5: Features of T5 (B, T, D); None without a T5.
        positions: First row and column of each picture's window into the position table (B, 2), int64, on the CPU;
            None: the middle. Training draws them, no store holds them.
    """

    clip: Tensor
    pooled: Tensor
    t5: Tensor | None = None
    positions: Tensor | None = None

    def context(self, width: int) -> Tensor:
        """What the denoiser attends to (B, 77 + T, ``width``), where 77 zero tokens stand in for an absent T5.

        Raises:
            ValueError: The encoders are too wide for the denoiser.
        """
        if self.clip.shape[-1] > width or (self.t5 is not None and self.t5.shape[-1] != width):
            widths = f"{self.clip.shape[-1]} of CLIP" + ("" if self.t5 is None else f" and {self.t5.shape[-1]} of T5")
            raise ValueError(f"text features of widths {widths} don't fit the denoiser's context of {width}")
        clip = F.pad(self.clip, (0, width - self.clip.shape[-1]))
        t5 = clip.new_zeros(len(clip), CLIP_LENGTH, width) if self.t5 is None else self.t5
        return torch.cat([clip, t5], dim=1)


@dataclass(frozen=True)
class Sd3TextStrategy:
    """Captions to ``Sd3Text``. It holds tokenizers and settings, no encoders, so it pickles into workers.

    Attributes:
        clip_l: CLIP-L's tokenizer.
        clip_g: CLIP-G's tokenizer.
        t5: T5's tokenizer; None: there is no T5.
        options: Masks, padding, and what an absent caption means.
        identities: Name of each encoder -> identity of its weights.
    """

    clip_l: CaptionTokenizer
    clip_g: CaptionTokenizer
    t5: CaptionTokenizer | None
    options: Sd3Options
    identities: Mapping[str, str]

    def signature(self) -> Mapping[str, str]:
        """Every setting that changes the stored features.

        What acts on them later is left out: dropout and what an absent caption means. So is the type that the encoders
        compute in, which whoever loads them knows.
        """
        clips = {
            "features": "sd3 text 1",
            "clip_l": self.identities["clip_l"],
            "clip_g": self.identities["clip_g"],
            "clip_l_tokenizer": self.clip_l.identity(),
            "clip_g_tokenizer": self.clip_g.identity(),
            "apply_lg_attn_mask": str(self.options.apply_lg_attn_mask),
        }
        if self.t5 is None:
            return clips
        return clips | {
            "t5xxl": self.identities["t5xxl"],
            "t5xxl_tokenizer": self.t5.identity(),
            "apply_t5_attn_mask": str(self.options.apply_t5_attn_mask),
            "t5_padding": self.options.t5_padding,
        }

    def windows(self) -> Mapping[str, CaptionTokenizer]:
        """The tokenizers by the name of their encoder, for reports of what is cut."""
        return Sd3Tokenizers(self.clip_l, self.clip_g, self.t5).windows()

    def tokenize(self, captions: Sequence[str]) -> Sd3Tokens:
        """Token ids of the captions, padded, on the CPU."""
        clip_l, clip_l_mask = self.clip_l(captions)
        clip_g, clip_g_mask = self.clip_g(captions)
        t5, t5_mask = (None, None) if self.t5 is None else self.t5(captions)
        return Sd3Tokens(clip_l, clip_g, clip_l_mask, clip_g_mask, t5, t5_mask)

    def encode(self, encoders: Mapping[str, Any], tokens: TensorRecord) -> Sd3Text:
        """Text features, on the encoders' device.

        The masks act here, in the encoders' self-attention, whether the features are stored or not.

        Args:
            encoders: ``clip_l``, ``clip_g`` and, unless there is no T5, ``t5xxl``.
            tokens: From ``tokenize``.
        """
        assert isinstance(tokens, Sd3Tokens)
        masked = self.options.apply_lg_attn_mask
        clip_l, pooled_l = encode_clip(encoders["clip_l"], tokens.clip_l, tokens.clip_l_mask if masked else None)
        clip_g, pooled_g = encode_clip(encoders["clip_g"], tokens.clip_g, tokens.clip_g_mask if masked else None)
        return Sd3Text(
            clip=torch.cat([clip_l, clip_g], dim=-1),
            pooled=torch.cat([pooled_l, pooled_g], dim=-1),
            t5=None if tokens.t5 is None else self._t5_features(encoders["t5xxl"], tokens.t5, tokens.t5_mask),
        )

    def record(self) -> type[Sd3Text]:
        """The class of what ``encode`` returns."""
        return Sd3Text

    def pack(self, text: TensorRecord, row: int) -> dict[str, Tensor]:
        """What a store keeps of one row; with ``--t5_padding zero`` T5's zeros after the caption are left out."""
        stored = {name: tensor[row] for name, tensor in text.tensors().items()}
        if "t5" in stored and self.options.t5_padding == "zero":
            stored["t5"] = _without_zeros_at_the_end(stored["t5"])
        return stored

    def unpack(self, rows: Sequence[Mapping[str, Tensor]]) -> Sd3Text:
        """The batch of packed rows, bit for bit what ``encode`` gave."""
        if self.t5 is None or self.options.t5_padding != "zero":
            return Sd3Text.stack(rows)
        packed = [row["t5"] for row in rows]
        t5 = packed[0].new_zeros(len(rows), self.t5.length, packed[0].shape[-1])
        for padded, tokens in zip(t5, packed):
            padded[: len(tokens)] = tokens
        clips = Sd3Text.stack([{name: tensor for name, tensor in row.items() if name != "t5"} for row in rows])
        return dataclasses.replace(clips, t5=t5)

    def drop(self, text: TensorRecord, dropped: Tensor) -> Sd3Text:
        """The features with the rows in ``dropped`` (B,) made unconditional.

        Those rows hold the encoded empty caption. With ``--sd3_clip_uncond_behaviour zero`` their CLIP features and
        pooled vector become zeros, with ``--sd3_t5_uncond_behaviour zero`` their T5 features do. It serves dropped
        captions in training and empty prompts in samples alike.
        """
        assert isinstance(text, Sd3Text)
        dropped = dropped.to(text.clip.device, non_blocking=True)
        if self.options.sd3_clip_uncond_behaviour == "zero":
            text = dataclasses.replace(text, clip=_zeroed(text.clip, dropped), pooled=_zeroed(text.pooled, dropped))
        if self.options.sd3_t5_uncond_behaviour == "zero" and text.t5 is not None:
            text = dataclasses.replace(text, t5=_zeroed(text.t5, dropped))
        return text

    def for_negatives(self) -> "Sd3TextStrategy":
        """The same: a negative prompt is read like a caption."""
        return self

    def _t5_features(self, encoder: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        features = encode_t5(encoder, ids, mask if self.options.apply_t5_attn_mask else None)
        if self.options.t5_padding == "zero":
            # Filled, not multiplied: -1 * 0 is -0, and what is left out of the store comes back as +0.
            features = features.masked_fill(~mask.to(features.device)[:, :, None], 0)
        return features


def sd3_text_strategy(
    places: TokenizerPlaces, options: Sd3Options, identities: Mapping[str, str], *, has_t5: bool
) -> Sd3TextStrategy:
    """This finds and loads the tokenizers.

    Args:
        places: Where to look.
        options: Settings of the family.
        identities: Name of each encoder -> identity of its weights.
        has_t5: Whether there is a T5.

    Raises:
        ConfigError: A tokenizer is nowhere, or unreadable.
    """
    tokenizers = load_tokenizers(places, options, has_t5=has_t5)
    return Sd3TextStrategy(*tokenizers, options=options, identities=identities)


def drop_encoders(text: Sd3Text, *, clip_l_width: int, clip_l: Tensor, clip_g: Tensor, t5: Tensor) -> Sd3Text:
    """This silences single encoders in single rows: their share of the features and of the pooled vector is zeros.

    Args:
        text: The conditioning.
        clip_l_width: L, where CLIP-G's share begins.
        clip_l: Rows without CLIP-L (B,), bool.
        clip_g: Rows without CLIP-G (B,), bool.
        t5: Rows without T5 (B,), bool.
    """
    shares = [(slice(None, clip_l_width), clip_l), (slice(clip_l_width, None), clip_g)]

    def without(features: Tensor) -> Tensor:
        return torch.cat(
            [_zeroed(features[..., share], rows.to(features.device, non_blocking=True)) for share, rows in shares],
            dim=-1,
        )

    return dataclasses.replace(
        text,
        clip=without(text.clip),
        pooled=without(text.pooled),
        t5=None if text.t5 is None else _zeroed(text.t5, t5.to(text.t5.device, non_blocking=True)),
    )


def _without_zeros_at_the_end(tokens: Tensor) -> Tensor:
    """The tokens (T, D) up to the last one that has a bit set."""
    (used,) = tokens.contiguous().view(torch.uint8).any(dim=-1).nonzero(as_tuple=True)
    return tokens[: int(used[-1]) + 1 if len(used) else 0]


def _zeroed(features: Tensor, rows: Tensor) -> Tensor:
    return features.masked_fill(rows.view(-1, *[1] * (features.dim() - 1)), 0)
