"""What a caption becomes at one visit of its picture: a pure function of the caption, the settings and a seed.

Each stage draws from a generator of its own, so switching one stage on or off changes no other stage's draws.
"""

import itertools
import math
import random
import re
from collections.abc import Sequence

from library.config.dataset import SubsetConfig

_WILDCARD = re.compile(r"(?P<open>\{\{)|(?P<close>\}\})|\{(?P<choices>[^{}]+)\}")
_JOINED = ", "
_MOST_POSSIBLE = 10_000


def caption_for_visit(
    captions: Sequence[str], subset: SubsetConfig, rng: random.Random, *, epoch: int, step: int, max_steps: int
) -> tuple[str, bool]:
    """This makes the caption of one visit.

    Args:
        captions: The lines of the caption file that may be used.
        subset: What to do with them.
        rng: Decides everything that is random; seeded by the sample and its visit.
        epoch: Counted from 0; ``caption_dropout_every_n_epochs`` counts the first one as 1, as people do.
        step: Optimizer step, counted from 0; for the warm-up of tags.
        max_steps: Optimizer steps of the run; for a warm-up that is given as a fraction of them.

    Returns:
        The caption, and whether dropout struck: then the caption is empty.
    """
    dropout, line, wildcard, shuffle, tag_dropout = (random.Random(rng.getrandbits(64)) for _ in range(5))
    every = subset.caption_dropout_every_n_epochs
    if dropout.random() < subset.caption_dropout_rate or (every > 0 and (epoch + 1) % every == 0):
        return "", True
    chosen = line.choice(captions) if subset.enable_wildcard else captions[0]
    caption = _surrounded(chosen, subset)
    if subset.enable_wildcard:
        caption = _WILDCARD.sub(lambda match: _replacement(match, wildcard), caption)
    if _changes_tags(subset) or _is_marked(caption, subset):
        head, tags, tail = _split(caption, subset)
        tags = tags[: _tags_in_use(len(tags), subset, step, max_steps)]
        if subset.shuffle_caption:
            shuffle.shuffle(tags)
        tags = [tag for tag in tags if tag_dropout.random() >= subset.caption_tag_dropout_rate]
        caption = _JOINED.join(head + tags + tail)
    return _with_secondary(caption, subset), False


def possible_captions(captions: Sequence[str], subset: SubsetConfig) -> tuple[str, ...] | None:
    """Every caption that ``caption_for_visit`` can make, in order, dropout's empty one apart.

    Returns:
        None when there are too many to list: tags are shuffled or left out, or wildcards multiply.
    """
    if _changes_tags(subset):
        return None
    possible: dict[str, None] = {}
    for line in captions if subset.enable_wildcard else captions[:1]:
        caption = _surrounded(line, subset)
        pieces = _pieces(caption) if subset.enable_wildcard else [(caption,)]
        if math.prod(map(len, pieces)) + len(possible) > _MOST_POSSIBLE:
            return None
        for choice in itertools.product(*pieces):
            expanded = "".join(choice)
            if _is_marked(expanded, subset):
                head, tags, tail = _split(expanded, subset)
                expanded = _JOINED.join(head + tags + tail)
            possible[_with_secondary(expanded, subset)] = None
    return tuple(possible)


def _surrounded(caption: str, subset: SubsetConfig) -> str:
    if subset.caption_prefix:
        caption = f"{subset.caption_prefix} {caption}"
    return f"{caption} {subset.caption_suffix}" if subset.caption_suffix else caption


def _replacement(match: re.Match[str], rng: random.Random) -> str:
    return rng.choice(_choices(match))


def _choices(match: re.Match[str]) -> tuple[str, ...]:
    if match["choices"] is None:
        return ("{",) if match["open"] else ("}",)
    return tuple(match["choices"].split("|"))


def _pieces(caption: str) -> list[tuple[str, ...]]:
    """The caption in parts, each with its alternatives."""
    pieces: list[tuple[str, ...]] = []
    end = 0
    for match in _WILDCARD.finditer(caption):
        pieces += [(caption[end : match.start()],), _choices(match)]
        end = match.end()
    return [*pieces, (caption[end:],)]


def _changes_tags(subset: SubsetConfig) -> bool:
    return subset.shuffle_caption or subset.token_warmup_step > 0 or subset.caption_tag_dropout_rate > 0


def _is_marked(caption: str, subset: SubsetConfig) -> bool:
    return bool(subset.keep_tokens_separator) and subset.keep_tokens_separator in caption


def _split(caption: str, subset: SubsetConfig) -> tuple[list[str], list[str], list[str]]:
    """The tags: fixed at the start, free, fixed at the end."""
    if _is_marked(caption, subset):
        head, tags, *tail = caption.split(subset.keep_tokens_separator)
        return _tags(head, subset), _tags(tags, subset), [tag for part in tail for tag in _tags(part, subset)]
    tags_of_all = _tags(caption, subset)
    return tags_of_all[: subset.keep_tokens], tags_of_all[subset.keep_tokens :], []


def _tags(text: str, subset: SubsetConfig) -> list[str]:
    parts = text.split(subset.caption_separator) if subset.caption_separator else [text]
    return [tag for part in parts if (tag := part.strip())]


def _tags_in_use(count: int, subset: SubsetConfig, step: int, max_steps: int) -> int:
    """How many of ``count`` free tags the warm-up lets through."""
    warmup = subset.token_warmup_step
    if warmup < 1:
        warmup = math.floor(warmup * max_steps)
    if step >= warmup or count <= subset.token_warmup_min:
        return count
    return math.floor(step * (count - subset.token_warmup_min) / warmup) + subset.token_warmup_min


def _with_secondary(caption: str, subset: SubsetConfig) -> str:
    if not subset.secondary_separator:
        return caption
    return caption.replace(subset.secondary_separator, subset.caption_separator)
