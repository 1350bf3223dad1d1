"""Tokenizers with small open vocabularies, made from a word list: any text has ids, common words have few."""

import functools
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from library.io.atomic import write_text

_WORD_LIST = """
a about above after against all alone an and animal apple around art arm as at autumn
baby background ball balloon banana beach bear beautiful bed behind below beside between bicycle big bird black blue
boat book bottle bottom bowl box boy bread bridge bright brown building bus butterfly
cake camera candle car castle cat chair child circle city close cloud coat coffee cold colour colours cross cup
dark day deep dog door down drawing dress duck
earth edge egg evening eye eyes
face field fire fish floor flower flowers fly food forest four fox from front fruit full
garden girl glass gold grass gray green ground group
hair half hand hands happy hat head heart high hill home horse house
ice illustration image in inside interior is island it
jar jumping
key kitchen
lake lamp landscape large leaf leaves left letter light lion little long look
man many map middle moon morning mountain mountains mouse
near next night nose
ocean of old on one open orange other out outside over
painting paper park pattern person photo photograph pink plain plant plate play portrait purple
quality quiet
rabbit rain red right ring river road rock room rose round
sand scene sea shadow shape sheep ship shirt shoe sign silver simple sitting sketch sky small smile smiling snow soft
square standing star stars stone street striped studio style summer sun sunset swimming
table tall texture the three tiger top toward tower town train tree trees triangle two
umbrella under up
vase very view village violet
walking wall warm watch water wave wearing white wide wind window winter with woman wood wooden
yellow young
zebra
"""
WORDS = _WORD_LIST.split()

_GEMMA_SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>")
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
_PUNCTUATION_AND_LETTERS = [chr(code) for code in range(0x21, 0x7F)]


def clip_vocabulary_size() -> int:
    """This is the number of rows that a CLIP's token embedding needs."""
    return 2 * 256 + len(_clip_merges()) + 2


def t5_vocabulary_size() -> int:
    """This is the number of rows that T5's embedding needs, rounded up: some rows have no token, as published."""
    return -(-len(_t5_pieces()) // 64) * 64


def write_clip_tokenizer(folder: Path, *, pad_token: str) -> None:
    """This writes a byte-level BPE tokenizer in the form of the published CLIP tokenizers.

    Args:
        folder: Made if missing.
        pad_token: The end token for CLIP-L, ``!`` (id 0) for CLIP-G, as published.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    merges = _clip_merges()
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + _WORD_END for letter in alphabet), *(left + right for left, right in merges)]
    vocabulary = {token: index for index, token in enumerate([*tokens, CLIP_START, CLIP_END])}
    assert len(vocabulary) == clip_vocabulary_size()
    specials = {"bos_token": CLIP_START, "eos_token": CLIP_END, "unk_token": CLIP_END, "pad_token": pad_token}
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    write_text(folder / "merges.txt", "\n".join(lines) + "\n")
    _write_json(folder / "special_tokens_map.json", specials)
    _write_json(
        folder / "tokenizer_config.json",
        {**specials, "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True},
    )


def write_t5_tokenizer(folder: Path) -> None:
    """This writes a unigram tokenizer that falls back to bytes, as ``tokenizer.json``.

    Args:
        folder: Made if missing.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import Unigram

    tokenizer = Tokenizer(Unigram(_t5_pieces(), unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<pad>", "</s>", "<unk>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    specials = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    _write_json(folder / "special_tokens_map.json", specials)
    _write_json(
        folder / "tokenizer_config.json",
        {**specials, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512},
    )


def write_gemma_tokenizer(folder: Path, words: Sequence[str]) -> None:
    """This writes a BPE tokenizer over a whole text, with byte fallback, in the form of the published Gemma's.

    As published, the start token comes from the file, spaces belong to the word after them, and the configuration pads
    on the left.

    Args:
        folder: Made if missing.
        words: They are one token each after a space.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE

    vocabulary = {piece: index for index, piece in enumerate(gemma_pieces(words))}
    tokenizer = Tokenizer(BPE(vocabulary, _gemma_merges(words), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _GEMMA_SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    specials = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    _write_json(folder / "special_tokens_map.json", specials)
    _write_json(
        folder / "tokenizer_config.json",
        {**specials, "tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"},
    )


def gemma_pieces(words: Sequence[str]) -> list[str]:
    """The tokens of the tokenizer that ``write_gemma_tokenizer`` writes, by id."""
    merged = (left + right for left, right in _gemma_merges(words))
    singles = ["▁", *_PUNCTUATION_AND_LETTERS, *(f"<0x{byte:02X}>" for byte in range(256))]
    return [*_GEMMA_SPECIALS, *dict.fromkeys([*singles, *merged])]


def _gemma_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Each word grows letter by letter from the space before it, so that no other pair is ever in the way."""
    starts = [f"▁{word[:end]}" for word in words for end in range(len(word))]
    letters = [word[end] for word in words for end in range(len(word))]
    return list(dict.fromkeys(zip(starts, letters)))


def _t5_pieces() -> list[tuple[str, float]]:
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    # The order of the list stands in for frequency. Whole words beat letters, letters beat bytes.
    words = [(f"▁{word}", -4.0 - index / len(WORDS)) for index, word in enumerate(WORDS)]
    letters = [(letter, -10.0) for letter in _PUNCTUATION_AND_LETTERS]
    return [*specials, ("▁", -3.0), *words, *letters, *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]


@functools.cache
def _clip_merges() -> tuple[tuple[str, str], ...]:
    """The most frequent pairs, one after another, until every word is one token; ties go alphabetically."""
    spelled = [[*word[:-1], word[-1] + _WORD_END] for word in WORDS]
    merges = []
    while pairs := Counter(pair for symbols in spelled for pair in itertools.pairwise(symbols)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_merged(symbols, best) for symbols in spelled]
    return tuple(merges)


def _merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    for symbol in symbols:
        if result and (result[-1], symbol) == pair:
            result[-1] += symbol
        else:
            result.append(symbol)
    return result


def _write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
